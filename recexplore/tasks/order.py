"""The order of training examples, and how they share rows: a pure function of seed and place.

Nothing is shuffled in memory. Every epoch has a permutation of its own that is computed for single
places, so any process finds the examples of any batch by itself, and a run goes on from a few
numbers, on however many processes.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from recexplore.errors import InputError

ABSENT = -1  # in a row that has room for more examples than it holds
WINDOW_ROWS = 64  # packed together: enough for rows to become full, few enough to stay mixed
_ROUNDS = 8
Place = dict[str, int]


def permuted(places: Int[np.ndarray, "P"], size: int, key: tuple[int, ...]) -> Int[np.ndarray, "P"]:
    """What stands at some places of a permutation of 0..size−1, each found by itself.

    Places are numbers of as many bits as `size` needs. In turn, each half of the bits is changed by
    a keyed hash of the other half (an unbalanced Feistel network): that can be undone, so it maps
    the numbers one to one. What falls on `size` or beyond is mapped again until it falls inside
    (cycle walking, Black & Rogaway 2002, section 3.2), which is still one to one. On average over
    all places that takes fewer than two rounds; as numbers have two bits at least, up to two for
    N = 2 and up to four for N = 1. Time and memory depend on the number of places only.

    Args:
      places: 0..size−1, int64.
      size: N.
      key: numbers that choose the permutation, of which the lowest 64 bits count. A zero at the end
        makes no other key.
    """
    low_bits = max(int(size - 1).bit_length(), 2) // 2
    high_bits = max(int(size - 1).bit_length(), 2) - low_bits
    # Two words each: SeedSequence would give large numbers more of them than small ones, so that
    # different keys became the same words.
    entropy = [number >> shift & 0xFFFFFFFF for number in key for shift in (0, 32)]
    keys = np.random.SeedSequence(entropy).generate_state(_ROUNDS, np.uint64)
    values = places.astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        low = values[outside] & np.uint64(2**low_bits - 1)
        high = values[outside] >> np.uint64(low_bits)
        for one, other in keys.reshape(-1, 2):
            low = low ^ (_hash(high, one) & np.uint64(2**low_bits - 1))
            high = high ^ (_hash(low, other) & np.uint64(2**high_bits - 1))
        values[outside] = (high << np.uint64(low_bits)) | low
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 well-mixed bits of each value (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = values + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class ExampleOrder:
    """Epochs of the examples 0..N−1.

    Attributes:
      size: N.
      seed: every epoch has another order, drawn from it; None: the order of the ids.
    """

    size: int
    seed: int | None = None

    def ids(self, epoch: int, start: int, stop: int) -> Int[np.ndarray, "P"]:
        """The examples at the places start..stop−1 of an epoch."""
        places = np.arange(start, stop)
        if self.seed is None:
            return places
        return permuted(places, self.size, (self.seed, epoch))


@dataclasses.dataclass(frozen=True)
class SingleRows:
    """A row for every example, E = 1; batches run over the ends of epochs.

    A place is {"epoch", "at"}: so many examples of the epoch have been given out.

    Attributes:
      order: of the examples.
      repeat: epoch follows epoch; otherwise there is one.
    """

    order: ExampleOrder
    repeat: bool

    @property
    def start(self) -> Place:
        """The place of the first row."""
        return {"epoch": 0, "at": 0}

    def take(self, place: Place, count: int) -> tuple[Int[np.ndarray, "R E"], Place]:
        """The examples of the next rows and the place after them.

        Args:
          place: of the first of them.
          count: rows wanted.

        Returns:
          Example ids, `ABSENT` behind a row's last, for `count` rows, or fewer (R) where an order
          that isn't repeated ends.
        """
        epoch, at = place["epoch"], place["at"]
        parts = [np.zeros(0, np.int64)]
        while count and (self.repeat or epoch == 0):
            stop = min(at + count, self.order.size)
            parts.append(self.order.ids(epoch, at, stop))
            count -= stop - at
            epoch, at = (epoch, stop) if stop < self.order.size else (epoch + 1, 0)
        return np.concatenate(parts)[:, None], {"epoch": epoch, "at": at}

    def check(self, place: Place) -> None:
        """Raises InputError where a place can't be one of this order."""
        _check_place(place, self.start, self.order.size)


