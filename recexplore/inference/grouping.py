"""Histories dealt out to batches that begin alike, so that what they share is read once.

Five histories, batches of four:

    [0, 1] [0, 2] [0, 3]     begin with 0, which fills more than half a batch
    [1, 0] [2, 0]            what is left; shares nothing but what all prompts do
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from recexplore.inference.best_of_n import Batch
from recexplore.inference.context import Prompts
from recexplore.inference.launch import pad_columns

_BEGINNING, _REST = 8, 4  # widths are multiples of these, so that few programs serve all batches


def deal(histories: Int[np.ndarray, "R K"], batch_size: int) -> list[Int[np.ndarray, "rows"]]:
    """The rows of each batch: a function of the histories and the batch size, and of nothing else.

    Histories are put in order. Those with the same first K − 1 clusters fill batches of their own;
    what is left over, less than half a batch, goes with others that have the same first K − 2, and
    so on. The last batches share nothing.

    Args:
      histories: cluster ids, oldest first, right-padded with -1.
      batch_size: rows of a batch at most.

    Returns:
      For each batch the numbers of its rows; every row is in one batch.
    """
    left = np.lexsort(histories.T[::-1])
    batches: list[np.ndarray] = []
    for shared in range(histories.shape[1] - 1, -1, -1):
        beginnings = histories[left, :shared]
        new = (beginnings[1:] != beginnings[:-1]).any(axis=1)
        over = []
        for group in np.split(left, np.flatnonzero(new) + 1):
            cuts = range(0, len(group), batch_size)
            for part in (group[start : start + batch_size] for start in cuts):
                whole = 2 * len(part) >= batch_size or not shared
                (batches if whole and len(part) else over).append(part)
        left = np.concatenate([np.zeros(0, left.dtype), *over])
        if not len(left):
            break
    return batches


class Grouped(NamedTuple):
    """A batch, and apart from it what all of its prompts begin with.

    Attributes:
      batch: prompts without it, filled up with copies of the last row.
      beginnings: one row of tokens for each model.
      rows: of the batch that are real.
    """

    batch: Batch
    beginnings: tuple[Prompts, Prompts]
    rows: int


def share(batch: Batch, prefix: Sequence[int], size: int) -> Grouped:
    """Takes what the prompts of a batch begin with out of them.

    Args:
      batch: numpy arrays; prompts without the prefix of all prompts.
      prefix: that one, with which the beginnings begin.
      size: rows that the batch is filled up to.
    """
    apart = [split_shared(prompts) for prompts in (batch.novelty, batch.alignment)]
    rests = [_padded(rest, _REST) for _, rest in apart]
    beginnings = [[*prefix, *shared.tolist()] for shared, _ in apart]
    novelty, alignment = (
        _padded(
            Prompts(np.array([tokens], np.int32), np.array([len(tokens)], np.int32)), _BEGINNING
        )
        for tokens in beginnings
    )
    wide = pad_columns(batch)._replace(novelty=rests[0], alignment=rests[1])
    rows = len(batch.history)
    index = np.minimum(np.arange(size), rows - 1)
    return Grouped(jax.tree.map(lambda array: array[index], wide), (novelty, alignment), rows)


def split_shared(prompts: Prompts) -> tuple[Int[np.ndarray, "P"], Prompts]:
    """The tokens that all prompts of a batch begin with, and what each has after them.

    At least one token is left of every prompt.
    """
    tokens, lengths = prompts.tokens, prompts.lengths
    common = np.logical_and.accumulate((tokens == tokens[:1]).all(axis=0))
    shared = min(int(common.sum()), int(lengths.min()) - 1)
    return tokens[0, :shared], Prompts(tokens[:, shared:], lengths - shared)


def _padded(prompts: Prompts, multiple: int) -> Prompts:
    missing = -prompts.tokens.shape[1] % multiple
    return prompts._replace(tokens=np.pad(prompts.tokens, ((0, 0), (0, missing))))
