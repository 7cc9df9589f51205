"""Divergences, slopes and diagnostics in float64 NumPy, written out.

Nothing is shared with the package: whole rows, plain formulas, no chunks.
"""

import numpy as np


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(inputs, *, kind, temperature=1.0, beta=0.5, top_k=32):
  """name -> float64 [R], and `gradient`: d divergence / d student hidden.

  `inputs` as those of `token_stats`, its spec left out.
  """
  hidden_q, hidden_p, head_q, head_p, labels, onset = inputs
  wide = [np.asarray(x, np.float64) for x in inputs[:4]]
  hidden_q, hidden_p, head_q, head_p = wide
  rows = np.arange(len(labels))
  logits_q, logits_p = hidden_q @ head_q.T, hidden_p @ head_p.T
  lq, lp = (
    log_softmax(logits_q / temperature),
    log_softmax(logits_p / temperature),
  )
  q, p = np.exp(lq), np.exp(lp)

  def total(x):
    return x.sum(-1, keepdims=True)

  if kind == "forward_kl":
    divergence, slope = total(p * (lp - lq)), q - p
  elif kind == "reverse_kl":
    divergence = total(q * (lq - lp))
    slope = q * (lq - lp - divergence)
  elif kind == "jsd":
    lm = np.logaddexp(np.log(beta) + lp, np.log(1 - beta) + lq)
    divergence = beta * total(p * (lp - lm)) + (1 - beta) * total(q * (lq - lm))
    slope = (1 - beta) * q * (lq - lm - total(q * (lq - lm)))
  elif kind == "sampled_reverse_kl":
    divergence = (lq - lp)[rows, labels][:, None]
    slope = -q
    slope[rows, labels] += 1
  elif kind == "reverse_kl_topk":
    ids = np.argsort(-logits_p, axis=-1, kind="stable")[:, :top_k]
    at = rows[:, None], ids
    lq, lp = log_softmax(lq[at]), log_softmax(lp[at])
    divergence = total(np.exp(lq) * (lq - lp))
    slope = np.zeros_like(q)
    slope[at] = np.exp(lq) * (lq - lp - divergence)
  out = {
    "divergence": divergence[:, 0],
    "gradient": slope @ head_q / temperature,
  }
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
