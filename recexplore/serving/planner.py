"""What to show a user who is to explore: history → clusters → items, and with which probability.

    events    what the user met lately, oldest first; those not skipped make the history
    clusters  the exploration table's answer, without what rests: a cluster that the user engaged
              with, skipped or was offered not long ago
    items     the item recommender's best in each cluster, never one that the user has met

Three things may be left to chance: whether to explore at all, which of the clusters, which of their
items. Each draw is a function of the seed, the user and the time, and its probability is known;
their product is the propensity that stands in the log, so that the next round of feedback can be
learned from what was shown (`impressions`).
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from recexplore import artifacts
from recexplore.errors import InputError, check_field
from recexplore.serving.exploration import Exploration

POLICY = "exploration"  # in the log
_DAY = 86_400


class Event(NamedTuple):
    """Something that a user met.

    Attributes:
      item_id: what.
      timestamp: when, in seconds since 1970.
      skipped: not looked at, or hardly.
      explored: it was shown to explore.
    """

    item_id: str
    timestamp: int
    skipped: bool = False
    explored: bool = False


class Planned(NamedTuple):
    """An item to be shown.

    Attributes:
      item_id: what.
      cluster: that it is of.
      propensity: with which probability this item was chosen for this user at this time, the budget
        included, given the table and what stands before it in the plan.
      score: the alignment model's, of the cluster after the history.
      log_probability: the novelty model's.
      level: which level of the table answered.
    """

    item_id: str
    cluster: int
    propensity: float
    score: float
    log_probability: float
    level: str


class Request(NamedTuple):
    """A user to plan for; see `Planner.plan`."""

    user_id: str
    events: Sequence[Event]
    now: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much may be explored, and how much of it is left to chance.

    Attributes:
      num_clusters: explored in one plan, an item each.
      share: part of the plans that explore; the others are empty, by chance.
      cap: items that a user is shown to explore within `cap_days`, at most.
      cap_days: see above.
      cool_down_days: for so long a cluster rests that a user skipped or was offered.
      novel_days: for so long a cluster isn't novel that a user engaged with; None: for ever.
      temperature: of the draw among the table's clusters by score; 0 takes the best.
      item_temperature: of the draw among a cluster's best items by score; 0 takes the best.
      num_items: of a cluster that are drawn from.
      seed: of all draws.
    """

    num_clusters: int = 1
    share: float = 1.0
    cap: int = 3
    cap_days: float = 1.0
    cool_down_days: float = 7.0
    novel_days: float | None = None
    temperature: float = 0.0
    item_temperature: float = 0.0
    num_items: int = 5
    seed: int = 0

    def __post_init__(self):
        for field in ("num_clusters", "cap", "num_items"):
            check_field(self, getattr(self, field) >= 1, field, "must be at least 1")
        check_field(self, self.seed >= 0, "seed", "must be at least 0")
        for field in ("cap_days", "cool_down_days", "temperature", "item_temperature"):
            value = getattr(self, field)
            check_field(self, 0 <= value < float("inf"), field, "must be a number from 0 on")
        check_field(self, 0 < self.share <= 1, "share", "must lie in 0..1, above 0")
        known = self.novel_days is None or self.novel_days > 0
        check_field(self, known, "novel_days", "must be above 0, or None")


@runtime_checkable
class Items(Protocol):
    """What ranks items within clusters: an `item_recommender.ItemRecommender`, or whoever can."""

    item_ids: Sequence[str]

    def number(self, item_id: str) -> int | None:
        """An item's number, its place among `item_ids`; None where it isn't known."""

    def recommend(
        self,
        sequences: Sequence[Sequence[int]],
        clusters: Int[np.ndarray, "B C"],
        count: int,
        excluded: Sequence[Sequence[int]],
    ) -> tuple[Int[np.ndarray, "B C k"], Float[np.ndarray, "B C k"]]:
        """Item numbers and scores of the best of each cluster; -1 and -inf where there are fewer.
        Never an item of the sequence, nor an excluded one."""


