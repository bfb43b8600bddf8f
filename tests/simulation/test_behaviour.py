"""Each effect on users' reactions, against the formulas that it is made of."""

import numpy as np
import pytest
from scipy import special, stats

from recexplore.simulation import behaviour
from recexplore.simulation.behaviour import Behaviour
from recexplore.simulation.platform import Platform
from recexplore.simulation.world import Settings, make_world

NO_EFFECTS = {
    "position_bias": 0.0,
    "popularity_bias": 0.0,
    "freshness_bias": 0.0,
    "boredom": 0.0,
    "return_effect": 0.0,
}
SIZES = {"num_users": 500, "num_items": 300, "new_item_share": 0.1}


def users_of(**effects):
    settings = Settings(**SIZES, **{**NO_EFFECTS, **effects})
    world = make_world(settings)
    return world, Behaviour(settings, world)


def draws(shape, seed=0):
    random = np.random.default_rng(seed)
    looks, likes, shares = random.random((3, *shape), np.float32)
    watches = random.standard_exponential(shape, np.float32)
    return behaviour.Draws(looks, watches, likes, shares)


def logits_of_one_item(users, world, item, day=0):
    """Everyone gets the same item in all slots: logit of the mean of each watch fraction."""
    everyone = np.arange(len(world.tastes))
    pages = np.full((len(everyone), 8), item)
    reactions = users.react(everyone, pages, day, draws(pages.shape, seed=day))
    return special.logit(reactions.satisfaction.astype(float))


def truth_of_one_item(world, item):
    return (world.tastes[:, world.item_topics[item]] + world.item_appeal[item])[:, None]


def test_without_effects_reactions_are_draws_around_the_truth():
    settings = Settings(**SIZES, **NO_EFFECTS, exploration_share=1.0)
    platform = Platform(settings)
    day = platform.show()
    truth = platform.world.satisfaction(day.users, day.items).astype(float)
    np.testing.assert_allclose(day.satisfaction, truth, rtol=1e-4)
    # x has density a·x^(a-1) and mean a / (1 + a), so x^a is uniform.
    uniform = day.watch_fraction.astype(float) ** (truth / (1 - truth))
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert np.array_equal(day.skipped, day.watch_fraction < 0.1)


def test_the_truth_of_clusters_is_what_random_slots_show():
    settings = Settings(**{**SIZES, "num_users": 2000}, **NO_EFFECTS, exploration_share=1.0)
    platform = Platform(settings)
    clusters = np.random.default_rng(0).integers(0, 6, 300)
    uploaded = platform.world.uploaded(0)
    truth = platform.world.cluster_satisfaction(clusters, 6, uploaded.astype(float))
    day = platform.show()
    of_impression = clusters[day.items]
    for cluster in range(6):
        rows = of_impression == cluster
        errors = day.watch_fraction[rows] - truth[day.users[rows], cluster]
        assert abs(errors.mean()) < 4 * stats.sem(errors)
        assert stats.sem(errors) < 0.01


def test_a_place_is_looked_at_as_often_as_it_should_be():
    world, users = users_of(position_bias=0.5)
    favourites = np.searchsorted(world.item_topics, world.tastes.argmax(axis=1))
    pages = np.tile(favourites[:, None], (1, 8))
    seen = np.zeros(8)
    for day in range(20):
        reactions = users.react(np.arange(500), pages, day, draws(pages.shape, seed=day))
        looked = reactions.watch_fraction > 0
        assert reactions.skipped[~looked].all() and not reactions.liked[~looked].any()
        seen += looked.sum(axis=0)
    expected = (1 + np.arange(8.0)) ** -0.5
    error = np.sqrt(expected * (1 - expected) / 10_000)
    assert (np.abs(seen / 10_000 - expected) <= 4 * error).all()
    truth = world.satisfaction(np.arange(500), favourites)
    np.testing.assert_allclose(reactions.satisfaction, np.outer(truth, expected), rtol=1e-4)


def test_boredom_grows_along_the_page_and_fades_by_the_day():
    world, users = users_of(boredom=0.5, boredom_decay=0.6)
    truth = truth_of_one_item(world, 7)
    first = logits_of_one_item(users, world, 7) - truth
    np.testing.assert_allclose(first, np.tile(-0.5 * np.log1p(np.arange(8)), (500, 1)), atol=1e-3)
    second = logits_of_one_item(users, world, 7, day=1) - truth
    np.testing.assert_allclose(second[:, 0], np.full(500, -0.5 * np.log1p(8 * 0.6)), atol=1e-3)
    other = 299
    assert world.item_topics[other] != world.item_topics[7]
    fresh = logits_of_one_item(users, world, other, day=2) - truth_of_one_item(world, other)
    np.testing.assert_allclose(fresh[:, 0], np.zeros(500), atol=1e-3)


def test_what_many_play_is_played_more():
    world, users = users_of(popularity_bias=0.4)
    best = int(np.argmax(np.where(world.uploaded(0), world.item_appeal, -np.inf)))
    logits_of_one_item(users, world, best)
    for item, effect in ((best, 0.4), (best - 1, 0.0)):
        # Popularity is 1 for the only item that was played; effects are centred over all items.
        after = logits_of_one_item(users, world, item, day=0)
        expected = truth_of_one_item(world, item) + effect - 0.4 / world.uploaded(0).sum()
        np.testing.assert_allclose(after, np.tile(expected, (1, 8)), atol=2e-3)


def test_new_items_attract_and_grow_old():
    world, users = users_of(freshness_bias=0.8)
    new = int(np.flatnonzero(world.upload_days > 0)[0])
    day = int(world.upload_days[new])
    for age in (0, 7, 300):
        logits = logits_of_one_item(users, world, new, day=day + age)
        expected = truth_of_one_item(world, new) + 0.8 * np.exp(-age / 7)
        np.testing.assert_allclose(logits, np.tile(expected, (1, 8)), atol=2e-3)


@pytest.mark.parametrize("effect", [0.0, 3.0])
def test_those_who_got_more_than_they_expect_come_back_more_often(effect):
    world, users = users_of(return_effect=effect)
    before = users.coming()
    np.testing.assert_allclose(before, special.expit(world.activity), rtol=1e-5)
    visitors = np.arange(250)  # the others stay at home
    pages = np.tile(np.arange(8) * 30, (250, 1))
    reactions = users.react(visitors, pages, 0, draws(pages.shape))
    change = special.logit(users.coming()) - special.logit(before)
    surprise = reactions.watch_fraction.mean(axis=1) - world.expectation[:250]
    assert (surprise > 0.1).any() and (surprise < -0.1).any()
    np.testing.assert_allclose(change[:250], effect * 0.3 * surprise, atol=1e-4)
    np.testing.assert_array_equal(change[250:], 0)


def test_likes_come_from_watching_and_shares_from_likes():
    world, users = users_of()
    pages = np.random.default_rng(1).integers(0, 300, (500, 8))
    reactions = users.react(np.arange(500), pages, 40, draws(pages.shape))
    watch = reactions.watch_fraction
    assert reactions.liked.any() and reactions.shared.any()
    assert not (reactions.shared & ~reactions.liked).any()
    assert watch[reactions.liked].min() > 0.3
    rates = 0.6 * np.maximum(watch - 0.3, 0)
    error = np.sqrt((rates * (1 - rates)).sum())
    assert abs(reactions.liked.sum() - rates.sum()) < 4 * error
