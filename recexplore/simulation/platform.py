"""A simulated platform, day by day: who comes, what is shown, how they take it, what is learnt."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8, Int64

from recexplore.errors import InputError
from recexplore.simulation import behaviour, production_recommender
from recexplore.simulation.world import Settings, make_world

PRODUCTION, RANDOM, EXPLORATION = 0, 1, 2
POLICIES = ("production", "random", "exploration")
_ARRIVALS, _SESSIONS, _PAGES, _REACTIONS = range(4, 8)  # what chance is for; 1 to 3: the world
_START = 1_700_000_000  # seconds since 1970
_DAY = 86_400
_SECONDS_PER_SLOT = 180


class Day(NamedTuple):
    """What happened on a day, a row for each impression, by user and slot.

    Attributes:
      users: who.
      slots: place on the page, from 0.
      items: what.
      watch_fraction: 0 where it wasn't looked at.
      liked: given by the user.
      shared: the same.
      skipped: not looked at, or hardly.
      propensity: probability with which this item came into this slot, either way production could
        have put it there; nan where exploration did.
      source: PRODUCTION, RANDOM or EXPLORATION.
      timestamp: seconds since 1970.
      satisfaction: the truth: mean of the watch fraction, all effects included.
    """

    users: Int[np.ndarray, "R"]
    slots: Int[np.ndarray, "R"]
    items: Int[np.ndarray, "R"]
    watch_fraction: Float32[np.ndarray, "R"]
    liked: Bool[np.ndarray, "R"]
    shared: Bool[np.ndarray, "R"]
    skipped: Bool[np.ndarray, "R"]
    propensity: Float32[np.ndarray, "R"]
    source: Int8[np.ndarray, "R"]
    timestamp: Int64[np.ndarray, "R"]
    satisfaction: Float32[np.ndarray, "R"]


class Platform:
    """The platform. `arrive` says who comes today; `show` makes the day happen.

    Chance has a generator for each purpose and day, and a number for each user and slot whether or
    not that user comes. So a user who gets the same page in the same state does the same, whatever
    is shown to others or was shown elsewhere.

    Args:
      settings: what the platform is like.
      population: another number gives other users of the same topics and items.

    Attributes:
      settings: as given.
      world: what is true.
      recommender: production's, as trained on all days so far.
      day: number of days done.
    """

    def __init__(self, settings: Settings, population: int = 0):
        self.settings = settings
        self.world = make_world(settings, population)
        self.recommender = production_recommender.ProductionRecommender(
            self.world, settings.exploration_share
        )
        self.day = 0
        self._population = population
        self._behaviour = behaviour.Behaviour(settings, self.world)

    @property
    def known(self) -> Bool[np.ndarray, "U C"]:
        """Topics that users know by now: those known from the start and those really watched."""
        return self.recommender.met

    @property
    def now(self) -> int:
        """When today begins, in seconds since 1970."""
        return _START + self.day * _DAY

    def arrive(self) -> Int64[np.ndarray, "A"]:
        """Who comes today, ascending."""
        chance = self._random(_ARRIVALS).random(self.settings.num_users, np.float32)
        return np.flatnonzero(chance < self._behaviour.coming())

    def show(
        self, exploration: Int[np.ndarray, "A"] | None = None, suppression: float = 0.0
    ) -> Day:
        """A day: pages are filled and looked at, and the recommender learns from it.

        Args:
          exploration: an item for each user that `arrive` gives, which replaces production's in the
            page's `exploration_slot`; -1 for none. None: none for anyone.
          suppression: part of these that the final ranker throws out again, those of the lowest
            watch fraction that the production recommender predicts.

        Returns:
          All impressions.

        Raises:
          InputError: an item that isn't there, or not yet; a number of items that isn't that of
            users; a share that is none.
        """
        users = self.arrive()
        draws = production_recommender.Draws(*self._per_slot(_PAGES, users, 3, np.float64))
        pages = self.recommender.fill(users, self.day, draws)
        source = np.where(pages.at_random, np.int8(RANDOM), np.int8(PRODUCTION))
        if exploration is not None:
            self._check(users, exploration, suppression)
            rows = self._kept(users, exploration, suppression)
            slot = self.settings.exploration_slot
            pages.items[rows, slot] = exploration[rows]
            pages.propensities[rows, slot] = np.nan
            source[rows, slot] = EXPLORATION
        draws = behaviour.Draws(*self._per_slot(_REACTIONS, users, 4, np.float32))
        draws = draws._replace(watches=-np.log1p(-draws.watches))
        reactions = self._behaviour.react(users, pages.items, self.day, draws)
        self.recommender.learn(users, pages.items, reactions.watch_fraction)
        slots = np.arange(self.settings.slots_per_day)
        timestamp = self._when(users)
        self.day += 1
        return Day(
            users=np.repeat(users, len(slots)),
            slots=np.tile(slots, len(users)),
            items=pages.items.ravel(),
            watch_fraction=reactions.watch_fraction.ravel(),
            liked=reactions.liked.ravel(),
            shared=reactions.shared.ravel(),
            skipped=reactions.skipped.ravel(),
            propensity=pages.propensities.ravel(),
            source=source.ravel(),
            timestamp=timestamp.ravel(),
            satisfaction=reactions.satisfaction.ravel(),
        )

    def _random(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, purpose, self._population, self.day])

    def _per_slot(self, purpose, users, kinds, dtype) -> Float[np.ndarray, "N A S"]:
        """Uniform numbers for each of `users` and slot, of several kinds."""
        shape = (self.settings.num_users, self.settings.slots_per_day)
        random = self._random(purpose)
        return np.stack([random.random(shape, dtype)[users] for _ in range(kinds)])

    def _when(self, users) -> Int64[np.ndarray, "A S"]:
        """Pages begin in the first half of the day and end before it does."""
        slots = self.settings.slots_per_day
        begin = self._random(_SESSIONS).integers(0, _DAY // 2, self.settings.num_users)[users]
        seconds = min(_SECONDS_PER_SLOT, _DAY // 2 // slots)
        return _START + self.day * _DAY + begin[:, None] + seconds * np.arange(slots)

    def _kept(self, users, exploration, suppression) -> Int[np.ndarray, "E"]:
        """Rows whose exploration item the final ranker lets through."""
        rows = np.flatnonzero(exploration >= 0)
        predicted = self.recommender.predict(users[rows], exploration[rows], self.day)
        order = np.argsort(predicted, kind="stable")
        return rows[order[round(suppression * len(rows)) :]]

    def _check(self, users, exploration, suppression) -> None:
        where = "platform.Platform.show"
        if len(exploration) != len(users):
            raise InputError(
                f"{where}.exploration has {len(exploration)} items; it must have one, or -1, for "
                f"each of the {len(users)} users who came on day {self.day}."
            )
        if not 0 <= suppression <= 1:
            raise InputError(f"{where}.suppression is {suppression}; it must be between 0 and 1.")
        asked = exploration[exploration >= 0]
        if asked.max(initial=-1) >= self.settings.num_items:
            raise InputError(
                f"{where}.exploration names item {asked.max()}; there are "
                f"{self.settings.num_items}, counted from 0."
            )
        early = asked[~self.world.uploaded(self.day)[asked]]
        if len(early):
            raise InputError(
                f"{where}.exploration names item {early[0]} on day {self.day}; it can be shown "
                f"from day {self.world.upload_days[early[0]]} on."
            )
