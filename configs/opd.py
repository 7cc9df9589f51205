r"""OPD: Qwen3-8B teaches a smaller student; nobody is shown the reference y*.

    python -m trd_jax.pipeline \
        --config=configs/opd.py:model=1.7b,domain=math,method=trd \
        --workdir=runs/opd-1.7b-math-trd

Tables 1 and 2 (Avg@16, Pass@16), a line of the command above a row:

    model=1.7b   Qwen/Qwen3-1.7B
    model=4b     Qwen/Qwen3-4B-Instruct-2507
    domain=math  DeepScaleR; AIME24, AIME25, HMMT25, BeyondAIME, AMOBench
    domain=code  TACO; HumanEval+, MBPP+, LiveCodeBench v6
    method=trd | forward_kl | forward_kl_clip | reverse_kl | reverse_kl_topk

Table 5 sets the 4b's math rows beside those of configs/opsd.py. forward_kl_clip
cuts a token at 0.1 nats here and at 0.06 there.

Expected on 8xH100, hours:minutes (Table 11): 1.7b rollout 3:30, refinement
4:00, training 0:40 (y_o: 1:10); 4b rollout 4:00, refinement 4:00, training 1:00
(y_o: 1:20). trd raises the 1.7b's Avg@16 on AIME24 by 4.6 points and Pass@16 on
AMOBench by 5.1, the 4b's there by 12.8.

Memory of a GPU while training at the longest lengths, weights replicated, as
compiled for H100s (docs/memory.md): 27.1 GB for 1.7b, 35.6 for 4b.

Programs are graded in a sandbox. EvalPlus and lcb_runner ask their benchmarks
in their own prompts and judge the answers (third_party/evalplus/install.sh,
third_party/lcb_runner/install.sh; --config.evaluate.code_prompt=ours asks in
ours, and then LiveCodeBench does without lcb_runner).

Thinking. The paper doesn't say in which mode its models write; configs/opsd.py
has what speaks for which, and the command of a first look at 200 problems.

    thinking=default  1.7b thinks in rollouts and on mathematics, not on
                      HumanEval+, MBPP+, LiveCodeBench; the teacher refines
                      without thinking
    thinking=on       both, everywhere; y_r then has thoughts
    thinking=off      nowhere

The 4b can't think, so its teacher, which could, writes and scores without: for
it `off` is the default, and `on` is refused. Of programs the paper says as
little: its authors' code begins the answer for the model on HumanEval+ and
MBPP+, which leaves no room for thoughts, and lets it think on LiveCodeBench,
which here takes --config.evaluate.thinking=True.
Whatever the variant, y_o and y_r are scored in the mode in which they were
written, on both sides.

Settings. settings=authors sets what the authors' published code does otherwise
than the paper: what their prompts ask, scoring contexts in plain text, the mean
over tokens, and more. docs/authors.md has the table, and what of it no key
expresses. That code passes no thinking switch, so that both models think
wherever they can, and `thinking` is refused beside it.

Trajectories that a budget ended are trained on, as the paper's counts leave
none out (--config.train.truncated=drop leaves them out).

Benchmarks of mathematics are asked with the boxed sentence of Qwen's model
card, AMO-Bench with its own prompt (docs/evaluation.md, "Whose words").

Problems that a benchmark holds, too, are taken out and counted
(--config.data.decontaminate=none keeps them).

`model=nano` is the randomly initialised twin of configs/opsd.py, teacher and
student alike.
"""

from trd_jax.experiment import paper_recipe


def get_config(arg=None):
  return paper_recipe.build("opd", ("1.7b", "4b"), arg)
