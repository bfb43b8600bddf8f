"""A small video platform: topics in words, items, users with hidden tastes, days of watching.

What each user would like is known here and nowhere else, so that claims about exploration can be
checked against the truth. Tastes come from a few hidden factors that tie topics of different areas
together: whoever likes one end of a factor likes its topics everywhere, though at first they know
only some of them. That is what collective feedback can find out.
"""

import dataclasses
import json
from importlib import resources

import ibis
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from recexplore.errors import InputError
from recexplore.interactions.schema import InteractionLog
from recexplore.simulation.production_recommender import ProductionRecommender

_DAY = 86_400
_START = 1_700_000_000
_NUM_FACTORS = 8
_NOISE_WORDS = ("video", "today", "best", "new", "part", "live", "first", "story", "easy", "top")


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that is true about a platform.

    Attributes:
      topic_names: two words or so for each of C leaf topics.
      topic_areas: the area of each topic.
      topic_words: words that go with it.
      item_topics: topic of each of I items.
      item_quality: how good an item is, around 0.
      tastes: how much each of U users likes each topic, as a logit.
      known: topics that a user watches from the start.
    """

    topic_names: list[str]
    topic_areas: list[str]
    topic_words: list[list[str]]
    item_topics: Int[np.ndarray, "I"]
    item_quality: Float[np.ndarray, "I"]
    tastes: Float[np.ndarray, "U C"]
    known: Bool[np.ndarray, "U C"]

    def expected_watch(
        self, users: Int[np.ndarray, "B"], topics: Int[np.ndarray, "B"]
    ) -> Float[np.ndarray, "B"]:
        """The truth: mean watch fraction of a user for an item of average quality of a topic."""
        return _logistic(self.tastes[users, topics])


def make_world(
    *, num_users: int = 2000, num_items: int = 4000, topics_per_user: int = 6, seed: int = 0
) -> World:
    """Draws a platform.

    Args:
      num_users: U.
      num_items: I, spread over all topics, more of them in popular ones.
      topics_per_user: how many topics a user watches from the start, on average.
      seed: same seed, same world.

    Raises:
      InputError: fewer than one user, or fewer items than topics.
    """
    names, areas, words = _topics()
    rules = {"num_users": (num_users, 1), "num_items": (num_items, len(names))}
    for name, (value, least) in {**rules, "topics_per_user": (topics_per_user, 1)}.items():
        if value < least:
            raise InputError(f"world.simulate_log.{name} is {value}; it must be at least {least}.")
    random = np.random.default_rng([seed, 1])
    area_ids = np.unique(areas, return_inverse=True)[1]
    topic_factors = random.normal(size=(len(names), _NUM_FACTORS))
    topic_factors += 0.7 * random.normal(size=(area_ids.max() + 1, _NUM_FACTORS))[area_ids]
    user_factors = random.normal(size=(num_users, _NUM_FACTORS))
    appeal = 0.5 * random.normal(size=len(names))
    affinity = user_factors @ topic_factors.T / np.sqrt(_NUM_FACTORS)
    tastes = -0.6 + appeal + 1.1 * affinity + 0.4 * random.normal(size=affinity.shape)
    # Known interests are a random part of what a user likes: the rest lies dormant.
    luck = random.gumbel(size=tastes.shape)
    order = np.argsort(-(1.5 * tastes + 1.5 * luck), axis=1)
    count = 1 + random.poisson(topics_per_user - 1, size=num_users)
    known = np.zeros(tastes.shape, bool)
    for user in range(num_users):
        known[user, order[user, : max(2, count[user])]] = True
    share = np.exp(0.8 * appeal + 0.3 * random.normal(size=len(names)))
    extra = random.choice(len(names), num_items - len(names), p=share / share.sum())
    item_topics = np.sort(np.concatenate([np.arange(len(names)), extra]))
    quality = 0.5 * random.normal(size=num_items)
    return World(names, areas, words, item_topics, quality, tastes, known)


def simulate_log(
    *,
    num_users: int = 2000,
    num_items: int = 4000,
    num_days: int = 14,
    slots_per_day: int = 8,
    exploration_share: float = 0.15,
    topics_per_user: int = 6,
    seed: int = 0,
) -> InteractionLog:
    """Days of watching on a platform whose recommender learns from its own log.

    Every day each active user gets `slots_per_day` items: most from topics they have watched, by
    what the production recommender learnt up to the day before, a small share at random over all
    items. Propensities and the policy of each slot are logged.

    Args:
      num_users: users on the platform.
      num_items: items on the platform.
      num_days: length of the log.
      slots_per_day: items shown to an active user on a day.
      exploration_share: part of the slots filled at random.
      topics_per_user: topics that a user watches from the start, on average.
      seed: of everything.

    Returns:
      A log in the schema, of about num_users × num_days × slots_per_day × 0.7 interactions.

    Raises:
      InputError: an argument out of range.
    """
    for name, ok in {
        "num_days": num_days >= 1,
        "slots_per_day": slots_per_day >= 1,
        "exploration_share": 0 < exploration_share < 1,
    }.items():
        if not ok:
            raise InputError(f"world.simulate_log.{name} is {locals()[name]}, out of range.")
    world = make_world(
        num_users=num_users, num_items=num_items, topics_per_user=topics_per_user, seed=seed
    )
    random = np.random.default_rng([seed, 2])
    recommender = ProductionRecommender(
        world.item_topics, world.known, exploration_share=exploration_share
    )
    activity = random.beta(5, 2, size=num_users)
    days = []
    for day in range(num_days):
        active = np.flatnonzero(random.random(num_users) < activity)
        shown = recommender.fill_slots(active, slots_per_day, random)
        columns = _react(world, shown, random)
        start = _START + day * _DAY + random.integers(0, _DAY // 2, size=num_users)
        columns["timestamp"] = start[shown.users] + shown.slots * 180
        recommender.learn(shown.users, shown.items, columns["watch_fraction"])
        days.append(pa.table(columns))
    return InteractionLog(
        ibis.memtable(pa.concat_tables(days)),
        ibis.memtable(_items(world, np.random.default_rng([seed, 3]))),
        source="the simulated platform",
    )


def _react(world: World, shown, random) -> dict[str, np.ndarray]:
    """How users take what they are shown."""
    topics = world.item_topics[shown.items]
    logit = world.tastes[shown.users, topics] + world.item_quality[shown.items]
    mean = _logistic(logit)
    watch = random.beta(6 * mean + 0.2, 6 * (1 - mean) + 0.2)
    liked = random.random(len(watch)) < 0.6 * np.clip(watch - 0.3, 0, 1)
    shared = liked & (random.random(len(watch)) < 0.15)
    skipped = watch < 0.2
    return {
        "user_id": np.char.add("u", shown.users.astype(str)),
        "item_id": np.char.add("v", shown.items.astype(str)),
        "watch_fraction": watch.astype(np.float32),
        "liked": liked & ~skipped,
        "shared": shared & ~skipped,
        "skipped": skipped,
        "propensity": shown.propensities.astype(np.float32),
        "policy": np.where(shown.explored, "random", "production"),
    }


def _items(world: World, random) -> pa.Table:
    """Titles and texts: words of the topic and its area, and some that mean nothing."""
    titles, texts = [], []
    for topic in world.item_topics:
        words = world.topic_words[topic]
        picked = random.choice(words, size=2, replace=False)
        noise = random.choice(_NOISE_WORDS, size=2, replace=False)
        titles.append(f"{picked[0]} {picked[1]} {noise[0]}")
        more = random.choice(words, size=min(3, len(words)), replace=False)
        texts.append(
            f"{world.topic_areas[topic]} {world.topic_names[topic]} {' '.join(more)} {noise[1]}"
        )
    ids = [f"v{item}" for item in range(len(world.item_topics))]
    return pa.table({"item_id": ids, "title": titles, "text": texts})


def _topics() -> tuple[list[str], list[str], list[list[str]]]:
    text = resources.files(__package__).joinpath("topics.json").read_text(encoding="utf-8")
    rows = [
        (name, area, words)
        for area, topics in json.loads(text).items()
        for name, words in topics.items()
    ]
    names, areas, words = (list(column) for column in zip(*rows, strict=True))
    return names, areas, words


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
