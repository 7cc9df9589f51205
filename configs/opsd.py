r"""OPSD: the student is its own teacher, adapter off, shown the reference y*.

    python -m trd_jax.pipeline --config=configs/opsd.py:model=8b,method=trd \
        --workdir=runs/opsd-8b-trd

Tables 3 and 4 (Avg@16, Pass@16), a line of the command above a row, on math:

    model=8b  Qwen/Qwen3-8B
    model=4b  Qwen/Qwen3-4B-Instruct-2507
    method=trd | forward_kl | forward_kl_clip | reverse_kl | reverse_kl_topk

Tables 6, 7, 8 (8b): method=forward_kl, reverse_kl, trd with subset=fail, succ,
fail_to_succ. Figure 3 is what every training logs to train/metrics.jsonl: 8b
with method=forward_kl, reverse_kl and trd. Figures 5 to 7: cot=with_cot and
cot=answer_only keep DeepScaleR's problems with and without a worked solution
apart. TACO is trained on with domain=code, which the paper has no OPSD row for.

Expected on 8xH100, hours:minutes (Table 11): 8b rollout 4:20, refinement 2:50,
training 2:10 (y_o: 5:20); 4b rollout 2:10, refinement 2:00, training 1:20
(y_o: 2:10). Of 40,245 problems the 8b's y_o solved 27,927, and y_r another
4,372; medians 7.7K tokens of y_o, 0.88K of y_r. Avg@16 of trd is at or above
the base on every benchmark, and on 8b Pass@16 rises by half on AMOBench.

Memory of a GPU while training at the longest lengths, weights replicated, as
compiled for H100s (docs/memory.md): 34.1 GB for 8b, 20.5 for 4b.

Thinking. The paper doesn't say in which mode its models write. Its y_r have a
median of 0.88K tokens on the 8b, which thinks unless it is told not to, and of
0.85K on the 4b, which can't: that speaks for refinement without thinking. The
authors' published code passes no switch anywhere, and scores raw text without a
chat template, so it settles nothing for contexts in the template. Hence

    thinking=default  8b thinks in rollouts and on mathematics, and neither in
                      refinement nor on HumanEval+, MBPP+, LiveCodeBench
    thinking=on       everywhere; y_r then has thoughts, which the refine stage
                      searches for mentions of the draft and the reference
    thinking=off      nowhere

For the 4b `off` is the default, and `on` is refused. Whatever the variant, y_o
and y_r are scored in the mode in which they were written, on both sides. Which
of the three was the paper's is not known; a first look at 200 problems is

    for thinking in default on off; do
      python -m trd_jax.pipeline \
          --config=configs/opsd.py:model=8b,thinking=$thinking \
          --config.data.limit=200 --config.evaluate.benchmarks=aime24 \
          --config.evaluate.k=4 --workdir=runs/look-$thinking
    done

whose stages print median lengths, to be held against 7.7K and 0.88K, and how
many y_r speak of the draft; D_first_5 in train/metrics.jsonl is the divergence
at the first five tokens.

Settings. settings=authors sets what the authors' published code does otherwise
than the paper: what their prompts ask, scoring contexts in plain text, the mean
over tokens, a clip at 0.1 nats, and more. docs/authors.md has the table, and
what of it no key expresses. That code passes no thinking switch, so that the 8b
thinks in every stage, and `thinking` is refused beside it.

Trajectories that a budget ended are trained on, as the paper's counts leave
none out (--config.train.truncated=drop leaves them out).

Benchmarks of mathematics are asked with the boxed sentence of Qwen's model
card, AMO-Bench with its own prompt (docs/evaluation.md, "Whose words").

Problems that a benchmark holds, too, are taken out and counted
(--config.data.decontaminate=none keeps them).

`model=nano` is a randomly initialised Qwen3 with the full vocabulary that takes
16 real problems through every stage on a laptop, with the embedded engine and
the real chat template. Its accuracy is 0: what it proves is the path.

    python -m trd_jax.pipeline \
        --config=configs/opsd.py:model=nano,tokenizer=DIR_OF_TOKENIZER \
        --config.data.root=DEEPSCALER --config.evaluate.root=BENCHMARKS \
        --workdir=runs/opsd-nano
"""

from trd_jax.experiment import paper_recipe


def get_config(arg=None):
  return paper_recipe.build("opsd", ("8b", "4b"), arg)