class PackedRows:
    """Several examples a row, each exactly once an epoch.

    An epoch's order is cut into windows, each about as many examples as fill `WINDOW_ROWS` rows,
    and the examples of a window are put into rows by `pack`. Rows are then mixed, as the first ones
    hold the longest examples. A place is {"epoch", "at", "row"}: the window begins with that
    example of the epoch, and so many of its rows have been given out. With other rows it would mean
    something else, so their "max_length" and "examples_per_row" stand in it too.

    Args:
      order: of the examples.
      lengths: example ids → tokens, each from 1 to `max_length`.
      max_length: T.
      examples_per_row: E, at most.
      repeat: epoch follows epoch; otherwise there is one.
    """

    def __init__(
        self,
        order: ExampleOrder,
        lengths: Callable[[Int[np.ndarray, "P"]], Int[np.ndarray, "P"]],
        max_length: int,
        examples_per_row: int,
        *,
        repeat: bool,
    ):
        if examples_per_row < 1:
            raise InputError(
                f"pipeline.train.examples_per_row is {examples_per_row}; it must be a whole number "
                "from 1 on."
            )
        self._settings = {"max_length": max_length, "examples_per_row": examples_per_row}
        self.start = {"epoch": 0, "at": 0, "row": 0, **self._settings}
        self._order, self._lengths, self._repeat = order, lengths, repeat
        self._max_length, self._examples_per_row = max_length, examples_per_row
        self._latest = None, None

    def take(self, place: Place, count: int) -> tuple[Int[np.ndarray, "R E"], Place]:
        """See `SingleRows.take`."""
        epoch, at, row = place["epoch"], place["at"], place["row"]
        parts = [np.zeros((0, self._examples_per_row), np.int64)]
        while count and (self._repeat or epoch == 0):
            rows, stop = self._window(epoch, at)
            parts.append(rows[row : row + count])
            count -= len(parts[-1])
            row += len(parts[-1])
            if row == len(rows):
                epoch, at = (epoch, stop) if stop < self._order.size else (epoch + 1, 0)
                row = 0
        return np.concatenate(parts), {"epoch": epoch, "at": at, "row": row, **self._settings}

    def check(self, place: Place) -> None:
        """Raises InputError where a place can't be one of this order."""
        _check_place(place, self.start, self._order.size)
        if any(place[name] != value for name, value in self._settings.items()):
            raise _strange(place)
        if place["row"] and place["row"] >= len(self._window(place["epoch"], place["at"])[0]):
            raise _strange(place)

    def _window(self, epoch: int, at: int) -> tuple[Int[np.ndarray, "R E"], int]:
        """The rows of the window that begins at a place of an epoch, and where the next begins."""
        if self._latest[0] != (epoch, at):
            most = WINDOW_ROWS * self._examples_per_row
            ids = self._order.ids(epoch, at, min(at + most, self._order.size))
            lengths = self._lengths(ids)
            count = int(np.searchsorted(np.cumsum(lengths), WINDOW_ROWS * self._max_length)) + 1
            ids, lengths = ids[:count], lengths[:count]
            places = pack(lengths, self._max_length, self._examples_per_row)
            rows = np.where(places == ABSENT, ABSENT, ids[places])
            if self._order.seed is not None:  # 1 +: a key must not end in zero
                key = (self._order.seed, epoch, 1 + at)
                rows = rows[permuted(np.arange(len(rows)), len(rows), key)]
            self._latest = (epoch, at), (rows, at + len(ids))
        return self._latest[1]


RowOrder = SingleRows | PackedRows


def pack(
    lengths: Int[np.ndarray, "P"], max_length: int, examples_per_row: int
) -> Int[np.ndarray, "R E"]:
    """Puts examples into rows: the longest first, each into the first row that has room for it.

    >>> pack(np.array([3, 7, 5, 2]), max_length=10, examples_per_row=3)
    array([[ 1,  0, -1],
           [ 2,  3, -1]])

    Args:
      lengths: tokens of each example, from 1 to `max_length`.
      max_length: T.
      examples_per_row: E, at most.

    Returns:
      Which examples are in each row, `ABSENT` behind the last.
    """
    free = np.full(len(lengths) + 1, max_length)
    held = np.zeros(len(lengths) + 1, np.int64)
    rows = np.full((len(lengths), examples_per_row), ABSENT)
    used = 0
    for example in np.argsort(-lengths, kind="stable"):
        row = np.argmax(free[: used + 1] >= lengths[example])
        rows[row, held[row]] = example
        held[row] += 1
        free[row] = free[row] - lengths[example] if held[row] < examples_per_row else 0
        used = max(used, row + 1)
    return rows[:used]


def _check_place(place: Place, like: Place, size: int) -> None:
    fits = set(place) == set(like) and all(
        isinstance(number, int) and number >= 0 for number in place.values()
    )
    if not fits or place["at"] >= size:
        raise _strange(place)


def _strange(place: Place) -> InputError:
    return InputError(
        f"The position {place} is none of these training examples: it was saved for other examples "
        "or other pipeline.train settings (pack, examples_per_row, max_length). Remove the model's "
        "checkpoints to train it from the beginning, or set what it was trained with."
    )
