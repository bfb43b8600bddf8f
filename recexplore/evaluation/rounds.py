"""A simulated platform that explores by plan, and what it logs for the next round of learning.

Users have events, planners plan for them, the platform's day goes as it goes, and the log has every
impression with its propensity. Users are divided into arms by a hash, each with a planner of its
own, so that what one of them is worth is seen beside the others, at the same time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from recexplore.evaluation import statistics
from recexplore.evaluation.standing import ENGAGED
from recexplore.serving.exploration import Exploration
from recexplore.serving.planner import Event, Planner, Request
from recexplore.simulation import log
from recexplore.simulation.platform import EXPLORATION, Day, Platform
from recexplore.simulation.world import Settings

METRICS = ("satisfaction", "positive_playback_rate")
_EVENTS_KEPT = 400  # of a user


class Explored(NamedTuple):
    """What each user was shown to explore in a round, and how they took it.

    Attributes:
      shown: impressions.
      satisfaction: the truth, summed over them.
      engaged: positive playbacks among them.
    """

    shown: Float[np.ndarray, "U"]
    satisfaction: Float[np.ndarray, "U"]
    engaged: Float[np.ndarray, "U"]


class LivingPlatform:
    """The platform, everyone's events, and the log so far.

    Args:
      settings: of the platform.
      num_days: lived without exploration before anything else.

    Attributes:
      platform: as it stands now.
      days: all that happened, with propensities.
    """

    def __init__(self, settings: Settings, num_days: int):
        self.platform = Platform(settings)
        self.days: list[Day] = []
        self._events: list[list[Event]] = [[] for _ in range(settings.num_users)]
        self._items = log.item_ids(settings.num_items)
        for _ in range(num_days):
            self._take(self.platform.show())

    def log(self) -> log.InteractionLog:
        """All that happened so far, in the schema."""
        return log.as_log(self.platform.world, self.days, seed=self.platform.settings.seed)

    def live(
        self,
        num_days: int,
        planners: Sequence[Planner],
        arm_of: Int[np.ndarray, "U"],
        progress: Callable[..., None],
    ) -> Explored:
        """Days on which everyone who comes is shown what their arm's planner has planned.

        Args:
          num_days: how many.
          planners: of each arm.
          arm_of: each user's arm.
          progress: called as progress(days done, all).
        """
        sums = np.zeros((3, len(self._events)))
        for done in range(num_days):
            users = self.platform.arrive()
            items, propensities = self._planned(users, planners, arm_of[users])
            day = self.platform.show(items)
            explored = day.source == EXPLORATION
            own = propensities[np.searchsorted(users, day.users[explored])]
            day.propensity[explored] = own
            self._take(day)
            who = day.users[explored]
            values = (1.0, day.satisfaction[explored], day.watch_fraction[explored] >= ENGAGED)
            for total, value in zip(sums, values, strict=True):
                np.add.at(total, who, value)
            progress(done + 1, num_days)
        return Explored(*sums)

    def _planned(self, users, planners, arms) -> tuple[np.ndarray, np.ndarray]:
        """An item for each user, -1 for none, and its propensity."""
        uploaded = self.platform.world.uploaded(self.platform.day)
        gone = [self._items[item] for item in np.flatnonzero(~uploaded)]
        items = np.full(len(users), -1)
        propensities = np.full(len(users), np.nan, np.float32)
        for arm, planner in enumerate(planners):
            rows = np.flatnonzero(arms == arm)
            requests = [
                Request(f"u{user}", self._events[user], self.platform.now) for user in users[rows]
            ]
            for row, plan in zip(rows, planner.plan_all(requests, gone), strict=True):
                if plan:
                    items[row] = int(plan[0].item_id[1:])
                    propensities[row] = plan[0].propensity
        return items, propensities

    def _take(self, day: Day) -> None:
        self.days.append(day)
        columns = (day.items, day.timestamp, day.skipped, day.source == EXPLORATION)
        for user, item, *event in zip(*(c.tolist() for c in (day.users, *columns)), strict=True):
            self._events[user].append(Event(self._items[item], *event))
        for events in self._events:
            del events[:-_EVENTS_KEPT]


def random_look_up(
    num_clusters: int,
) -> Callable[[Sequence[int], Iterable[int]], Exploration]:
    """As an exploration table would be that knows nothing: all clusters that are new, and no reason
    to prefer one. A planner with a temperature above 0 takes any, and knows how likely it was."""

    def look_up(history: Sequence[int], banned: Iterable[int] = ()) -> Exploration:
        left = np.setdiff1d(np.arange(num_clusters), [*history, *banned])
        zeros = [0.0] * len(left)
        return Exploration(left.tolist(), zeros, zeros, [1.0] * len(left), "random")

    return look_up


def estimates(
    explored: Explored,
    arm_of: Int[np.ndarray, "U"],
    names: Sequence[str],
    samples: int,
    seed: int,
) -> Mapping[str, float]:
    """ARM/METRIC of a round, and ARM/METRIC_against_OTHER, the relative change against every arm
    before it; all with `_low` and `_high`. What can't be told is left out.
    """
    found = {}
    sums = {}
    for arm, name in enumerate(names):
        shown, *others = (values[arm_of == arm] for values in explored)
        numerators = np.stack(others, axis=1)
        sums[name] = statistics.Sums(numerators, np.stack([shown] * len(METRICS), axis=1))
        ratios = statistics.bootstrap_ratio(*sums[name][:2], samples, seed)
        found |= _spread(name, "", ratios)
        for other in list(sums)[:-1]:
            change = statistics.compare(sums[name], sums[other], samples, seed)
            found |= _spread(name, f"_against_{other}", change)
    return found


def _spread(name: str, suffix: str, estimate: statistics.Estimate) -> dict[str, float]:
    return {
        f"{name}/{metric}{suffix}{end}": float(part[place])
        for place, metric in enumerate(METRICS)
        if np.isfinite([part[place] for part in estimate]).all()
        for part, end in zip(estimate, ("", "_low", "_high"), strict=True)
    }
