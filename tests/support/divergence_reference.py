"""Divergences, slopes and diagnostics in float64 NumPy, written out.

No formula is shared with the package: whole rows, plain formulas, no chunks.
"""

import numpy as np

from trd_jax.distill.loss.divergences import DIVERGENCES, Divergence
from trd_jax.distill.loss.token_stats import Scoring
from trd_jax.experiment import methods

# Forms of a divergence that a parameter makes: name -> divergence, parameters.
FORMS = {
  "clipped forward_kl": ("forward_kl", {"clip_entries": 0.02}),
  "clipped reverse_kl": ("reverse_kl", {"clip_entries": 0.02}),
  "topk with bucket": ("reverse_kl_topk", {"top_k_tail": "bucket"}),
}
# All that there are: what is added is tested with the others.
KINDS = (*methods.DIVERGENCES, *FORMS)


def made(kind: str, **parameters) -> Divergence:
  """The divergence or form with those of the parameters that it has."""
  kind, form = FORMS.get(kind, (kind, {}))
  declared = methods.DIVERGENCES[kind].parameters
  values = {key: field.default for key, field in declared.items()}
  values |= parameters | form
  return DIVERGENCES[kind](**{key: values[key] for key in declared})


def scoring(kind: str, *, beta=0.5, top_k=32, **settings) -> Scoring:
  """The divergence of that name, walked with these settings."""
  return Scoring(made(kind, beta=beta, top_k=top_k), **settings)


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def total(x):
  return x.sum(-1, keepdims=True)


# A divergence's value [R, 1] and its slope on logits / T [R, V], from log q and
# log p at T, the labels and the teacher's logits.


def forward_kl(lq, lp, labels, teacher, clip_entries):
  if clip_entries:
    q, p = np.exp(lq), np.exp(lp)
    terms = p * (lp - lq)
    below = terms < clip_entries
    value = total(np.minimum(terms, clip_entries))
    return value, q * total(p * below) - p * below
  return total(np.exp(lp) * (lp - lq)), np.exp(lq) - np.exp(lp)


def reverse_kl(lq, lp, labels, teacher, clip_entries):
  q = np.exp(lq)
  if clip_entries:
    terms = q * (lq - lp)
    below = terms < clip_entries
    each = below * q * (lq - lp + 1)
    return total(np.minimum(terms, clip_entries)), each - q * total(each)
  divergence = total(q * (lq - lp))
  return divergence, q * (lq - lp - divergence)


def jsd(lq, lp, labels, teacher, beta):
  q, p = np.exp(lq), np.exp(lp)
  lm = np.logaddexp(np.log(beta) + lp, np.log(1 - beta) + lq)
  divergence = beta * total(p * (lp - lm)) + (1 - beta) * total(q * (lq - lm))
  return divergence, (1 - beta) * q * (lq - lm - total(q * (lq - lm)))


def sampled_reverse_kl(lq, lp, labels, teacher, discount):
  at = np.arange(len(labels)), labels
  slope = -np.exp(lq)
  slope[at] += 1
  return (lq - lp)[at][:, None], slope


def cross_entropy(lq, lp, labels, teacher):
  at = np.arange(len(labels)), labels
  slope = np.exp(lq)
  slope[at] -= 1
  return -lq[at][:, None], slope


def topk_with_bucket(lq, lp, ids):
  """The rest of the vocabulary is one token, whose masses are summed."""
  rest = np.ones(lq.shape, bool)
  rest[np.arange(len(lq))[:, None], ids] = False
  q = np.exp(lq)
  masses = [
    np.logaddexp.reduce(np.where(rest, x, -np.inf), -1, keepdims=True)
    for x in (lq, lp)
  ]
  ratio = np.where(rest, masses[0] - masses[1], lq - lp)
  divergence = total(q * ratio)
  return divergence, q * (ratio - divergence)


def reverse_kl_topk(lq, lp, labels, teacher, top_k, top_k_tail):
  ids = np.argsort(-teacher, axis=-1, kind="stable")[:, :top_k]
  if top_k_tail == "bucket":
    return topk_with_bucket(lq, lp, ids)
  at = np.arange(len(labels))[:, None], ids
  slope = np.zeros_like(lq)
  lq, lp = log_softmax(lq[at]), log_softmax(lp[at])
  divergence = total(np.exp(lq) * (lq - lp))
  slope[at] = np.exp(lq) * (lq - lp - divergence)
  return divergence, slope


def reference(inputs, divergence, temperature=1.0):
  """name -> float64 [R], and `gradient`: d divergence / d student hidden.

  `inputs` as those of `token_stats`, its scoring left out.
  """
  *_, labels, onset = inputs
  wide = [np.asarray(x, np.float64) for x in inputs[:4]]
  hidden_q, hidden_p, head_q, head_p = wide
  rows = np.arange(len(labels))
  logits_q, logits_p = hidden_q @ head_q.T, hidden_p @ head_p.T
  value, slope = globals()[divergence.name](
    log_softmax(logits_q / temperature),
    log_softmax(logits_p / temperature),
    labels,
    logits_p,
    **vars(divergence),
  )
  out = {"divergence": value[:, 0], "gradient": slope @ head_q / temperature}
  for name, x in ("student", logits_q), ("teacher", logits_p):
    log_prob = log_softmax(x)
    prob = np.exp(log_prob)
    out[f"{name}_nll"] = -log_prob[rows, labels]
    out[f"{name}_entropy"] = -(prob * log_prob).sum(-1)
    out[f"{name}_onset_mass"] = prob[:, onset].sum(-1)
    out[f"{name}_top16_mass"] = np.sort(prob)[:, -16:].sum(-1)
  return out


def error(actual, wanted):
  """Relative error in the Euclidean norm."""
  actual = np.asarray(actual, np.float64)
  return np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
