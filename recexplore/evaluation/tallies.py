"""What is counted of every user in a period of the platform, and the metrics made of it."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int

from recexplore.evaluation.standing import ENGAGED, Novelty
from recexplore.simulation.platform import EXPLORATION, Day

COMPLETED = 0.9  # watch fraction from which an impression counts as completed
_INTEREST = 2  # positive playbacks that make an interest


class Tallies:
    """Sums over a period, one for each of U users.

    Args:
      num_users: U.
      engaged_before: positive playbacks by user and cluster when the period begins.
      exploration_slot: the place on the page that arms differ in.

    Attributes:
      explored: how often each cluster was explored with each user.
      in_slot: how often each stood in the slot that arms differ in, whoever put it there.
    """

    def __init__(
        self, num_users: int, engaged_before: Int[np.ndarray, "U M"], exploration_slot: int
    ):
        self._slot = exploration_slot
        self._before = engaged_before.copy()
        self._engaged = engaged_before.copy()
        self._met = np.zeros(engaged_before.shape, bool)
        self.explored = np.zeros(engaged_before.shape, np.int16)
        self.in_slot = np.zeros(engaged_before.shape, np.int16)
        self._sums: dict[str, np.ndarray] = {}
        self._num_users, self._days = num_users, 0

    def add(self, day: Day, novelty: Novelty, engaged: Int[np.ndarray, "U M"]) -> None:
        """Takes in a day.

        Args:
          day: what was shown and how it was taken.
          novelty: of its impressions.
          engaged: positive playbacks by user and cluster at its end.
        """
        self._engaged = engaged.copy()
        self._days += 1
        positive, slot = day.watch_fraction >= ENGAGED, day.slots == self._slot
        explored = day.source == EXPLORATION
        self._met[day.users[positive], novelty.clusters[positive]] = True
        self.in_slot[day.users[slot], novelty.clusters[slot]] += 1
        self.explored[day.users[explored], novelty.clusters[explored]] += 1
        columns = {
            "impressions": np.ones(len(positive)),
            "positive": positive,
            "completed": day.watch_fraction >= COMPLETED,
            "novel": novelty.novel,
            "slot": slot,  # one row a user and day
            "slot positive": slot & positive,
            "slot novel": slot & novelty.novel,
            "slot satisfaction": slot * day.satisfaction,
            "explored": explored,
            "explored positive": explored & positive,
        }
        for name, column in columns.items():
            sums = np.bincount(day.users, column, minlength=self._num_users)
            self._sums[name] = self._sums.get(name, 0.0) + sums

    def ratio(self, metric: str) -> tuple[Float[np.ndarray, "U"], Float[np.ndarray, "U"]]:
        """Numerator and denominator by user; the metric is the ratio of their sums.

        Args:
          metric: one of `METRICS`.
        """
        numerator, denominator = METRICS[metric]
        return self._column(numerator), self._column(denominator)

    def _column(self, name: str) -> Float[np.ndarray, "U"]:
        if name in self._sums:
            return self._sums[name]
        made: Mapping[str, Callable[[], np.ndarray]] = {
            "users": lambda: np.ones(self._num_users),
            "days": lambda: np.full(self._num_users, float(self._days)),
            "engaged pairs": lambda: self._met.sum(axis=1).astype(np.float64),
            "interests gained": lambda: (
                ((self._engaged >= _INTEREST) & (self._before == 0)).sum(axis=1).astype(np.float64)
            ),
        }
        return made[name]()


METRICS = {  # metric → numerator, denominator
    "positive_playback_rate": ("positive", "impressions"),
    "completion_rate": ("completed", "impressions"),
    "ueuc": ("engaged pairs", "users"),
    "novel_share": ("novel", "impressions"),
    "daily_active_users": ("slot", "days"),
    "interests_gained": ("interests gained", "users"),
    "slot_positive_playback_rate": ("slot positive", "slot"),
    "slot_novel_share": ("slot novel", "slot"),
    "slot_satisfaction": ("slot satisfaction", "slot"),
    "explored_share": ("explored", "slot"),
    "explored_positive_playback_rate": ("explored positive", "explored"),
}
