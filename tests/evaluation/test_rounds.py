"""Explore by plan, log, learn, explore better: three rounds on the simulated platform."""

import collections

import ibis
import numpy as np
import pytest
from scipy.special import logit

from recexplore.evaluation import rounds, statistics
from recexplore.evaluation.standing import ENGAGED
from recexplore.feedback import transitions
from recexplore.serving.exploration import Exploration
from recexplore.serving.item_recommender import Ranked
from recexplore.serving.planner import Budget, Planner
from recexplore.simulation.platform import EXPLORATION
from recexplore.simulation.world import Settings

SETTINGS = Settings(num_users=3000, num_items=1200, exploration_share=0.02, seed=3)
BUDGET = Budget(temperature=0.15, item_temperature=1.0, num_items=3)
LOG_DAYS, DAYS = 6, 4
PRIOR = 0.25, 20.0  # a mean watch fraction, and how many impressions it counts for


class AnyItem:
    """Ranks a cluster's items by their number."""

    def __init__(self, item_clusters):
        self.item_ids = [f"v{item}" for item in range(len(item_clusters))]
        self._of = [np.flatnonzero(item_clusters == c) for c in range(item_clusters.max() + 1)]

    def number(self, item_id):
        return int(item_id[1:])

    def recommend(self, sequences, clusters, count, excluded=()):
        items = np.full((*clusters.shape, count), -1)
        for row, places in enumerate(items):
            left_out = {*sequences[row], *excluded[row]}
            for place, cluster in zip(places, clusters[row], strict=True):
                own = [item for item in self._of[cluster] if item not in left_out] * int(
                    cluster >= 0
                )
                place[: len(own)] = own[:count]
        return Ranked(items, np.where(items >= 0, 0.0, -np.inf))


def learned(living, item_clusters):
    """What the whole log says of moving into a cluster after another: shrunk means of feedback on
    novel transitions, by the same code that makes the models' training rows."""
    interactions = living.log().interactions
    clusters = ibis.memtable(
        {
            "item_id": [f"v{i}" for i in range(len(item_clusters))],
            "cluster_id": item_clusters.astype(np.int32),
        }
    )
    splits = transitions.split_times(interactions, train_share=0.98, validation_share=0.01)
    moves = transitions.novel_transitions(interactions, clusters, splits, max_history=2)
    table = moves.to_pyarrow()
    size = item_clusters.max() + 1
    last = np.array([history[-1] if history else -1 for history in table["history"].to_pylist()])
    known = last >= 0
    pair = last[known] * size + table["next_cluster"].to_numpy()[known]
    watched = table["watch_fraction"].to_numpy()[known]
    into = pair % size
    mean, strength = PRIOR
    by_target = (np.bincount(into, watched, size) + mean * strength) / (
        np.bincount(into, minlength=size) + strength
    )
    total = np.bincount(pair, watched, size * size).reshape(size, size)
    count = np.bincount(pair, minlength=size * size).reshape(size, size)
    means = (total + strength * by_target) / (count + strength)

    def look_up(history, banned=()):
        value = logit(means[history[-1]] if history else by_target)
        value[[*history, *banned]] = -np.inf
        best = np.argsort(-value, kind="stable")[:5].tolist()
        return Exploration(best, value[best].tolist(), [0.0] * 5, [1.0] * 5, "history")

    return look_up


@pytest.fixture(scope="module")
def three_rounds():
    living = rounds.LivingPlatform(SETTINGS, LOG_DAYS)
    clusters = living.platform.world.item_topics
    item_clusters = {f"v{item}": int(cluster) for item, cluster in enumerate(clusters)}

    def planner(look_up):
        return Planner(look_up, AnyItem(clusters), item_clusters, BUDGET)

    first = planner(learned(living, clusters))
    planners = [planner(rounds.random_look_up(int(clusters.max()) + 1)), first, first]
    arm_of = np.array([0, 1, 2, 2])[statistics.assign(np.arange(SETTINGS.num_users), 4, "arms")]
    found = []
    for _ in range(3):
        explored = living.live(DAYS, planners, arm_of, lambda *_: None)
        found.append(rounds.estimates(explored, arm_of, ("random", "first", "latest"), 200, 0))
        planners[2] = planner(learned(living, clusters))
    return living, found


def test_satisfaction_rises_from_round_to_round(three_rounds):
    _, found = three_rounds
    gains = [metrics["latest/satisfaction_against_first"] for metrics in found]
    assert abs(gains[0]) < 0.05  # the same table, other users
    assert gains[2] > gains[0] + 0.03
    assert found[2]["latest/satisfaction_against_first_low"] > 0
    assert found[2]["latest/satisfaction"] > found[0]["latest/satisfaction"]
    for metrics in found:
        assert metrics["first/satisfaction_against_random_low"] > 0


def test_the_log_has_everyones_propensities(three_rounds):
    living, _ = three_rounds
    table = living.log().interactions.to_pyarrow()
    assert table["propensity"].null_count == 0
    explored = np.array(table["policy"].to_pylist()) == "exploration"
    assert explored.sum() > 0.5 * SETTINGS.num_users * DAYS
    propensities = table["propensity"].to_numpy()[explored]
    assert 0 < propensities.min() < propensities.max() <= 1


def test_nobody_is_explored_with_what_they_know_or_twice_in_a_week(three_rounds):
    living, _ = three_rounds
    topics = living.platform.world.item_topics
    engaged, offered = collections.defaultdict(set), collections.defaultdict(dict)
    items_met = collections.defaultdict(set)
    for number, day in enumerate(living.days):
        explored = day.source == EXPLORATION
        for user, item in zip(day.users[explored], day.items[explored], strict=True):
            topic = topics[item]
            assert topic not in engaged[user] and item not in items_met[user]
            assert number - offered[user].get(topic, -100) >= 7
            offered[user][topic] = number
        for user, item, watched, skipped in zip(
            day.users, day.items, day.watch_fraction, day.skipped, strict=True
        ):
            items_met[user].add(item)
            if not skipped and watched >= ENGAGED:
                engaged[user].add(topics[item])
