"""A small video platform: topics in words, items, users with hidden tastes, days of watching.

What each user would like is known here and nowhere else, so that claims about exploration can be
checked against the truth. Tastes come from a few hidden factors that tie topics of different areas
together: whoever likes one end of a factor likes its topics everywhere, though at first they know
only some of them. That is what collective feedback can find out.

How users behave is told in `simulation/behaviour.py`, who shows them what in
`simulation/production_recommender.py`, and a day from morning to night in `simulation/platform.py`.
"""

import dataclasses
import functools
import json
from importlib import resources

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import sparse, special

from recexplore.errors import InputError, check_field
from recexplore.interactions.schema import InteractionLog

UPLOAD_DAYS = 30  # items that are new during the log come on days 1 to 30
LIKED, DISLIKED = 0.5, 0.2  # mean watch fractions from which on, and up to which
_OLDEST = 90  # days before the log at which the oldest items were uploaded
_NUM_FACTORS = 8
_MEAN_TASTE = -1.4
_SHARPNESS = 1.1  # how much a taste counts for being known already, against luck
_QUALITY_SPREAD = 0.5
_LENGTH_EFFECT = 0.25  # of the watch fraction's logit, lost with every doubling of length or so
_MEDIAN_LENGTH, _LENGTH_SPREAD = 75.0, 0.7  # seconds; logarithm's standard deviation
_CHUNK = 1024  # users at once in cluster_satisfaction: what fits in cache


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a platform is like. Two platforms with the same settings are the same.

    Attributes:
      num_users: U.
      num_items: I, spread over all topics, more of them in popular ones.
      slots_per_day: items on the page of a user who comes.
      exploration_share: part of the slots filled uniformly at random over all items.
      exploration_slot: place, counted from 0, whose item exploration replaces.
      topics_per_user: how many topics a user watches from the start, on average.
      new_item_share: part of the items uploaded during the first 30 days.
      position_bias: place s is looked at with probability (1 + s) ** -position_bias.
      popularity_bias: how much the logit of the watch fraction rises from an item that nobody plays
        to the one most played.
      freshness_bias: how much that logit rises for an item uploaded today.
      boredom: what that logit loses by a topic: boredom · log(1 + views of it so far), where views
        fade.
      boredom_decay: part of the views that count a day later.
      return_effect: how much the logit of coming back rises with one unit of recent watch fraction
        above what the user expects.
      seed: of everything.

    Raises:
      InputError: a setting out of range.
    """

    num_users: int = 2000
    num_items: int = 4000
    slots_per_day: int = 8
    exploration_share: float = 0.1
    exploration_slot: int = 2
    topics_per_user: int = 6
    new_item_share: float = 0.2
    position_bias: float = 0.08
    popularity_bias: float = 0.3
    freshness_bias: float = 0.2
    boredom: float = 0.6
    boredom_decay: float = 0.7
    return_effect: float = 3.0
    seed: int = 0

    def __post_init__(self):
        num_topics = len(read_topics()[0])
        least = {
            "num_users": 1,
            "num_items": num_topics,
            "slots_per_day": 1,
            "exploration_slot": 0,
            "topics_per_user": 1,
            "position_bias": 0,
            "popularity_bias": 0,
            "freshness_bias": 0,
            "boredom": 0,
            "return_effect": 0,
            "seed": 0,
        }
        for name, bound in least.items():
            check_field(self, getattr(self, name) >= bound, name, f"must be at least {bound}")
        for name in ("exploration_share", "new_item_share", "boredom_decay"):
            check_field(self, 0 <= getattr(self, name) <= 1, name, "must be between 0 and 1")
        slots, topics = self.slots_per_day, self.topics_per_user
        below = f"must be below slots_per_day, which is {slots}"
        check_field(self, self.exploration_slot < slots, "exploration_slot", below)
        all_topics = f"must be at most {num_topics}, all topics"
        check_field(self, topics <= num_topics, "topics_per_user", all_topics)
        spare = 1 - num_topics / self.num_items
        rule = f"must be at most {spare:.3g}, as an item of each topic is there from the start"
        check_field(self, self.new_item_share <= spare, "new_item_share", rule)

    @property
    def looked_at(self) -> Float32[np.ndarray, "S"]:
        """Probability that the item in a place of the page is looked at."""
        places = np.arange(self.slots_per_day, dtype=np.float32)
        return (1 + places) ** np.float32(-self.position_bias)


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that is true about a platform before its first day.

    Attributes:
      topic_names: two words or so for each of C leaf topics.
      topic_areas: the area of each topic.
      topic_words: words that go with it.
      item_topics: topic of each of I items, ascending.
      item_quality: how good an item is, as a logit around 0.
      item_lengths: seconds.
      upload_days: the day on which an item can be shown first; up to 0 for those there from the
        start.
      tastes: how much each of U users likes each topic, as a logit.
      known: topics that a user watches from the start.
      activity: logit of coming on a day, of a user who gets what they expect.
      expectation: mean watch fraction of a page that they are used to.
    """

    topic_names: list[str]
    topic_areas: list[str]
    topic_words: list[list[str]]
    item_topics: Int[np.ndarray, "I"]
    item_quality: Float32[np.ndarray, "I"]
    item_lengths: Float32[np.ndarray, "I"]
    upload_days: Int[np.ndarray, "I"]
    tastes: Float32[np.ndarray, "U C"]
    known: Bool[np.ndarray, "U C"]
    activity: Float32[np.ndarray, "U"]
    expectation: Float32[np.ndarray, "U"]

    @property
    def liked(self) -> Bool[np.ndarray, "U C"]:
        """Topics of whose average item a user watches half or more, known or not."""
        return self.tastes >= float(special.logit(LIKED))

    @property
    def dormant(self) -> Bool[np.ndarray, "U C"]:
        """Topics that a user doesn't know yet and would like if they were ever shown."""
        return self.liked & ~self.known

    @property
    def disliked(self) -> Bool[np.ndarray, "U C"]:
        """Topics of whose average item a user watches a fifth or less."""
        return self.tastes <= float(special.logit(DISLIKED))

    @functools.cached_property
    def item_appeal(self) -> Float32[np.ndarray, "I"]:
        """What an item adds to the taste for its topic: quality, less what its length costs."""
        length = np.log(self.item_lengths / _MEDIAN_LENGTH) / _LENGTH_SPREAD
        return (self.item_quality - _LENGTH_EFFECT * length).astype(np.float32)

    def uploaded(self, day: int) -> Bool[np.ndarray, "I"]:
        """Items that can be shown on a day."""
        return self.upload_days <= day

    def satisfaction(
        self, users: Int[np.ndarray, "*B"], items: Int[np.ndarray, "*B"]
    ) -> Float32[np.ndarray, "*B"]:
        """The truth: mean watch fraction of an item that a user looks at with fresh eyes.

        Neither boredom nor the place on the page nor the item's popularity or freshness is in it.

        Args:
          users: who.
          items: what, for each of them.
        """
        return special.expit(self.tastes[users, self.item_topics[items]] + self.item_appeal[items])

    def cluster_satisfaction(
        self,
        item_clusters: Int[np.ndarray, "I"],
        num_clusters: int,
        item_weights: Float[np.ndarray, "I"] | None = None,
    ) -> Float32[np.ndarray, "U M"]:
        """The truth by cluster: mean `satisfaction` of every user with each cluster's items.

        Args:
          item_clusters: cluster of each item, whatever the clusters are; -1 for none.
          num_clusters: M.
          item_weights: how much an item counts within its cluster, not negative; None: all alike.

        Returns:
          Means; nan for a cluster without items (or whose items weigh nothing).
        """
        weights = np.ones(len(item_clusters)) if item_weights is None else item_weights
        items = np.flatnonzero((item_clusters >= 0) & (weights > 0))
        clusters, weights = item_clusters[items], weights[items].astype(np.float32)
        total = np.bincount(clusters, weights, minlength=num_clusters)
        entries = (weights / total[clusters]).astype(np.float32)
        mean = sparse.csr_array(
            (entries, (clusters, np.arange(len(items)))), shape=(num_clusters, len(items))
        )
        topics, appeal = self.item_topics[items], self.item_appeal[items, None]
        satisfaction = np.empty((len(self.tastes), num_clusters), np.float32)
        for start in range(0, len(self.tastes), _CHUNK):
            tastes = np.ascontiguousarray(self.tastes[start : start + _CHUNK].T)
            logits = tastes[topics]
            logits += appeal
            satisfaction[start : start + _CHUNK] = (mean @ logistic_(logits)).T
        satisfaction[:, total == 0] = np.nan
        return satisfaction


