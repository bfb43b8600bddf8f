"""An A/B experiment on the simulated platform: arms that differ in what fills one slot.

The platform's days of the log are lived through again, from the same seed, so that the experiment
goes on where the log ended. Then every user belongs to one arm, by a hash of their id. All arms
share the platform, its production recommender and the item recommender that turns a cluster into an
item.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from recexplore.errors import check_field
from recexplore.evaluation import statistics
from recexplore.evaluation.arms import Arm, Asked
from recexplore.evaluation.standing import Standing
from recexplore.evaluation.tallies import METRICS, Tallies
from recexplore.simulation.platform import EXPLORATION, Day, Platform
from recexplore.simulation.world import Settings

NOVEL_TO = ("user", "history")
DISTINCT = "distinct_clusters"  # explored in an arm
SAME = "same_treatment"  # users split in two although nothing differs
_OURS = "best_of_20"
RIVALS = (
    "control",
    "random_novel",
    "popular_novel",
    "markov",
    "bandit",
    "novelty_only",
    "alignment_only",
    "exhaustive",
    "policy_gradient",
)
CLAIMS = tuple((_OURS, rival) for rival in RIVALS)
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
        counts = self.sample_counts
        listed = isinstance(counts, list | tuple) and all(type(n) is int and n >= 1 for n in counts)
        for field, ok, rule in (
            ("num_days", self.num_days >= 1, "must be at least 1"),
            ("sample_counts", counts and listed, "must list whole numbers from 1 on"),
            ("novel_to", self.novel_to in NOVEL_TO, f"must be one of {', '.join(NOVEL_TO)}"),
            ("cool_down", self.cool_down >= 0, "must be at least 0"),
            ("suppression", 0 <= self.suppression < 1, "must lie in 0..1, below 1"),
            ("bootstrap_samples", self.bootstrap_samples >= 100, "must be at least 100"),
        ):
            check_field(self, bool(ok), field, rule)


class EndOfDay(NamedTuple):
    """Users at the end of a day.

    Attributes:
      users: who.
      histories: their histories' codes.
      new: clusters that they never engaged with.
    """

    users: Int[np.ndarray, "R"]
    histories: Int[np.ndarray, "R"]
    new: Bool[np.ndarray, "R M"]


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
      visits: everyone with a whole history at the end of each day of the log's second half.
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
        self.before: Tallies | None = None
        self.impressions = 0
        self.visits: list[EndOfDay] = []
        for day in range(log_days):
            if day == max(log_days - pre_period, 0):
                self.before = self.tallies()
            users = self.platform.arrive()
            self.impressions += len(self.live(self.before).users)
            if 2 * day >= log_days - 1:
                codes = self.standing.histories(users)
                users, codes = users[codes >= 0], codes[codes >= 0]
                self.visits.append(EndOfDay(users, codes, self.standing.engaged[users] == 0))
            if progress:
                progress(day + 1, log_days)

    def tallies(self) -> Tallies:
        """Empty ones, from here on."""
        return Tallies(len(self.standing.last), self.standing.engaged, self._slot)

    def live(
        self,
        tallies: Tallies | None,
        items: Int[np.ndarray, "A"] | None = None,
        suppression: float = 0.0,
    ) -> Day:
        """Shows a day to those who have arrived and takes it in.

        Args:
          tallies: that it counts for.
          items: see `Platform.show`.
          suppression: likewise.
        """
        day = self.platform.show(items, suppression=suppression)
        novelty = self.standing.follow(day)
        if tallies:
            tallies.add(day, novelty, self.standing.engaged)
        return day

    def item_weights(self) -> Float[np.ndarray, "I"]:
        """How often the item recommender takes each item of a cluster today, beside its others: by
        popularity, as production does within a topic."""
        day = self.platform.day
        popularity = self.platform.recommender.popularity(day)
        return np.exp(popularity / _ITEM_TEMPERATURE) * self.platform.world.uploaded(day)

    def ask(
        self, users: Int[np.ndarray, "A"], settings: Experiment, least: int = 1
    ) -> tuple[Int[np.ndarray, "B"], Asked]:
        """Who of some users can be asked to explore today: those with a whole history.

        A cluster is allowed that is new to the user and has something to show.

        Args:
          users: whom to consider.
          settings: what is new.
          least: clusters that must be allowed.

        Returns:
          Rows of `users`, and what these are asked.
        """
        histories = self.standing.histories(users)
        allowed = self.standing.allowed(
            users, novel_to=settings.novel_to, cool_down=settings.cool_down
        )
        uploaded = self.platform.world.uploaded(self.platform.day)
        allowed &= np.bincount(self.item_clusters[uploaded], minlength=self.num_clusters) > 0
        rows = np.flatnonzero((histories >= 0) & (allowed.sum(axis=1) >= least))
        return rows, Asked(histories[rows], allowed[rows])

    def satisfaction(self) -> Float[np.ndarray, "U M"]:
        """The truth: every user's expected satisfaction with each cluster's items."""
        return self.platform.world.cluster_satisfaction(
            self.item_clusters, self.num_clusters, self.item_weights()
        )


def truth_of_histories(
    scene: Scene, history_length: int, novel_to: str = "user"
) -> Float[np.ndarray, "H M"]:
    """Expected satisfaction with each cluster, averaged over the users who have a history and to
    whom the cluster may be shown.

    For n such visits with mean m, and mean t over all visits with the same last cluster:
    (n m + 5 t) / (n + 5); so where hardly anyone is, the last cluster alone says what is known.
    Rows by `history_code`.

    Args:
      scene: of users other than those of the experiment, lest the truth know them personally.
      history_length: K.
      novel_to: as in `Experiment`: 'user' averages over those who never engaged with the cluster.
    """
    size = scene.num_clusters
    satisfaction = np.nan_to_num(scene.satisfaction())
    total = np.zeros((size**history_length, size))
    count = np.zeros_like(total)
    for visits in scene.visits:
        wanted = visits.new if novel_to == "user" else np.ones_like(visits.new)
        places = np.argsort(visits.histories, kind="stable")
        codes, starts = np.unique(visits.histories[places], return_index=True)
        wanted = wanted[places]
        values = satisfaction[visits.users[places]] * wanted
        total[codes] += np.add.reduceat(values, starts, axis=0)
        count[codes] += np.add.reduceat(wanted.astype(np.float64), starts, axis=0)
    last = np.arange(len(total)) % size
    by_last, of_last = np.zeros((size, size)), np.zeros((size, size))
    np.add.at(by_last, last, total)
    np.add.at(of_last, last, count)
    overall = total.sum(axis=0) / np.maximum(count.sum(axis=0), 1)
    fallback = np.where(of_last > 0, by_last / np.maximum(of_last, 1), overall)[last]
    return ((total + _MODEST * fallback) / (count + _MODEST)).astype(np.float32)


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
        shown = self._shown(name)
        distinct = statistics.bootstrap_statistic(shown, statistics.distinct, *options)
        return {**_apart(ratios), DISTINCT: distinct}

    def changes(self, name: str, control: str) -> dict[str, statistics.Estimate]:
        """Metric → its relative change in an arm against another, with CUPED."""
        arms = [self._users(arm) for arm in (name, control)]
        ratios = statistics.compare(*map(self._sums, arms), *self._options)
        shown = map(self._shown, (name, control))
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

    def _shown(self, name: str) -> Int[np.ndarray, "U M"]:
        """How often each cluster was explored; by an arm that doesn't, what stood in the slot."""
        users = self._users(name)
        explored = self.tallies.explored[users]
        return explored if explored.any() else self.tallies.in_slot[users]

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
        ready, everyone = scene.ask(users, settings)
        clusters = np.full(len(users), -1)
        asked: dict[str, tuple[np.ndarray, Asked]] = {}
        for number, (name, arm) in enumerate(arms.items()):
            own = arm_of[users[ready]] == number
            if own.any():
                asked[name] = ready[own], Asked(*(column[own] for column in everyone))
                clusters[ready[own]] = arm.choose(asked[name][1], random)
        items = pick_items(clusters, scene.item_clusters, scene.item_weights(), random)
        lived = scene.live(tallies, items, settings.suppression)
        explored = lived.source == EXPLORATION
        watch = np.full(len(scene.standing.last), np.nan)
        watch[lived.users[explored]] = lived.watch_fraction[explored]
        for name, (rows, question) in asked.items():
            arms[name].learn(question, clusters[rows], watch[users[rows]])
        progress(day + 1, settings.num_days)
    return Outcome(tallies, scene.before, arm_of, tuple(arms), settings)


