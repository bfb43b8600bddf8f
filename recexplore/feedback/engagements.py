"""A log by user, in the order of time: which items each met, and which they engaged with."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from recexplore.feedback.transitions import recency_weights


class Engagements(NamedTuple):
    """The first meeting of every user with every item, user after user, oldest first.

    An item that was met isn't recommended again, so later meetings say nothing here. As in
    transitions, a user engaged with what they didn't skip.

    Attributes:
      user_ids: of the U users.
      starts: user u's meetings are those from starts[u] to starts[u + 1] − 1.
      items: item numbers, R in all.
      times: seconds since 1970.
      engaged: whether the item was not skipped.
    """

    user_ids: np.ndarray
    starts: Int[np.ndarray, "U1"]
    items: Int[np.ndarray, "R"]
    times: Int[np.ndarray, "R"]
    engaged: Bool[np.ndarray, "R"]

    @property
    def users(self) -> Int[np.ndarray, "R"]:
        """The user of each meeting."""
        return np.repeat(np.arange(len(self.user_ids)), np.diff(self.starts))

    def each(self) -> Iterator[slice]:
        """Where each user's meetings stand."""
        yield from map(slice, self.starts[:-1].tolist(), self.starts[1:].tolist())

    def of(self, users: Int[np.ndarray, "V"]) -> "Engagements":
        """Those of some users only, by their places."""
        rows = [np.arange(self.starts[u], self.starts[u + 1]) for u in users.tolist()]
        kept = np.concatenate([np.zeros(0, np.int64), *rows])
        starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
        parts = (part[kept] for part in (self.items, self.times, self.engaged))
        return Engagements(self.user_ids[users], starts, *parts)

    def before(self, time: int) -> "Engagements":
        """Those before a time; users may be left with none."""
        kept = self.times < time
        counts = np.bincount(self.users[kept], minlength=len(self.user_ids))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        parts = (part[kept] for part in (self.items, self.times, self.engaged))
        return Engagements(self.user_ids, starts, *parts)


def read_engagements(
    interactions: pa.Table, item_ids: pa.Array | pa.ChunkedArray, seed: int = 0
) -> Engagements:
    """INTERACTIONS by user.

    Args:
      interactions: INTERACTIONS.
      item_ids: an item's number is its place here; interactions with others are left out.
      seed: of the order of what a user met at the same time, which the log doesn't tell: the order
        of its ids would be something to learn.
    """
    numbers = pc.index_in(interactions["item_id"], value_set=pa.array(item_ids.to_pylist()))
    known = pc.is_valid(numbers)
    kept = interactions.filter(known)
    items = numbers.filter(known).to_numpy().astype(np.int64)
    coded = kept["user_id"].combine_chunks().dictionary_encode()
    user_ids = np.array(coded.dictionary.to_pylist(), object)
    users = coded.indices.to_numpy().astype(np.int64)
    times = kept["timestamp"].to_numpy()
    engaged = pc.invert(kept["skipped"]).to_numpy()
    mixed = np.random.default_rng(seed).permutation(len(items))
    order = np.lexsort((mixed, times, users))
    meetings = users[order] * max(len(item_ids), 1) + items[order]
    first = np.sort(np.unique(meetings, return_index=True)[1])
    order = order[first]
    counts = np.bincount(users[order], minlength=len(user_ids))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Engagements(user_ids, starts, items[order], times[order], engaged[order])


def popularity(
    met: Engagements, num_items: int, half_life: float | None = None
) -> Float[np.ndarray, "I"]:
    """How many users engaged with each item, newer engagements weighing more.

    Args:
      met: of the period to count in.
      num_items: I.
      half_life: as a share of the period's engagements; see `transitions.recency_weights`.
    """
    items = met.items[met.engaged]
    weights = np.empty(len(items))
    oldest_first = np.argsort(met.times[met.engaged], kind="stable")
    weights[oldest_first] = recency_weights(len(items), half_life)
    return np.bincount(items, weights, minlength=num_items)
