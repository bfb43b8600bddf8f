"""An A/B experiment on the simulated platform: arms that differ in what fills one slot.

The platform's days of the log are lived through again, from the same seed, so that the experiment
goes on where the log ended. Then every user belongs to one arm, by a hash of their id. All arms
share the platform, its production recommender and the item recommender that turns a cluster into an
item.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from recexplore.errors import InputError
from recexplore.evaluation import statistics
from recexplore.evaluation.arms import Arm, Asked
from recexplore.evaluation.standing import Standing
from recexplore.evaluation.tallies import METRICS, Tallies
from recexplore.simulation.platform import EXPLORATION, Platform
from recexplore.simulation.world import Settings, history_satisfaction

NOVEL_TO = ("user", "history")
DISTINCT = "distinct_clusters"  # shown in the slot that arms differ in
SAME = "same_treatment"  # users split in two although nothing differs
_OURS = "best_of_20"
_RIVALS = ("novelty_only", "random_novel", "popular_novel", "markov", "bandit", "alignment_only")
CLAIMS = tuple((_OURS, rival) for rival in (*_RIVALS, "policy_gradient"))
_CALIBRATED = ("positive_playback_rate", "ueuc", "daily_active_users")
_ITEM_TEMPERATURE = 0.1  # of the choice among a cluster's items
_MODEST = 5.0  # users' worth of what is known of the last cluster alone, in a history's truth


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is compared, and for how long.

    Attributes:
      num_days: length.
      sample_counts: n of the best-of-n arms.
      novel_to: 'user': arms choose among clusters that the user never engaged with; 'history':
        among those that are not in the history, as an exploration table without a planner does.
      cool_down: days before the same cluster is explored again with the same user.
      relevance_weight: β of the arm that scores every cluster by log p + β s.
      suppression: share of exploration items that the final ranker throws out.
      bootstrap_samples: of intervals.
      seed: of assignment and draws.
    """

    num_days: int = 14
    sample_counts: Sequence[int] = (2, 5, 10, 20, 50)
    novel_to: str = "user"
    cool_down: int = 7
    relevance_weight: float = 1.0
    suppression: float = 0.0
    bootstrap_samples: int = 500
    seed: int = 0

    def __post_init__(self):
        counts = tuple(self.sample_counts)
        for field, ok, rule in (
            ("num_days", self.num_days >= 1, "must be at least 1"),
            ("sample_counts", counts and min(counts) >= 1, "must list whole numbers from 1 on"),
            ("novel_to", self.novel_to in NOVEL_TO, f"must be one of {', '.join(NOVEL_TO)}"),
            ("cool_down", self.cool_down >= 0, "must be at least 0"),
            ("suppression", 0 <= self.suppression < 1, "must lie in 0..1, below 1"),
            ("bootstrap_samples", self.bootstrap_samples >= 100, "must be at least 100"),
        ):
            if not ok:
                value = getattr(self, field)
                raise InputError(f"experiment.Experiment.{field} is {value!r}; it {rule}.")


class Scene:
    """A platform at the end of its log, with where its users stand.

    Args:
      settings: of the platform.
      log_days: days of the log, which are lived through.
      item_clusters: cluster of each item.
      num_clusters: M.
      history_length: K.
      pre_period: last days of the log that are tallied.
      population: see `Platform`.
      progress: called as progress(days done, all).

    Attributes:
      platform: after the log.
      standing: of its users.
      before: tallies of the pre-period.
      impressions: of the log.
      visits: (user, history code) of everyone with a whole history at the end of each day of the
        log's second half.
    """

    def __init__(
        self,
        settings: Settings,
        log_days: int,
        item_clusters: Int[np.ndarray, "I"],
        num_clusters: int,
        history_length: int,
        *,
        pre_period: int = 7,
        population: int = 0,
        progress: Callable[..., None] | None = None,
    ):
        self.platform = Platform(settings, population)
        self.item_clusters, self.num_clusters = item_clusters, num_clusters
        self.standing = Standing(settings.num_users, item_clusters, num_clusters, history_length)
        self._slot = settings.exploration_slot
        self.before = self.tallies()
        self.impressions = 0
        visits = []
        for day in range(log_days):
            if day == max(log_days - pre_period, 0):
                self.before = self.tallies()
            users = self.platform.arrive()
            self.impressions += len(self.live(self.before, None, 0.0).users)
            if 2 * day >= log_days:
                codes = self.standing.histories(users)
                visits.append(np.stack([users, codes])[:, codes >= 0])
            if progress:
                progress(day + 1, log_days)
        self.visits = np.concatenate(visits, axis=1)

    def tallies(self) -> Tallies:
        """Empty ones, from here on."""
        return Tallies(len(self.standing.last), self.standing.engaged, self._slot)

    def live(self, tallies: Tallies, items: Int[np.ndarray, "A"] | None, suppression: float):
        """Shows a day to those who have arrived and takes it in."""
        day = self.platform.show(items, suppression=suppression)
        tallies.add(day, self.standing.follow(day), self.standing.engaged)
        return day

    def item_weights(self) -> Float[np.ndarray, "I"]:
        """How often the item recommender takes each item of a cluster today, beside its others: by
        popularity, as production does within a topic."""
        day = self.platform.day
        popularity = self.platform.recommender.popularity(day)
        return np.exp(popularity / _ITEM_TEMPERATURE) * self.platform.world.uploaded(day)

    def satisfaction(self) -> Float[np.ndarray, "U M"]:
        """The truth: every user's expected satisfaction with each cluster's items."""
        return self.platform.world.cluster_satisfaction(
            self.item_clusters, self.num_clusters, self.item_weights()
        )


