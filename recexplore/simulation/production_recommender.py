"""The platform's own recommender: it shows what it has seen work, and so sees little else."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from recexplore.simulation.behaviour import PLAYED
from recexplore.simulation.world import World

_TOPIC_TEMPERATURE, _ITEM_TEMPERATURE = 0.2, 0.1
_FIRST_WATCH = 0.6  # what is assumed of one watch of each topic known before the log
_PRIOR = 0.4, 20.0  # mean watch fraction and how many watches that counts for, of a topic
_TOPIC_STRENGTH = 2.0  # watches that a topic's mean counts for in a user's affinity
_ITEM_STRENGTH = 10.0  # watches that the prior counts for in an item's popularity
_FRESH = 0.1  # what is added to the prior of an item uploaded today
_FRESH_DAYS = 7.0


class Draws(NamedTuple):
    """Uniform numbers behind a day's pages, for each user and slot.

    Attributes:
      policies: whether the slot is filled at random.
      topics: which topic, if not.
      items: which of its items, or of all items.
    """

    policies: Float[np.ndarray, "A S"]
    topics: Float[np.ndarray, "A S"]
    items: Float[np.ndarray, "A S"]


class Pages(NamedTuple):
    """What is shown on a day, a row for each user.

    Attributes:
      items: what.
      propensities: probability with which this item came into this slot.
      at_random: whether the slot was filled at random.
    """

    items: Int[np.ndarray, "A S"]
    propensities: Float32[np.ndarray, "A S"]
    at_random: Bool[np.ndarray, "A S"]


class ProductionRecommender:
    """Topic affinity by user, popularity by item, both learnt from its own log day by day.

    Each slot on its own is filled uniformly at random over all items with probability
    `exploration_share`; otherwise a topic is drawn in proportion to exp(affinity / 0.2) among those
    that the user has met, and one of its items in proportion to exp(popularity / 0.1). Affinity is
    the user's mean watch fraction of a topic, shrunk to everyone's; popularity is an item's mean
    watch fraction, shrunk to its topic's, and a bit above that for new items. A topic is met when
    one of its items has been played.

    All that it learns from is kept as counts and sums, so that taking in a day is the same as
    training on the whole log anew.

    Args:
      world: topics and days of upload of its items, and what users know before the log begins;
        nothing else is looked at.
      exploration_share: part of the slots filled at random.

    Attributes:
      met: topics that each user has really watched by now.
    """

    def __init__(self, world: World, exploration_share: float):
        self.met = world.known.copy()
        self._item_topics = world.item_topics
        self._upload_days = world.upload_days
        self._exploration_share = exploration_share
        num_topics = world.known.shape[1]
        self._first_items = np.searchsorted(world.item_topics, np.arange(num_topics + 1))
        self._count = world.known.astype(np.float32)  # by user and topic
        self._sum = np.float32(_FIRST_WATCH) * self._count
        self._item_count = np.zeros(len(world.item_topics))
        self._item_sum = np.zeros(len(world.item_topics))

    def fill(self, users: Int[np.ndarray, "A"], day: int, draws: Draws) -> Pages:
        """Chooses the items of a day's pages.

        Args:
          users: who is there.
          day: which decides what is uploaded.
          draws: where chance comes from.
        """
        item_odds, uploaded = self._item_odds(day), np.flatnonzero(self._upload_days <= day)
        topics, totals = self._draw_topics(users, draws.topics)
        items = self._draw_items(topics, item_odds, draws.items)
        at_random = draws.policies < self._exploration_share
        anything = uploaded[(draws.items[at_random] * len(uploaded)).astype(np.int64)]
        items[at_random] = anything
        topics = self._item_topics[items]
        flat = users[:, None] * self.met.shape[1] + topics
        odds = np.where(self.met.ravel()[flat], self._topic_weights(flat, topics), 0)
        share = self._exploration_share
        propensities = share / len(uploaded) + (1 - share) * odds / totals * item_odds[items]
        return Pages(items, propensities.astype(np.float32), at_random)

    def learn(
        self,
        users: Int[np.ndarray, "A"],
        items: Int[np.ndarray, "A S"],
        watch_fraction: Float[np.ndarray, "A S"],
    ) -> None:
        """Takes in a day's log, whoever filled its slots."""
        watched = watch_fraction.ravel()
        flat = (users[:, None] * self.met.shape[1] + self._item_topics[items]).ravel()
        np.add.at(self._count.ravel(), flat, np.float32(1))
        np.add.at(self._sum.ravel(), flat, watched)
        self.met.ravel()[flat[watched >= PLAYED]] = True
        num_items = len(self._item_topics)
        self._item_count += np.bincount(items.ravel(), minlength=num_items)
        self._item_sum += np.bincount(items.ravel(), watched, num_items)

    def popularity(self, day: int) -> Float[np.ndarray, "I"]:
        """Estimated mean watch fraction of each item, over everyone it is shown to."""
        age = np.maximum(day - self._upload_days, 0)
        prior = self._topic_means()[self._item_topics] + _FRESH * np.exp(-age / _FRESH_DAYS)
        return (self._item_sum + _ITEM_STRENGTH * prior) / (self._item_count + _ITEM_STRENGTH)

    def predict(
        self, users: Int[np.ndarray, "B"], items: Int[np.ndarray, "B"], day: int
    ) -> Float[np.ndarray, "B"]:
        """Estimated watch fraction: the user's affinity, and how the item stands in its topic."""
        topics = self._item_topics[items]
        affinity = self._affinity(users * self.met.shape[1] + topics, topics)
        return affinity + self.popularity(day)[items] - self._topic_means()[topics]

    def _topic_means(self) -> Float[np.ndarray, "C"]:
        mean, strength = _PRIOR
        total = np.bincount(self._item_topics, self._item_sum) + mean * strength
        return total / (np.bincount(self._item_topics, self._item_count) + strength)

    def _affinity(self, flat: np.ndarray, topics: np.ndarray) -> np.ndarray:
        prior = (_TOPIC_STRENGTH * self._topic_means()).astype(np.float32)[topics]
        return (self._sum.ravel()[flat] + prior) / (self._count.ravel()[flat] + _TOPIC_STRENGTH)

    def _topic_weights(self, flat: np.ndarray, topics: np.ndarray) -> np.ndarray:
        return np.exp(self._affinity(flat, topics) / np.float32(_TOPIC_TEMPERATURE))

    def _draw_topics(self, users, draws) -> tuple[Int[np.ndarray, "A S"], Float[np.ndarray, "A 1"]]:
        """A topic for each slot, and the sum of the weights it was drawn from, for each user."""
        met = self.met[users]
        rows, topics = np.nonzero(met)
        weights = self._topic_weights(users[rows] * met.shape[1] + topics, topics)
        # All users' weights stand in one line; a draw is a place in a user's part of it.
        line = np.cumsum(weights, dtype=np.float64)
        ends = line[np.cumsum(np.count_nonzero(met, axis=1)) - 1]
        starts = np.concatenate([[0.0], ends[:-1]])
        totals = (ends - starts)[:, None]
        places = starts[:, None] + draws * totals
        return topics[np.searchsorted(line, places, side="right")], totals

    def _item_odds(self, day: int) -> Float[np.ndarray, "I"]:
        """Probability of each item within its topic."""
        weights = np.exp(self.popularity(day) / _ITEM_TEMPERATURE) * (self._upload_days <= day)
        return weights / np.bincount(self._item_topics, weights)[self._item_topics]

    def _draw_items(self, topics, item_odds, draws) -> Int[np.ndarray, "A S"]:
        line = np.concatenate([[0.0], np.cumsum(item_odds)])
        starts, ends = line[self._first_items[:-1]], line[self._first_items[1:]]
        places = starts[topics] + draws * (ends - starts)[topics]
        return np.searchsorted(line[1:], places, side="right")
