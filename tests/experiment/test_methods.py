"""The registries of methods are whole, and the documents' table is theirs."""

from tests.support.places import ROOT
from trd_jax.experiment import methods
from trd_jax.experiment.experiment import KEYS
from trd_jax.experiment.methods import DIVERGENCES, METHODS, TOKEN_WEIGHTS

READS = {
  "x": "x",
  "x_reference": "x and y\\*",
  "refine": "the refinement prompt",
}


def row(name: str) -> str:
  """A method's row in docs/training.md."""
  method = METHODS[name]
  contexts = [READS[method.teacher_context[r]] for r in methods.REGIMES]
  loss = DIVERGENCES[method.divergence].formula
  if method.clip:
    cuts = (f"{method.clip[r]} ({r.upper()})" for r in methods.REGIMES)
    loss += f", each token cut at {' or '.join(cuts)} nats"
  if method.token_weights:
    loss += f", tokens weighed {TOKEN_WEIGHTS[method.token_weights].formula}"
  reads = " or ".join(dict.fromkeys(contexts))
  return f"| `{name}` | {method.trajectory} | {reads} | {loss} |"


def test_the_documents_table_has_the_registrys_rows():
  lines = (ROOT / "docs/training.md").read_text().splitlines()
  begin = lines.index("| method | along | the teacher reads | divergence |") + 2
  table = lines[begin : lines.index("", begin)]
  assert table == [row(name) for name in METHODS]


def test_methods_name_what_there_is():
  for name, method in METHODS.items():
    assert method.divergence in DIVERGENCES, name
    assert method.trajectory in {"y_o", "y_r"}
    assert method.teacher_context.keys() == set(methods.REGIMES)
    assert set(method.teacher_context.values()) <= READS.keys()
    assert method.clip.keys() <= set(methods.REGIMES)
    if method.token_weights is not None:
      assert method.token_weights in TOKEN_WEIGHTS


def test_parameters_are_keys_of_the_section_loss():
  for name, declared in methods.PARAMETERS.items():
    key = KEYS[f"loss.{name}"]
    assert (key.default, key.type) == (declared.default, type(declared.default))
    assert key.doc