def truth_of_histories(scene: Scene, history_length: int) -> Float[np.ndarray, "H M"]:
    """Expected satisfaction with each cluster, averaged over the users who have a history.

    For a history that n visits had, with mean m, whose last cluster's visits have mean t:
    (n m + 5 t) / (n + 5); so a history that hardly anyone has is told what is known of its last
    cluster. Rows by `history_code`.

    Args:
      scene: of users other than those of the experiment, lest the truth know them personally.
      history_length: K.
    """
    size = scene.num_clusters
    users, codes = scene.visits
    satisfaction = np.nan_to_num(scene.satisfaction())
    mean, count = history_satisfaction(satisfaction, codes, size**history_length, users=users)
    by_last, of_last = history_satisfaction(satisfaction, codes % size, size, users=users)
    overall = satisfaction.mean(axis=0)
    by_last = np.where(of_last[:, None] > 0, np.nan_to_num(by_last), overall)
    fallback = by_last[np.arange(size**history_length) % size]
    weight = (count / (count + _MODEST))[:, None]
    return (weight * np.nan_to_num(mean) + (1 - weight) * fallback).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an experiment.

    Attributes:
      tallies: of all users.
      before: of the pre-period, for CUPED.
      arm_of: which arm each user belongs to.
      names: of the arms.
      settings: number of bootstrap samples, seed.
    """

    tallies: Tallies
    before: Tallies
    arm_of: Int[np.ndarray, "U"]
    names: Sequence[str]
    settings: Experiment

    def values(self, name: str) -> dict[str, statistics.Estimate]:
        """Metric → its value in an arm."""
        own, options = self._sums(self._users(name)), self._options
        ratios = statistics.bootstrap_ratio(own.numerator, own.denominator, *options)
        shown = self.tallies.explored[self._users(name)]
        distinct = statistics.bootstrap_statistic(shown, statistics.distinct, *options)
        return {**_apart(ratios), DISTINCT: distinct}

    def changes(self, name: str, control: str) -> dict[str, statistics.Estimate]:
        """Metric → its relative change in an arm against another, with CUPED."""
        arms = [self._users(arm) for arm in (name, control)]
        ratios = statistics.compare(*map(self._sums, arms), *self._options)
        shown = (self.tallies.explored[users] for users in arms)
        distinct = statistics.compare_statistic(*shown, statistics.distinct, *self._options)
        return {**_apart(ratios), DISTINCT: distinct}

    def metrics(self, comparisons: Sequence[tuple[str, str]] = ()) -> dict[str, float]:
        """ARM/METRIC of every arm; ARM/METRIC_change against the first one, the control; and
        ARM/METRIC_against_OTHER for further comparisons. All with `_low` and `_high`.

        What can't be told, such as a rate of nothing, is left out.
        """
        control, *others = self.names
        comparisons = [pair for pair in comparisons if set(pair) <= set(self.names)]
        found = {
            f"{name}/{metric}": estimate
            for name in self.names
            for metric, estimate in self.values(name).items()
        }
        for pairs, suffix in ((((name, control) for name in others), "change"), (comparisons, "")):
            for name, other in pairs:
                for metric, estimate in self.changes(name, other).items():
                    found[f"{name}/{metric}_{suffix or f'against_{other}'}"] = estimate
        return {
            f"{key}{end}": float(part)
            for key, estimate in found.items()
            if np.isfinite(estimate).all()
            for part, end in zip(estimate, ("", "_low", "_high"), strict=True)
        }

    @property
    def _options(self) -> tuple[int, int]:
        return self.settings.bootstrap_samples, self.settings.seed

    def _users(self, name: str) -> Bool[np.ndarray, "U"]:
        return self.arm_of == self.names.index(name)

    def _sums(self, users: Bool[np.ndarray, "U"]) -> statistics.Sums:
        sides = (
            np.stack([tallies.ratio(metric)[side][users] for metric in METRICS], axis=1)
            for tallies in (self.tallies, self.before)
            for side in (0, 1)
        )
        return statistics.Sums(*sides)


def _apart(estimates: statistics.Estimate) -> dict[str, statistics.Estimate]:
    return {
        metric: statistics.Estimate(*(float(part[place]) for part in estimates))
        for place, metric in enumerate(METRICS)
    }


def run(
    scene: Scene,
    arms: Mapping[str, Arm],
    settings: Experiment,
    progress: Callable[..., None],
) -> "Outcome":
    """Lives through the experiment.

    Args:
      scene: where it begins; it is at the experiment's end afterwards.
      arms: by name.
      settings: how long, and what may be explored.
      progress: called as progress(days done, all).
    """
    random = np.random.default_rng([settings.seed, 4])
    arm_of = statistics.assign(
        np.arange(len(scene.standing.last)), len(arms), f"arms {settings.seed}"
    )
    tallies = scene.tallies()
    for day in range(settings.num_days):
        users = scene.platform.arrive()
        histories = scene.standing.histories(users)
        allowed = scene.standing.allowed(
            users, novel_to=settings.novel_to, cool_down=settings.cool_down
        )
        ready = (histories >= 0) & allowed.any(axis=1)
        clusters = np.full(len(users), -1)
        asked: dict[str, tuple[np.ndarray, Asked]] = {}
        for number, (name, arm) in enumerate(arms.items()):
            rows = np.flatnonzero(ready & (arm_of[users] == number))
            if len(rows):
                asked[name] = rows, Asked(histories[rows], allowed[rows])
                clusters[rows] = arm.choose(asked[name][1], random)
        items = pick_items(clusters, scene.item_clusters, scene.item_weights(), random)
        lived = scene.live(tallies, items, settings.suppression)
        explored = lived.source == EXPLORATION
        watch = np.full(len(scene.standing.last), np.nan)
        watch[lived.users[explored]] = lived.watch_fraction[explored]
        for name, (rows, question) in asked.items():
            arms[name].learn(question, clusters[rows], watch[users[rows]])
        progress(day + 1, settings.num_days)
    return Outcome(tallies, scene.before, arm_of, tuple(arms), settings)


def same_treatment(scene: Scene, splits: int) -> dict[str, float]:
    """METRIC: how often an interval leaves out zero when users are split in two for nothing.

    It is 0.05 if intervals are what they say. The pre-period is compared, without CUPED.

    Args:
      scene: whose pre-period.
      splits: ways to split.
    """
    users = np.arange(len(scene.standing.last))
    salts = [f"same {split}" for split in range(splits)]
    found = {}
    for metric in _CALIBRATED:
        rate = statistics.false_positive_rate(
            statistics.Sums(*scene.before.ratio(metric)), users, salts, samples=200
        )
        for part, end in zip(rate, ("", "_low", "_high"), strict=True):
            found[f"{metric}{end}"] = float(part)
    return found


def pick_items(
    clusters: Int[np.ndarray, "A"],
    item_clusters: Int[np.ndarray, "I"],
    weights: Float[np.ndarray, "I"],
    random: np.random.Generator,
) -> Int[np.ndarray, "A"]:
    """An item of each cluster, drawn in proportion to the items' weights; -1 for cluster -1."""
    order = np.argsort(item_clusters, kind="stable")
    cumulative = np.concatenate([[0.0], np.cumsum(weights[order], dtype=np.float64)])
    bounds = np.searchsorted(item_clusters[order], np.arange(item_clusters.max() + 2))
    low, high = cumulative[bounds[clusters]], cumulative[bounds[clusters + 1]]
    picks = low + random.random(len(clusters)) * (high - low)
    places = np.searchsorted(cumulative, picks, side="right") - 1
    places = np.clip(places, bounds[clusters], np.maximum(bounds[clusters + 1] - 1, 0))
    return np.where((clusters >= 0) & (high > low), order[places], -1)