def same_treatment(outcome: Outcome, splits: int) -> dict[str, float]:
    """METRIC: how often an interval leaves out zero when users are split in two for nothing.

    It is 0.05 if intervals are what they say. All users' pre-period is compared as it is; and, as
    METRIC_adjusted, the experiment's time of the users of the first arm with CUPED, as arms are.

    Args:
      outcome: of an experiment.
      splits: ways to split.
    """
    everyone = np.arange(len(outcome.arm_of))
    alike = outcome.arm_of == 0
    salts = [f"same {split}" for split in range(splits)]
    found = {}
    for metric in _CALIBRATED:
        before, now = (tallies.ratio(metric) for tallies in (outcome.before, outcome.tallies))
        compared = {
            metric: (statistics.Sums(*before), everyone),
            f"{metric}_adjusted": (statistics.Sums(*now, *before).of(alike), everyone[alike]),
        }
        for name, (sums, users) in compared.items():
            rate = statistics.false_positive_rate(sums, users, salts, samples=200)
            for part, end in zip(rate, ("", "_low", "_high"), strict=True):
                found[f"{name}{end}"] = float(part)
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
    most = max(item_clusters.max(), clusters.max(initial=0))
    bounds = np.searchsorted(item_clusters[order], np.arange(most + 2))
    low, high = cumulative[bounds[clusters]], cumulative[bounds[clusters + 1]]
    picks = low + random.random(len(clusters)) * (high - low)
    places = np.searchsorted(cumulative, picks, side="right") - 1
    places = np.clip(places, bounds[clusters], np.maximum(bounds[clusters + 1] - 1, 0))
    return np.where((clusters >= 0) & (high > low), order[places], -1)
