"""Description losses the plain way: arrays as wide as the vocabulary, clusters counted one by one.

The oracle of the objectives' fast path.
"""

import jax
import jax.numpy as jnp
import numpy as np


def slow_description_loss(model, params, trie, batch, smoothing, within_trie):
    """Sum of weighted losses."""
    batch = {name: np.asarray(values) for name, values in batch.items()}
    every = model.apply(params, batch["tokens"])
    width, total = every.shape[-1], 0.0
    for row, tokens in enumerate(batch["tokens"]):
        first, end = int(batch["prompt_lengths"][row]), int(batch["lengths"][row])
        below, leads = _counts(trie, batch["seen"][row], tokens[first:end], width)
        possible = below > 0 if within_trie else ~leads | (below > 0)
        logits = jnp.where(possible, every[row, first - 1 : end - 1], -1e30)
        share = below / below.sum(axis=1, keepdims=True)
        wanted = (1 - smoothing) * np.eye(width)[tokens[first:end]] + smoothing * share
        terms = jnp.where(wanted > 0, wanted * jax.nn.log_softmax(logits), 0.0)
        total = total - jnp.sum(terms) * batch["weight"][row]
    return total


def _counts(trie, seen, description, width):
    """[steps, V]: how many clusters not seen a token leads to, and whether it leads to any."""
    below = np.zeros((len(description), width), int)
    leads = np.zeros((len(description), width), bool)
    for step in range(len(description)):
        for sequence, length, excluded in zip(trie.sequences, trie.lengths, seen, strict=True):
            if step < length and (sequence[:step] == description[:step]).all():
                leads[step, sequence[step]] = True
                below[step, sequence[step]] += not excluded
    return below, leads
