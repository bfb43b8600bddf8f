"""Where users of the simulated platform stand: history, engagement, what was offered lately.

It follows the platform day by day, all users at once.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from recexplore.simulation.platform import EXPLORATION, Day

ENGAGED = 0.5  # watch fraction from which an impression is a positive playback
KEPT = 3  # clusters at least of everyone's past that are kept
_LONG_AGO = -10_000


class Novelty(NamedTuple):
    """What was new about a day's impressions, a row each.

    Attributes:
      clusters: of the items shown.
      novel: whether the user had never engaged with the cluster before.
    """

    clusters: Int[np.ndarray, "R"]
    novel: Bool[np.ndarray, "R"]


class Standing:
    """U users among M clusters.

    A user's history are the last K distinct clusters of what they didn't skip, as in
    `feedback.transitions`. They have engaged with a cluster after a positive playback of an item
    of it.

    Args:
      num_users: U.
      item_clusters: cluster of each item.
      num_clusters: M.
      history_length: K.

    Attributes:
      recent: the last `KEPT` clusters or more, of which the history are the last; -1 where there is
        less.
      engaged: number of positive playbacks.
    """

    def __init__(
        self,
        num_users: int,
        item_clusters: Int[np.ndarray, "I"],
        num_clusters: int,
        history_length: int,
    ):
        self._item_clusters = item_clusters
        self.num_clusters = num_clusters
        self._length = history_length
        self.recent = np.full((num_users, max(history_length, KEPT)), -1, np.int32)
        self.engaged = np.zeros((num_users, num_clusters), np.int16)
        self._explored_on = np.full((num_users, num_clusters), _LONG_AGO, np.int16)
        self._day = 0

    @property
    def last(self) -> Int[np.ndarray, "U K"]:
        """Every user's history, oldest first, -1 where there is less."""
        return self.recent[:, -self._length :]

    def follow(self, day: Day) -> Novelty:
        """Takes in a day, slot by slot, and says what was new to whom at that moment."""
        clusters = self._item_clusters[day.items]
        novel = np.zeros(len(clusters), bool)
        engaged = day.watch_fraction >= ENGAGED
        order = np.argsort(day.slots, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(day.slots[order])) + 1):
            users, now = day.users[rows], clusters[rows]
            novel[rows] = self.engaged[users, now] == 0
            self.engaged[users, now] += engaged[rows]
            kept = ~day.skipped[rows]
            self._move(users[kept], now[kept])
        offered = day.source == EXPLORATION
        self._explored_on[day.users[offered], clusters[offered]] = self._day
        self._day += 1
        return Novelty(clusters, novel)

    def _move(self, users: Int[np.ndarray, "A"], clusters: Int[np.ndarray, "A"]) -> None:
        """Makes each user's cluster the last of their history, once."""
        recent = self.recent[users]
        found = recent == clusters[:, None]
        place = np.where(found.any(axis=1), found.argmax(axis=1), 0)
        shifted = np.concatenate([recent[:, 1:], clusters[:, None]], axis=1)
        after = np.arange(recent.shape[1]) >= place[:, None]
        self.recent[users] = np.where(after, shifted, recent)

    def histories(self, users: Int[np.ndarray, "A"]) -> Int[np.ndarray, "A"]:
        """The users' histories as numbers (`history_code`); -1 where one isn't complete."""
        return history_code(self.last[users], self.num_clusters)

    def allowed(
        self, users: Int[np.ndarray, "A"], *, novel_to: str, cool_down: int
    ) -> Bool[np.ndarray, "A M"]:
        """Clusters that may be explored.

        Args:
          users: for whom.
          novel_to: 'history' leaves out the clusters of the history; 'user' those that the user has
            engaged with as well.
          cool_down: days after which an explored cluster may come again.
        """
        allowed = self._explored_on[users].astype(np.int32) <= self._day - 1 - cool_down
        if novel_to == "user":
            allowed &= self.engaged[users] == 0
        rows, places = np.nonzero(self.last[users] >= 0)
        allowed[rows, self.last[users][rows, places]] = False
        return allowed


def history_code(histories: Int[np.ndarray, "A K"], num_clusters: int) -> Int[np.ndarray, "A"]:
    """Histories as numbers below M^K, row numbers of tables over all histories; -1 if incomplete.

    >>> history_code(np.array([[3, 4], [-1, 4]]), num_clusters=10)
    array([34, -1])
    """
    places = num_clusters ** np.arange(histories.shape[1])[::-1]
    return np.where((histories >= 0).all(axis=1), histories @ places, -1)
