"""A simulated platform's days as a log in the schema."""

from collections.abc import Sequence

import ibis
import numpy as np
import pyarrow as pa

from recexplore.errors import InputError
from recexplore.interactions.schema import InteractionLog
from recexplore.simulation.platform import POLICIES, Day
from recexplore.simulation.world import World

_NOISE_WORDS = ("video", "today", "best", "new", "part", "live", "first", "story", "easy", "top")


def as_log(world: World, days: Sequence[Day], *, seed: int) -> InteractionLog:
    """Days as a log: user 12 is "u12", item 34 is "v34".

    Args:
      world: whose items they are. All stand in the log, those that come later too, so that it is
        known what they are about on the day they come.
      days: as `Platform.show` gives them.
      seed: of the items' titles and texts.
    """
    users = pa.array([f"u{user}" for user in range(len(world.tastes))])
    items = pa.array(item_ids(len(world.item_topics)))
    tables = [_interactions(day, users, items) for day in days]
    return InteractionLog(
        ibis.memtable(pa.concat_tables(tables)),
        ibis.memtable(_items(world, np.random.default_rng([seed, 3]))),
        source="the simulated platform",
    )


def check_same(counted: int, lived: int, stage: str) -> None:
    """Checks that a platform which lives its days again is the one that a log is of.

    Args:
      counted: interactions of the log.
      lived: impressions of the platform.
      stage: that is to use both; its arguments `platform` and `log_days` say which platform it is.

    Raises:
      InputError: the numbers differ.
    """
    if counted != lived:
        raise InputError(
            f"The log has {counted:,} interactions, but {stage}.platform makes {lived:,} in "
            f"{stage}.log_days. They must be those of the log: bind pipeline.ingest.read_log = "
            "@world.simulate_log and use the same settings."
        )


def _interactions(day: Day, users: pa.Array, items: pa.Array) -> pa.Table:
    propensity = pa.array(day.propensity, mask=np.isnan(day.propensity))
    return pa.table(
        {
            "user_id": users.take(pa.array(day.users)),
            "item_id": items.take(pa.array(day.items)),
            "timestamp": day.timestamp,
            "watch_fraction": day.watch_fraction,
            "liked": day.liked,
            "shared": day.shared,
            "skipped": day.skipped,
            "propensity": propensity,
            "policy": pa.array(POLICIES).take(pa.array(day.source)),
        }
    )


def _items(world: World, random: np.random.Generator) -> pa.Table:
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
    return pa.table({"item_id": item_ids(len(world.item_topics)), "title": titles, "text": texts})


def item_ids(num_items: int) -> list[str]:
    """What the items are called in the log, by number."""
    return [f"v{item}" for item in range(num_items)]
