"""How users take what they are shown, and whether they come back."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int
from scipy import special

from recexplore.simulation.world import Settings, World, logistic_

SKIPPED = 0.1  # watch fraction below which an item counts as skipped
PLAYED = 0.5  # watch fraction from which on an item counts as played
_LIKE_FROM, _LIKE_RATE, _SHARE_RATE = 0.3, 0.6, 0.15
_FRESH_DAYS = 7.0
_MEMORY = 0.7  # how much of the contentment with earlier pages stays after one more


class Draws(NamedTuple):
    """Random numbers behind a day's reactions, for each user and slot: uniform but for `watches`.

    Attributes:
      looks: whether the item is looked at.
      watches: how long; exponentially distributed.
      likes: whether it is liked.
      shares: whether what is liked is shared.
    """

    looks: Float32[np.ndarray, "A S"]
    watches: Float32[np.ndarray, "A S"]
    likes: Float32[np.ndarray, "A S"]
    shares: Float32[np.ndarray, "A S"]


class Reactions(NamedTuple):
    """What users do with their pages.

    Attributes:
      watch_fraction: 0 where the item isn't looked at.
      liked: only what is watched.
      shared: only what is liked.
      skipped: not looked at, or hardly.
      satisfaction: the mean that watch_fraction was drawn from, all effects included.
    """

    watch_fraction: Float32[np.ndarray, "A S"]
    liked: Bool[np.ndarray, "A S"]
    shared: Bool[np.ndarray, "A S"]
    skipped: Bool[np.ndarray, "A S"]
    satisfaction: Float32[np.ndarray, "A S"]


class Behaviour:
    """Users with what changes about them: views they are tired of and how content they are.

    An item is looked at with a probability that falls with its place. The watch fraction of one
    that is looked at has density a·x^(a-1), where log a is the taste for its topic, plus the item's
    appeal, plus what popularity (beside the average item's) and freshness add, less boredom. Its
    mean is a / (1 + a), the logistic function of log a; and x = exp(-E / a) with E exponentially
    distributed, so that one number drawn for each user and slot decides, and a better item is
    watched longer for sure.

    Args:
      settings: how strong the effects are.
      world: what is true about users and items.
    """

    def __init__(self, settings: Settings, world: World):
        self._settings = settings
        self._world = world
        self._views = np.zeros(world.tastes.shape, np.float32)  # fading; by user and topic
        self._contentment = world.expectation.copy()
        self._plays = np.zeros(len(world.item_topics))

    def coming(self) -> Float32[np.ndarray, "U"]:
        """Probability that each user comes today."""
        surprise = self._contentment - self._world.expectation
        effect = np.float32(self._settings.return_effect)
        return special.expit(self._world.activity + effect * surprise)

    def react(
        self, users: Int[np.ndarray, "A"], items: Int[np.ndarray, "A S"], day: int, draws: Draws
    ) -> Reactions:
        """Users go through their pages from top to bottom.

        Args:
          users: who is there, each once.
          items: their pages.
          day: which decides what is fresh.
          draws: where chance comes from.
        """
        satisfaction = np.empty(items.shape, np.float32)
        watch = np.empty(items.shape, np.float32)
        tastes, views = self._world.tastes.ravel(), self._views.ravel()
        appeal = self._item_effects(day)
        self._views *= np.float32(self._settings.boredom_decay)
        for slot, look in enumerate(self._settings.looked_at):
            shown = items[:, slot]
            flat = users * self._world.tastes.shape[1] + self._world.item_topics[shown]
            tired = np.float32(self._settings.boredom) * np.log1p(views[flat])
            logits = tastes[flat] + appeal[shown] - tired
            looked = draws.looks[:, slot] < look
            watch[:, slot] = looked * np.exp(-draws.watches[:, slot] * np.exp(-logits))
            satisfaction[:, slot] = look * logistic_(logits)
            views[flat] += looked
        self._remember(users, items, watch)
        skipped = watch < SKIPPED
        liked = draws.likes < _LIKE_RATE * np.maximum(watch - _LIKE_FROM, 0)
        shared = liked & (draws.shares < _SHARE_RATE)
        return Reactions(watch, liked, shared, skipped, satisfaction)

    def _item_effects(self, day: int) -> Float32[np.ndarray, "I"]:
        """What each item adds to tastes today: its appeal, popularity and freshness."""
        world, settings = self._world, self._settings
        popularity = np.log1p(self._plays)
        popularity /= max(popularity.max(), 1.0)
        popularity -= popularity[world.uploaded(day)].mean()
        fresh = np.exp(-np.maximum(day - world.upload_days, 0) / _FRESH_DAYS)
        effects = settings.popularity_bias * popularity + settings.freshness_bias * fresh
        return world.item_appeal + effects.astype(np.float32)

    def _remember(self, users, items, watch) -> None:
        page = watch.mean(axis=1)
        self._contentment[users] = _MEMORY * self._contentment[users] + (1 - _MEMORY) * page
        played = items[watch >= PLAYED]
        self._plays += np.bincount(played, minlength=len(self._plays))
