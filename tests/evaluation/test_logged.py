"""Values of policies on a log with propensities, against the simulated platform's truth."""

import functools

import ibis
import numpy as np
import pyarrow as pa
import pytest

from recexplore.errors import InputError
from recexplore.evaluation import arms, logged, off_policy
from recexplore.feedback import transitions
from recexplore.interactions.schema import check_log
from recexplore.simulation.log import as_log
from recexplore.simulation.platform import Platform
from recexplore.simulation.world import Settings, read_topics

TOPICS = len(read_topics()[0])
PLAIN = dict(position_bias=0.0, popularity_bias=0.0, freshness_bias=0.0, boredom=0.0)
DAYS, FIRST = 7, 4


@functools.cache
def platform_log(seed):
    """The world, its log and clusters, and when the last days begin; every topic is a cluster.

    Nothing but taste and item moves a user here, so that `World.satisfaction` is the truth.
    """
    settings = Settings(
        num_users=120, num_items=300, exploration_share=0.5, new_item_share=0.3, seed=seed, **PLAIN
    )
    platform = Platform(settings)
    days = [platform.show() for _ in range(DAYS)]
    log = check_log(as_log(platform.world, days, seed=0))
    items = log.items.to_pyarrow()["item_id"].to_pylist()
    topics = platform.world.item_topics[[int(item[1:]) for item in items]]
    clusters = pa.table({"item_id": items, "cluster_id": pa.array(topics, pa.int32())})
    start = int(days[FIRST].timestamp.min())
    return platform.world, log.interactions.to_pyarrow(), clusters, start


def impressions_of(world_seed, **options):
    _, interactions, clusters, start = platform_log(world_seed)
    options = {"start": start, "history_length": 2, **options}
    return logged.read_impressions(interactions, clusters, TOPICS, **options)


def offered(seed):
    _, interactions, clusters, start = platform_log(seed)
    tables = ibis.memtable(interactions), ibis.memtable(clusters)
    return transitions.items_shown_before(*tables, start).to_pyarrow()["item_id"].to_pylist()


def favourites(asked):
    """A policy that likes some clusters more, by their number, and the history's neighbours."""
    liking = np.exp(np.sin(np.arange(TOPICS)[None] + asked.histories[:, None]))
    liking = liking * asked.allowed
    return liking / liking.sum(axis=1, keepdims=True)


def truth(seed, found, policy):
    """What the policy is worth in the very contexts of the impressions."""
    world = platform_log(seed)[0]
    weights = np.zeros(len(world.item_topics))
    weights[[int(item[1:]) for item in offered(seed)]] = 1.0
    by_topic = np.nan_to_num(world.cluster_satisfaction(world.item_topics, TOPICS, weights))
    users = np.array([int(user[1:]) for user in found.log.users])
    return float((policy(found.asked) * by_topic[users]).sum(axis=1).mean())


@pytest.mark.parametrize("policy", [arms.random_novel, favourites])
def test_estimates_are_unbiased_for_the_platforms_truth(policy):
    feedback = np.random.default_rng(0).random(TOPICS)  # no good model is needed
    errors, naive, held = [], [], 0
    seeds = range(12)
    for seed in seeds:
        found = impressions_of(seed)
        value, right = logged.value(found, policy, feedback), truth(seed, found, policy)
        estimates = value.inverse_propensity, value.self_normalised, value.doubly_robust
        errors.append([estimate.value - right for estimate in estimates])
        naive.append(found.log.rewards.mean() - right)
        held += value.self_normalised.low <= right <= value.self_normalised.high
    errors = np.array(errors)
    spread = errors.std(axis=0, ddof=1) / np.sqrt(len(seeds))
    assert (np.abs(errors.mean(axis=0)) < 3.5 * spread).all(), (errors.mean(axis=0), spread)
    assert (3.5 * spread < 0.6 * np.mean(naive)).all()  # what is shown is no estimate
    assert held >= 9


def test_weights_have_the_mean_one():
    """Whatever the policy, and whatever else is logged: that is what a propensity is."""
    found = [impressions_of(seed) for seed in range(8)]
    ones = [
        logged.value(each._replace(log=each.log._replace(rewards=np.ones(len(each.shares)))),
                     arms.random_novel, np.zeros(TOPICS), samples=2).inverse_propensity.value
        for each in found
    ]  # fmt: skip
    assert np.mean(ones) == pytest.approx(1.0, abs=4 * np.std(ones) / np.sqrt(8))


