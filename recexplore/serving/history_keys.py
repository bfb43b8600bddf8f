"""Histories as integers, so that finding one is a binary search.

The newest cluster is the most significant digit: histories that end alike stand side by side. A
digit is a cluster's id + 1, and 0 where a history is shorter, so that 3 clusters and at most 2 in a
history give

    history   [2]      [0, 2]      [1, 2]
    digits    3 0       3 1         3 2         in base 4
    key       12        13          14

As many digits go into a 64-bit word as fit; longer histories have several words.
"""

import numpy as np
from jaxtyping import Int

_LIMIT = 1 << 63  # words are signed


class HistoryKeys:
    """How histories of one table become keys.

    Args:
      num_clusters: M.
      history_length: K, of the longest history.

    Attributes:
      num_words: of a key.
    """

    def __init__(self, num_clusters: int, history_length: int):
        self._base = base = num_clusters + 1
        digits = 1
        while digits < history_length and base ** (digits + 1) <= _LIMIT:
            digits += 1
        self._digits = digits  # of a word
        self._shift = [base ** (digits - filled) for filled in range(digits + 1)]
        self.num_words = -(-history_length // digits)

    def pack(self, history: tuple[int, ...]) -> list[int]:
        """The key of one history, oldest cluster first, none of its clusters out of range."""
        base, digits = self._base, self._digits
        newest = history[::-1]
        words = []
        for start in range(0, self.num_words * digits, digits):
            word = 0
            some = newest[start : start + digits]
            for cluster in some:
                word = word * base + cluster + 1
            words.append(word * self._shift[len(some)])
        return words

    def pack_all(self, histories: Int[np.ndarray, "R K"]) -> list[Int[np.ndarray, "R"]]:
        """The words of all keys, most significant first.

        Args:
          histories: oldest cluster first, -1 in front of shorter ones.
        """
        digits = histories[:, ::-1].astype(np.int64) + 1
        missing = self.num_words * self._digits - digits.shape[1]
        digits = np.pad(digits, ((0, 0), (0, missing)))
        words = []
        for start in range(0, digits.shape[1], self._digits):
            word = np.zeros(len(digits), np.int64)
            for place in range(start, start + self._digits):
                word = word * self._base + digits[:, place]
            words.append(word)
        return words


def is_ascending(words: list[Int[np.ndarray, "R"]]) -> bool:
    """Whether each key is larger than the one before it."""
    larger = np.zeros(max(len(words[0]) - 1, 0), bool)
    for word in reversed(words):
        larger = (word[1:] > word[:-1]) | ((word[1:] == word[:-1]) & larger)
    return bool(larger.all())
