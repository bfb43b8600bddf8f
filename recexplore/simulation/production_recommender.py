"""The platform's own recommender: it shows what it has seen work, and so sees little else."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Shown(NamedTuple):
    """What was shown on a day, a row for each slot.

    Attributes:
      users: who.
      slots: the how-manieth item of the day.
      items: what.
      propensities: probability with which this item came into this slot.
      explored: whether the slot was filled at random.
    """

    users: Int[np.ndarray, "R"]
    slots: Int[np.ndarray, "R"]
    items: Int[np.ndarray, "R"]
    propensities: Float[np.ndarray, "R"]
    explored: Bool[np.ndarray, "R"]


class ProductionRecommender:
    """Topic affinity by user, popularity by item, both learnt from its own log day by day.

    A slot is filled at random with probability `exploration_share`; otherwise a topic is drawn in
    proportion to exp(affinity / temperature) among those the user has watched, and one of its items
    in proportion to its popularity.

    Args:
      item_topics: topic of each item.
      known: topics that a user watched before the log begins.
      exploration_share: part of the slots filled at random.
      temperature: of the draw of topics.
    """

    def __init__(
        self,
        item_topics: Int[np.ndarray, "I"],
        known: Bool[np.ndarray, "U C"],
        *,
        exploration_share: float,
        temperature: float = 0.25,
    ):
        self._item_topics = item_topics
        self._exploration_share = exploration_share
        self._temperature = temperature
        num_topics = known.shape[1]
        self._of_topic = item_topics[None, :] == np.arange(num_topics)[:, None]
        self._watched = known.astype(np.float64)  # number of watches, one for each known topic
        self._sum = 0.6 * known  # sum of their watch fractions
        self._item_watched = np.ones(len(item_topics))
        self._item_sum = np.full(len(item_topics), 0.5)

    def fill_slots(
        self, users: Int[np.ndarray, "A"], slots: int, random: np.random.Generator
    ) -> Shown:
        """Chooses items for all slots of a day.

        Args:
          users: who is there.
          slots: items for each.
          random: source of the draws.
        """
        rows = np.repeat(users, slots)
        topic_odds = self._topic_probabilities(users)
        item_odds = self._item_probabilities()
        topics = _draw(np.repeat(topic_odds, slots, axis=0), random)
        cumulative = np.cumsum(item_odds, axis=1)
        picks = random.random(len(rows))[:, None] * cumulative[topics, -1:]
        items = (cumulative[topics] < picks).sum(axis=1)
        explored = random.random(len(rows)) < self._exploration_share
        at_random = random.integers(len(self._item_topics), size=len(rows))
        items = np.where(explored, at_random, np.minimum(items, len(self._item_topics) - 1))
        chosen_topics = self._item_topics[items]
        by_policy = np.repeat(topic_odds, slots, axis=0)[np.arange(len(rows)), chosen_topics]
        by_policy = by_policy * item_odds[chosen_topics, items]
        share = self._exploration_share
        propensities = share / len(self._item_topics) + (1 - share) * by_policy
        return Shown(rows, np.tile(np.arange(slots), len(users)), items, propensities, explored)

    def learn(
        self,
        users: Int[np.ndarray, "R"],
        items: Int[np.ndarray, "R"],
        watch_fraction: Float[np.ndarray, "R"],
    ) -> None:
        """Takes in a day's log."""
        topics = self._item_topics[items]
        # A topic enters a user's repertoire once something of it was really watched.
        liked_enough = (watch_fraction > 0.5) | (self._watched[users, topics] > 0)
        np.add.at(self._watched, (users[liked_enough], topics[liked_enough]), 1.0)
        np.add.at(
            self._sum, (users[liked_enough], topics[liked_enough]), watch_fraction[liked_enough]
        )
        np.add.at(self._item_watched, items, 1.0)
        np.add.at(self._item_sum, items, watch_fraction)

    def _topic_probabilities(self, users: np.ndarray) -> Float[np.ndarray, "A C"]:
        watched, total = self._watched[users], self._sum[users]
        affinity = (total + 0.5) / (watched + 1.0)
        weights = np.where(watched > 0, np.exp(affinity / self._temperature), 0.0)
        return weights / weights.sum(axis=1, keepdims=True)

    def _item_probabilities(self) -> Float[np.ndarray, "C I"]:
        popularity = self._item_sum / self._item_watched
        weights = np.where(self._of_topic, popularity[None, :] ** 2, 0.0)
        return weights / weights.sum(axis=1, keepdims=True)


def _draw(probabilities: Float[np.ndarray, "R C"], random: np.random.Generator) -> np.ndarray:
    cumulative = np.cumsum(probabilities, axis=1)
    picks = random.random(len(probabilities))[:, None] * cumulative[:, -1:]
    return np.minimum((cumulative < picks).sum(axis=1), probabilities.shape[1] - 1)
