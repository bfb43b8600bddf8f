"""What is true about a platform, against brute force."""

import dataclasses

import numpy as np
import pytest
from scipy import special

from recexplore.errors import InputError
from recexplore.simulation.world import Settings, history_satisfaction, make_world

SETTINGS = Settings(num_users=150, num_items=400, seed=3)


@pytest.fixture(scope="module")
def world():
    return make_world(SETTINGS)


def test_same_settings_same_world_and_another_seed_another(world):
    again, other = make_world(SETTINGS), make_world(dataclasses.replace(SETTINGS, seed=4))
    for field in dataclasses.fields(world):
        assert np.array_equal(getattr(world, field.name), getattr(again, field.name))
    assert not np.array_equal(world.tastes, other.tastes)
    assert not np.array_equal(world.item_quality, other.item_quality)


def test_another_population_has_other_users_and_the_same_items(world):
    other = make_world(SETTINGS, population=1)
    for name in ("item_topics", "item_quality", "item_lengths", "upload_days"):
        assert np.array_equal(getattr(world, name), getattr(other, name))
    assert not np.isin(world.tastes[:, 0], other.tastes[:, 0]).any()


def test_tastes_of_tied_topics_go_together_across_areas_and_in_every_population():
    settings = Settings(num_users=2000, num_items=400)
    worlds = [make_world(settings, population) for population in (0, 1)]
    first, second = (np.corrcoef(world.tastes.T) for world in worlds)
    areas = np.array(worlds[0].topic_areas)
    across = areas[:, None] != areas[None, :]
    assert np.quantile(np.abs(first[across]), 0.9) > 0.4
    assert np.corrcoef(first[across], second[across])[0, 1] > 0.95


def test_interests_are_known_or_dormant_and_most_users_have_more_of_the_latter(world):
    assert not (world.known & world.dormant).any()
    assert np.array_equal(world.liked, (world.known & world.liked) | world.dormant)
    assert not (world.dormant & world.disliked).any()
    fractions = special.expit(world.tastes)
    assert fractions[world.dormant].min() >= 0.5 and fractions[world.disliked].max() <= 0.2
    assert (world.dormant.sum(axis=1) > world.known.sum(axis=1)).mean() > 0.9
    assert world.known.sum(axis=1).min() >= 2
    assert abs(world.known.sum(axis=1).mean() - SETTINGS.topics_per_user) < 0.6


def test_every_topic_has_an_item_from_the_start_and_the_share_of_new_ones_is_as_asked(world):
    there = world.uploaded(0)
    assert set(world.item_topics[there]) == set(range(len(world.topic_names)))
    assert (~there).sum() == 0.2 * 400
    assert world.uploaded(30).all()


def test_satisfaction_falls_with_length_and_rises_with_quality_and_taste(world):
    items, user = np.arange(400), np.zeros(400, int)
    logit = special.logit(world.satisfaction(user, items)) - world.tastes[0, world.item_topics]
    features = [world.item_quality, np.log(world.item_lengths), np.ones(400)]
    weights, *_ = np.linalg.lstsq(np.stack(features, axis=1), logit, rcond=None)
    assert weights[0] == pytest.approx(1, abs=1e-3) and weights[1] < -0.1


@pytest.mark.parametrize("weighted", [False, True])
def test_the_truth_of_a_cluster_is_the_mean_over_its_items(world, weighted):
    random = np.random.default_rng(0)
    clusters = random.integers(-1, 9, 400)
    clusters[clusters == 5] = 6  # 5 is left empty
    weights = random.exponential(size=400) if weighted else None
    found = world.cluster_satisfaction(clusters, 9, weights)
    assert np.isnan(found[:, 5]).all()
    for cluster in {*range(9)} - {5}:
        items = np.flatnonzero(clusters == cluster)
        for user in (0, 77, 149):
            each = world.satisfaction(np.full(len(items), user), items)
            of_items = None if weights is None else weights[items]
            expected = np.average(each.astype(float), weights=of_items)
            assert found[user, cluster] == pytest.approx(expected, abs=1e-5)


def test_the_truth_of_a_cluster_does_not_depend_on_how_many_users_there_are():
    world = make_world(Settings(num_users=2500, num_items=300, new_item_share=0.1))
    clusters = np.arange(300) % 7
    found = world.cluster_satisfaction(clusters, 7)
    users = np.repeat([0, 1023, 1024, 2499], 300)
    each = world.satisfaction(users, np.tile(np.arange(300), 4)).reshape(4, 300)
    expected = [[row[clusters == m].mean(dtype=float) for m in range(7)] for row in each]
    np.testing.assert_allclose(found[[0, 1023, 1024, 2499]], expected, atol=1e-5)


@pytest.mark.parametrize("by_user", [False, True])
def test_the_truth_of_a_history_is_the_mean_over_those_who_have_it(by_user):
    random = np.random.default_rng(1)
    satisfaction = random.random((40, 6), np.float32)
    users = random.integers(0, 40, 200)
    histories = random.integers(0, 12, 200)
    histories[histories == 4] = 3  # nobody has 4
    if by_user:
        mean, count = history_satisfaction(satisfaction, histories, 12, users=users)
    else:
        mean, count = history_satisfaction(satisfaction[users], histories, 12)
    for history in range(12):
        rows = satisfaction[users[histories == history]].astype(float)
        assert count[history] == len(rows)
        if history == 4:
            assert np.isnan(mean[history]).all()
        else:
            np.testing.assert_allclose(mean[history], rows.mean(axis=0), rtol=1e-6)


def test_a_cluster_without_items_is_unknown_for_every_history_and_no_other_is():
    satisfaction = np.array([[0.5, np.nan], [0.1, np.nan]], np.float32)
    mean, _ = history_satisfaction(satisfaction, np.array([0, 0]), 1)
    np.testing.assert_allclose(mean, [[0.3, np.nan]])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_users", 0, "at least 1"),
        ("num_items", 199, "at least 200"),
        ("slots_per_day", 0, "at least 1"),
        ("exploration_share", 1.1, "between 0 and 1"),
        ("exploration_slot", 8, "below slots_per_day, which is 8"),
        ("topics_per_user", 201, "at most 200, all topics"),
        ("new_item_share", 0.96, "at most 0.95, as an item of each topic is there from the start"),
        ("position_bias", -0.1, "at least 0"),
        ("boredom", float("nan"), "at least 0"),
        ("boredom_decay", 2.0, "between 0 and 1"),
        ("seed", -1, "at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, rule):
    with pytest.raises(InputError) as error:
        Settings(**{name: value})
    assert str(error.value) == f"world.Settings.{name} is {value}; it must be {rule}."