def make_world(settings: Settings, population: int = 0) -> World:
    """Draws a platform.

    Args:
      settings: what it is like.
      population: another number gives other users of the same topics and items.
    """
    names, areas, words = read_topics()
    random = np.random.default_rng([settings.seed, 1])
    area_ids = np.unique(areas, return_inverse=True)[1]
    factors = random.normal(size=(len(names), _NUM_FACTORS))
    factors += 0.7 * random.normal(size=(area_ids.max() + 1, _NUM_FACTORS))[area_ids]
    appeal = 0.5 * random.normal(size=len(names))
    topics, quality, lengths, upload_days = _draw_items(settings, appeal, random)
    random = np.random.default_rng([settings.seed, 2, population])
    tastes = _draw_tastes(settings.num_users, factors, appeal, random)
    known = _draw_known(tastes, settings.topics_per_user, random)
    activity = special.logit(random.beta(5, 2.5, size=settings.num_users))
    expectation = _expectation(settings, tastes, known)
    return World(
        names,
        areas,
        words,
        topics,
        quality,
        lengths,
        upload_days,
        tastes,
        known,
        activity.astype(np.float32),
        expectation,
    )


def history_satisfaction(
    satisfaction: Float[np.ndarray, "N M"],
    history_ids: Int[np.ndarray, "R"],
    num_histories: int,
    *,
    users: Int[np.ndarray, "R"] | None = None,
) -> tuple[Float32[np.ndarray, "H M"], Int[np.ndarray, "H"]]:
    """The truth of any history and cluster: mean satisfaction of the users who have that history.

    Args:
      satisfaction: by cluster, a row for each of `history_ids`; with `users`, one for each user.
      history_ids: a history, for each of R users (or the moments at which they have it).
      num_histories: H.
      users: whose history it is, as rows of `satisfaction`.

    Returns:
      Means, nan for a history that nobody has; and how many rows each is of.
    """
    rows = np.arange(len(history_ids)) if users is None else users
    members = sparse.coo_array(
        (np.ones(len(rows)), (history_ids, rows)), shape=(num_histories, len(satisfaction))
    ).tocsr()
    count = np.bincount(history_ids, minlength=num_histories)
    mean = (members @ satisfaction) / np.where(count > 0, count, np.nan)[:, None]
    return mean.astype(np.float32), count


