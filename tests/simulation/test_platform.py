"""Days on the platform: replay, propensities, exploration and what becomes of it."""

import numpy as np
import pytest
from scipy import stats

from recexplore.errors import InputError
from recexplore.simulation import production_recommender
from recexplore.simulation.platform import EXPLORATION, PRODUCTION, RANDOM, Platform
from recexplore.simulation.world import Settings

SETTINGS = Settings(num_users=300, num_items=400, seed=5)


def after(days, settings=SETTINGS, population=0):
    platform = Platform(settings, population)
    shown = [platform.show() for _ in range(days)]
    return platform, shown


def same(first, second):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True))


def pages(day, name):
    return getattr(day, name).reshape(-1, SETTINGS.slots_per_day)


def test_a_platform_replays_its_days_bit_for_bit():
    _, first = after(4)
    _, second = after(4)
    assert all(same(*days) for days in zip(first, second, strict=True))
    _, others = after(1, population=1)
    assert not same(first[0], others[0])


def test_no_exploration_for_anyone_is_no_exploration():
    plain, _ = after(2)
    explored, _ = after(2)
    nobody = np.full(len(explored.arrive()), -1)
    assert same(plain.show(), explored.show(nobody, suppression=0.5))
    assert same(plain.show(), explored.show())


def test_exploration_replaces_one_slot_and_nothing_else_of_the_day():
    plain, _ = after(2)
    explored, _ = after(2)
    users = explored.arrive()
    np.testing.assert_array_equal(users, plain.arrive())
    asked = np.where(users % 2 == 0, 17, -1)
    ours, theirs = explored.show(asked), plain.show()
    for name in ("users", "slots", "timestamp"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    replaced = np.zeros((len(users), SETTINGS.slots_per_day), bool)
    replaced[users % 2 == 0, SETTINGS.exploration_slot] = True
    assert (pages(ours, "items")[replaced] == 17).all()
    assert np.isnan(pages(ours, "propensity")[replaced]).all()
    np.testing.assert_array_equal(pages(ours, "source") == EXPLORATION, replaced)
    for name in ("items", "propensity", "source"):
        np.testing.assert_array_equal(pages(ours, name)[~replaced], pages(theirs, name)[~replaced])
    # Reactions differ in that slot, and further down only to topics whose boredom it changed.
    topics = explored.world.item_topics[pages(ours, "items")]
    theirs_topics = explored.world.item_topics[pages(theirs, "items")]
    slot = SETTINGS.exploration_slot
    touched = (topics == topics[:, [slot]]) | (topics == theirs_topics[:, [slot]])
    touched[:, :slot] = False
    may_differ = touched & replaced.any(axis=1)[:, None]
    for name in ("watch_fraction", "liked", "satisfaction"):
        a, b = pages(ours, name), pages(theirs, name)
        np.testing.assert_array_equal(a[~may_differ], b[~may_differ])
    assert (
        pages(ours, "watch_fraction")[replaced] != pages(theirs, "watch_fraction")[replaced]
    ).any()


def test_the_ranker_throws_out_the_share_it_predicts_the_least_for():
    platform, _ = after(3)
    users = platform.arrive()
    asked = np.random.default_rng(0).choice(np.flatnonzero(platform.world.uploaded(3)), len(users))
    asked[::3] = -1
    wanted = np.flatnonzero(asked >= 0)
    predicted = platform.recommender.predict(users[wanted], asked[wanted], 3)
    production, _ = after(3)
    plain, day = production.show(), platform.show(asked, suppression=0.4)
    shown = pages(day, "source")[:, SETTINGS.exploration_slot] == EXPLORATION
    kept = shown[wanted]
    assert not shown[asked < 0].any()
    assert (~kept).sum() == round(0.4 * len(wanted))
    assert predicted[~kept].max() <= predicted[kept].min()
    np.testing.assert_array_equal(pages(day, "items")[~shown], pages(plain, "items")[~shown])


def test_what_the_recommender_predicts_is_its_mean_shrunk():
    platform, days = after(6)
    users, items = days[-1].users[:50], days[-1].items[:50]
    joined = [np.concatenate([getattr(day, n) for day in days]) for n in ("users", "items")]
    watch = np.concatenate([day.watch_fraction for day in days]).astype(float)
    topics = platform.world.item_topics
    of_topic = topics[joined[1]]
    predicted = platform.recommender.predict(users, items, 6)
    for user, item, found in zip(users, items, predicted, strict=True):
        topic = topics[item]
        mean = (watch[of_topic == topic].sum() + 8) / ((of_topic == topic).sum() + 20)
        own = watch[(joined[0] == user) & (of_topic == topic)]
        before = platform.world.known[user, topic]
        affinity = (own.sum() + 0.6 * before + 2 * mean) / (len(own) + before + 2)
        of_item = watch[joined[1] == item]
        fresh = 0.1 * np.exp(-(6 - platform.world.upload_days[item]) / 7)
        popularity = (of_item.sum() + 10 * (mean + fresh)) / (len(of_item) + 10)
        assert found == pytest.approx(affinity + popularity - mean, abs=1e-5)


def test_what_is_shown_is_uploaded_and_production_keeps_to_topics_that_were_met():
    platform = Platform(SETTINGS)
    topics = platform.world.item_topics
    for day in range(6):
        met = platform.known.copy()
        shown = platform.show()
        assert platform.world.uploaded(day)[shown.items].all()
        ours = shown.source == PRODUCTION
        assert met[shown.users[ours], topics[shown.items[ours]]].all()
        played = shown.watch_fraction >= 0.5
        met[shown.users[played], topics[shown.items[played]]] = True
        np.testing.assert_array_equal(platform.known, met)
    assert set(shown.source) == {PRODUCTION, RANDOM}


def test_the_mean_inverse_propensity_is_the_number_of_items():
    settings = Settings(num_users=4000, num_items=400, exploration_share=0.3)
    _, (*_, day) = after(3, settings)
    uploaded = Platform(settings).world.uploaded(2).sum()
    inverse = 1 / day.propensity.astype(float)
    assert abs(inverse.mean() - uploaded) < 4 * stats.sem(inverse)
    assert stats.sem(inverse) < 0.02 * uploaded
    assert abs((day.source == RANDOM).mean() - 0.3) < 0.02


def test_propensities_are_the_frequencies_of_repeated_draws():
    settings = Settings(num_users=50, num_items=250, exploration_share=0.2, new_item_share=0.1)
    platform, _ = after(5, settings)
    random = np.random.default_rng(0)
    user = int(np.argmax(platform.known.sum(axis=1)))
    repeats = 100_000
    shown = platform.recommender.fill(
        np.full(repeats, user), 5, production_recommender.Draws(*random.random((3, repeats, 1)))
    )
    counts = np.bincount(shown.items[:, 0], minlength=250)
    propensities = np.zeros(250)
    propensities[shown.items[:, 0]] = shown.propensities[:, 0]
    np.testing.assert_allclose(propensities.sum(), 1, atol=1e-5)
    assert np.array_equal(propensities > 0, platform.world.uploaded(5))
    shown_at_all = propensities > 0
    expected = propensities[shown_at_all] / propensities.sum() * repeats
    assert expected.min() > 5
    assert stats.chisquare(counts[shown_at_all], expected).pvalue > 0.01


def test_a_dormant_interest_becomes_known_when_it_is_really_watched():
    platform, _ = after(1)
    users, world = platform.arrive(), platform.world
    dormant = world.dormant & ~platform.known
    topics = dormant[users].argmax(axis=1)  # everyone has one
    assert dormant[users, topics].all()
    first = np.searchsorted(world.item_topics, topics)
    items = np.array([i + np.flatnonzero(world.uploaded(1)[i:])[0] for i in first])
    np.testing.assert_array_equal(world.item_topics[items], topics)
    day = platform.show(items)
    now_known = platform.known[users, topics]
    rows = day.source == EXPLORATION
    watched = day.watch_fraction[rows] >= 0.5
    assert now_known[watched].all() and watched.mean() > 0.3
    by_chance = now_known & ~watched  # another slot may have shown the topic
    assert by_chance.mean() < 0.05


def test_the_recommender_learns_from_exploration():
    platform, _ = after(1)
    users = platform.arrive()
    items = np.full(len(users), 17)
    before = platform.recommender.popularity(0)[17]
    day = platform.show(items)
    rows = day.items == 17
    after_it = platform.recommender.popularity(0)[17]
    assert np.sign(after_it - before) == np.sign(day.watch_fraction[rows].mean() - before)


def test_the_platform_is_plausible():
    settings = Settings(seed=0)
    platform = Platform(settings)
    for _ in range(30):
        day = platform.show()
        active = len(np.unique(day.users)) / settings.num_users
        assert 0.5 < active < 0.75
        assert 0.45 < (day.watch_fraction >= 0.5).mean() < 0.65
        assert 0.15 < day.skipped.mean() < 0.3


def test_a_day_on_which_nobody_comes_is_empty():
    settings = Settings(num_users=1, num_items=250, new_item_share=0.1)
    days = after(30, settings)[1]
    assert {len(day.users) for day in days} == {0, settings.slots_per_day}


@pytest.mark.parametrize(
    ("item", "suppression", "message"),
    [
        (400, 0.0, "exploration names item 400; there are 400, counted from 0"),
        (None, 0.0, r"exploration names item \d+ on day 0; it can be shown from day \d+ on"),
        (1, 1.5, "suppression is 1.5; it must be between 0 and 1"),
    ],
)
def test_exploration_that_cannot_be_shown_is_refused(item, suppression, message):
    platform = Platform(SETTINGS)
    item = np.argmax(platform.world.upload_days) if item is None else item
    with pytest.raises(InputError, match=message):
        platform.show(np.full(len(platform.arrive()), item), suppression)
    with pytest.raises(InputError, match="exploration has 3 items; it must have one, or -1"):
        platform.show(np.zeros(3, int))