def test_a_row_weighs_what_the_policy_makes_of_it_over_the_propensity():
    found = impressions_of(0)
    shown = set(offered(0))
    _, interactions, clusters, start = platform_log(0)
    cluster_of = dict(zip(*(clusters[name].to_pylist() for name in clusters.schema.names),
                          strict=True))  # fmt: skip
    sizes = np.bincount([cluster_of[item] for item in shown], minlength=TOPICS)
    rows = interactions.to_pandas().sort_values(["user_id", "timestamp", "item_id"])
    chosen = favourites(found.asked)
    above, place = 0.0, 0
    for _, events in rows.groupby("user_id", sort=True):
        seen, engaged = set(), []
        for event in events.itertuples():
            if event.timestamp >= start and len(engaged) >= 2:
                assert found.histories[found.asked.histories[place]] == engaged[-2:]
                assert set(np.flatnonzero(~found.asked.allowed[place])) == seen | set(
                    np.flatnonzero(sizes == 0)
                )
                cluster = cluster_of[event.item_id]
                if event.item_id in shown:
                    chance = chosen[place, cluster] / sizes[cluster]
                    above += chance / event.propensity * event.watch_fraction
                place += 1
            cluster = cluster_of[event.item_id]
            seen.add(cluster)
            if not event.skipped:
                engaged = [c for c in engaged if c != cluster] + [cluster]
    assert place == len(found.shares)
    value = logged.value(found, favourites, np.zeros(TOPICS), samples=2)
    assert value.inverse_propensity.value == pytest.approx(above / place)


def test_contexts_are_taken_some_at_a_time(monkeypatch):
    found = impressions_of(0)
    feedback = np.linspace(0, 1, TOPICS)
    whole = logged.value(found, favourites, feedback, samples=5)
    monkeypatch.setattr(logged, "_ENTRIES", 100 * TOPICS)
    parts = logged.value(found, favourites, feedback, samples=5)
    assert parts.doubly_robust == pytest.approx(whole.doubly_robust)


def test_a_sample_of_users_keeps_all_that_they_were_shown():
    everyone, some = impressions_of(0), impressions_of(0, num_users=30, seed=3)
    assert len(set(some.log.users)) <= 30
    rows = np.isin(everyone.log.users, some.log.users)
    np.testing.assert_array_equal(some.log.rewards, everyone.log.rewards[rows])


def test_all_policies_are_distributions_over_what_is_new():
    found = impressions_of(1)
    random = np.random.default_rng(0)
    shape = (len(found.histories), TOPICS)
    log_p = np.log(random.dirichlet(np.ones(TOPICS), shape[0]))
    scores = random.normal(size=shape)
    made = arms.model_policies(log_p, scores, sample_counts=(5, 20), relevance_weight=1.0)
    names = "random_novel novelty_only best_of_5 best_of_20 alignment_only exhaustive"
    assert list(made) == names.split()
    for policy in made.values():
        chosen = policy(found.asked)
        assert chosen.sum(axis=1) == pytest.approx(np.ones(len(chosen)))
        assert (chosen[~found.asked.allowed] == 0).all()


def test_metrics_leave_out_what_cannot_be_told():
    known, unknown = off_policy.Estimate(0.3, 0.2, 0.4), off_policy.Estimate(*[float("nan")] * 3)
    found = logged.value_metrics("a", off_policy.Value(known, unknown, None, 5.0))
    assert found == {
        "a/off_policy_ips": 0.3,
        "a/off_policy_ips_low": 0.2,
        "a/off_policy_ips_high": 0.4,
        "a/off_policy_ess": 5.0,
    }


def test_a_missing_propensity_is_noticed_in_the_period_only():
    _, interactions, _, start = platform_log(0)
    assert logged.has_propensities(interactions, start)
    assert not logged.has_propensities(interactions, 1 << 40)  # nothing there
    place = interactions.schema.get_field_index("propensity")
    for late in (False, True):
        times = interactions["timestamp"].to_numpy()
        some = np.flatnonzero((times >= start) == late)[:1]
        values = interactions["propensity"].to_pylist()
        values[some[0]] = None
        table = interactions.set_column(place, "propensity", pa.array(values, pa.float32()))
        assert logged.has_propensities(table, start) is not late


def test_a_period_without_anyone_who_has_a_history_is_an_error():
    with pytest.raises(InputError, match="The log is empty"):
        impressions_of(0, history_length=TOPICS + 1)