class Planner:
    """Plans explorations. Any number of threads may plan at once.

    Args:
      look_up: `ExplorationTable.look_up`, or a `TableReader`'s.
      recommender: of items within clusters.
      item_clusters: the cluster of every item; events with other items tell nothing of interests,
        but aren't shown again.
      budget: how much to explore.
    """

    def __init__(
        self,
        look_up: Callable[[Sequence[int], Iterable[int]], Exploration],
        recommender: Items,
        item_clusters: Mapping[str, int],
        budget: Budget,
    ):
        self._look_up = look_up
        self._recommender = recommender
        self._item_clusters = item_clusters
        self.budget = budget

    def plan(self, user_id: str, events: Sequence[Event], now: int) -> list[Planned]:
        """What to show one user; nothing where the budget, the cap or the table has nothing left.

        Args:
          user_id: draws are the user's own.
          events: what they met, oldest first.
          now: seconds since 1970; the same user at the same time gets the same plan.

        Raises:
          InputError: events aren't in order, or lie in the future; the time is negative.
        """
        return self.plan_all([Request(user_id, events, now)])[0]

    def plan_all(
        self, requests: Sequence[Request], unavailable: Sequence[str] = ()
    ) -> list[list[Planned]]:
        """Plans for many users, whose items are scored together; see `plan`.

        Args:
          requests: who is planned for.
          unavailable: items that nobody is shown now.
        """
        numbers = map(self._recommender.number, unavailable)
        gone = [number for number in numbers if number is not None]
        asked = [(request, self._ask(request)) for request in requests]
        exploring = [(place, *ask) for place, ask in enumerate(asked) if ask[1] is not None]
        plans: list[list[Planned]] = [[] for _ in requests]
        if not exploring:
            return plans
        width = max(len(found.clusters) for _, _, found in exploring)
        clusters = np.full((len(exploring), width), -1, np.int32)
        for row, (_, _, found) in zip(clusters, exploring, strict=True):
            row[: len(found.clusters)] = found.clusters
        met = [self._numbers(request.events) for _, request, _ in exploring]
        ranked = self._recommender.recommend(
            [kept for kept, _ in met],
            clusters,
            self.budget.num_items,
            [[*skipped, *gone] for _, skipped in met],
        )
        for (place, request, found), *items in zip(exploring, *ranked, strict=True):
            plans[place] = self._pick(request, found, *items)
        return plans

    def _ask(self, request: Request) -> Exploration | None:
        """The clusters that could be explored; None where nothing is, by budget, cap or table."""
        _check(request)
        history, resting, offered = self._stand(request)
        lucky = _chance(self.budget.seed, request, "share").random() < self.budget.share
        if not lucky or offered >= self.budget.cap:
            return None
        found = self._look_up(history, resting)
        return found if found.clusters else None

    def _pick(
        self,
        request: Request,
        found: Exploration,
        items: Int[np.ndarray, "C k"],
        item_scores: Float[np.ndarray, "C k"],
    ) -> list[Planned]:
        """Draws clusters among those that have an item to show, and an item of each."""
        budget = self.budget
        left = min(budget.num_clusters, budget.cap - self._stand(request)[2])
        places = np.flatnonzero((items[: len(found.clusters)] >= 0).any(axis=1))
        scores = np.asarray(found.scores)[places]
        chance = _chance(budget.seed, request, "cluster")
        order, odds = _draw(scores, budget.temperature, chance)
        plan = []
        for place, of_cluster in zip(places[order[:left]], odds, strict=False):
            there = items[place] >= 0
            chosen, of_item = _draw(item_scores[place][there], budget.item_temperature, chance)
            plan.append(
                Planned(
                    self._recommender.item_ids[int(items[place][there][chosen[0]])],
                    int(found.clusters[place]),
                    float((1.0 if plan else budget.share) * of_cluster * of_item[0]),
                    float(found.scores[place]),
                    float(found.log_probabilities[place]),
                    found.level,
                )
            )
        return plan

    def _stand(self, request: Request) -> tuple[list[int], set[int], int]:
        """A user's history, oldest first; other clusters that rest; explorations of late."""
        budget = self.budget
        history: dict[int, None] = {}
        resting: set[int] = set()
        offered = 0
        for event in request.events:
            days = (request.now - event.timestamp) / _DAY
            offered += event.explored and days < budget.cap_days
            cluster = self._item_clusters.get(event.item_id)
            if cluster is None:
                continue
            if not event.skipped and (budget.novel_days is None or days < budget.novel_days):
                history.pop(cluster, None)
                history[cluster] = None
            if (event.skipped or event.explored) and days < budget.cool_down_days:
                resting.add(cluster)
        return list(history), resting - history.keys(), offered

    def _numbers(self, events: Sequence[Event]) -> tuple[list[int], list[int]]:
        """Items that weren't skipped when they were met first, as in training; and the others."""
        kept: dict[int, None] = {}
        skipped: dict[int, None] = {}
        for event in events:
            number = self._recommender.number(event.item_id)
            if number is not None and number not in kept and number not in skipped:
                (skipped if event.skipped else kept)[number] = None
        return list(kept), list(skipped)


def impressions(requests: Sequence[Request], plans: Sequence[Sequence[Planned]]) -> pa.Table:
    """What was planned, as a log of what was shown: `artifacts.PLANS`.

    Args:
      requests: who was planned for, and when.
      plans: as `Planner.plan_all` gives them.
    """
    rows = [
        (request.user_id, planned.item_id, request.now, planned.propensity, POLICY, planned.cluster)
        for request, plan in zip(requests, plans, strict=True)
        for planned in plan
    ]
    columns = zip(*rows, strict=True) if rows else [[]] * len(artifacts.PLANS)
    return pa.table(
        {name: list(values) for name, values in zip(artifacts.PLANS.names, columns, strict=True)},
        artifacts.PLANS,
    )


def _check(request: Request) -> None:
    times = [event.timestamp for event in request.events]
    if times != sorted(times) or (times and times[-1] > request.now) or request.now < 0:
        raise InputError(
            f"The events of user {request.user_id!r} aren't in order of time, or the last is later "
            f"than now, {request.now}. Give them oldest first, in seconds since 1970."
        )


def _chance(seed: int, request: Request, purpose: str) -> np.random.Generator:
    text = f"{request.user_id} {purpose}".encode()
    return np.random.default_rng([seed, request.now, zlib.crc32(text), zlib.adler32(text)])


def _draw(
    scores: Float[np.ndarray, "C"], temperature: float, chance: np.random.Generator
) -> tuple[Int[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Places in the order in which they are drawn, without replacement and in proportion to
    exp(score / temperature), each with its probability given those before it."""
    if not temperature:
        return np.argsort(-scores, kind="stable"), np.ones(len(scores))
    logits = np.asarray(scores, np.float64) / temperature
    order = np.argsort(-(logits + chance.gumbel(size=len(logits))), kind="stable")
    left = np.logaddexp.accumulate(logits[order][::-1])[::-1]
    return order, np.exp(logits[order] - left)