def simulate_log(settings: Settings, num_days: int = 14) -> InteractionLog:
    """Days of watching on a platform whose recommender learns from its own log.

    Every day each user who comes gets `slots_per_day` items: most from topics they have watched, by
    what the production recommender learnt up to the day before, a small share at random over all
    items. Propensities and the policy of each slot are logged.

    Args:
      settings: what the platform is like.
      num_days: length of the log.

    Returns:
      A log in the schema, of about num_users × num_days × slots_per_day × 0.65 interactions.

    Raises:
      InputError: `num_days` below 1.
    """
    from recexplore.simulation import log, platform  # they stand on this module

    if num_days < 1:
        raise InputError(f"world.simulate_log.num_days is {num_days}; it must be at least 1.")
    simulated = platform.Platform(settings)
    days = [simulated.show() for _ in range(num_days)]
    return log.as_log(simulated.world, days, seed=settings.seed)


@functools.cache
def read_topics() -> tuple[list[str], list[str], list[list[str]]]:
    """Names, areas and words of all topics."""
    text = resources.files(__package__).joinpath("topics.json").read_text(encoding="utf-8")
    rows = [
        (name, area, words)
        for area, topics in json.loads(text).items()
        for name, words in topics.items()
    ]
    names, areas, words = (list(column) for column in zip(*rows, strict=True))
    return names, areas, words


def logistic_(logits: Float32[np.ndarray, "*B"]) -> Float32[np.ndarray, "*B"]:
    """The logistic function, in place: three times as fast as scipy's."""
    np.negative(logits, out=logits)
    np.exp(logits, out=logits)
    logits += 1
    return np.reciprocal(logits, out=logits)


def _draw_items(settings: Settings, appeal: np.ndarray, random: np.random.Generator):
    """Topic, quality, length and day of upload of each item."""
    num_items, num_topics = settings.num_items, len(appeal)
    share = np.exp(0.8 * appeal + 0.3 * random.normal(size=num_topics))
    extra = random.choice(num_topics, num_items - num_topics, p=share / share.sum())
    topics = np.concatenate([np.arange(num_topics), extra])
    order = np.argsort(topics, kind="stable")
    quality = _QUALITY_SPREAD * random.normal(size=num_items)
    lengths = _MEDIAN_LENGTH * np.exp(_LENGTH_SPREAD * random.normal(size=num_items))
    upload_days = random.integers(1 - _OLDEST, 1, size=num_items)
    new = int(settings.new_item_share * num_items)
    later = num_topics + random.permutation(num_items - num_topics)[:new]  # not a topic's first
    upload_days[later] = random.integers(1, UPLOAD_DAYS + 1, size=new)
    return topics[order], quality.astype(np.float32), lengths.astype(np.float32), upload_days[order]


def _draw_tastes(num_users: int, factors, appeal, random) -> Float32[np.ndarray, "U C"]:
    users = random.standard_normal((num_users, _NUM_FACTORS), np.float32)
    tastes = users @ (1.1 / np.sqrt(_NUM_FACTORS) * factors.T).astype(np.float32)
    tastes += (_MEAN_TASTE + appeal).astype(np.float32)
    tastes += np.float32(0.4) * random.standard_normal(tastes.shape, np.float32)
    return tastes


def _draw_known(tastes, topics_per_user: int, random) -> Bool[np.ndarray, "U C"]:
    """Known interests are a random part of what a user likes: the rest lies dormant."""
    luck = random.standard_exponential(tastes.shape, np.float32)
    keys = -np.log(np.maximum(luck, np.finfo(np.float32).tiny))  # Gumbel
    keys += np.float32(_SHARPNESS) * tastes
    count = 1 + random.poisson(topics_per_user - 1, size=len(tastes))
    count = np.clip(count, 2, tastes.shape[1])
    bound = np.take_along_axis(np.sort(keys, axis=1), tastes.shape[1] - count[:, None], axis=1)
    return keys >= bound


def _expectation(settings: Settings, tastes, known) -> Float32[np.ndarray, "U"]:
    """Mean watch fraction of a page of known interests, with the usual share at random."""
    mean = logistic_(tastes.copy())
    of_known = (mean * known).sum(axis=1) / known.sum(axis=1)
    share = settings.exploration_share
    page = (1 - share) * of_known + share * mean.mean(axis=1)
    return (settings.looked_at.mean() * page).astype(np.float32)
