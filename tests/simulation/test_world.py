"""The simulated platform: deterministic, in the schema, with a truth that shows in its log."""

import numpy as np
import pytest

from recexplore.errors import InputError
from recexplore.interactions.schema import check_log
from recexplore.simulation import world

SIZES = {"num_users": 150, "num_items": 400, "num_days": 4}


@pytest.fixture(scope="module")
def log():
    return check_log(world.simulate_log(seed=3, **SIZES))


def frame(log):
    return log.interactions.to_pandas().sort_values(["user_id", "timestamp"], ignore_index=True)


def test_same_seed_same_log_and_another_seed_another(log):
    again = check_log(world.simulate_log(seed=3, **SIZES))
    other = check_log(world.simulate_log(seed=4, **SIZES))
    assert frame(log).equals(frame(again))
    assert not frame(log).equals(frame(other))


def test_the_log_passes_all_checks_and_items_speak_of_their_topics(log):
    assert log.dropped == {}
    topics = world.make_world(num_users=150, num_items=400, seed=3)
    items = log.items.to_pandas().set_index("item_id")
    for item in (0, 111, 399):
        topic = topics.item_topics[item]
        text = items.loc[f"v{item}", "text"]
        assert topics.topic_areas[topic] in text and topics.topic_names[topic] in text


def test_watching_follows_the_hidden_truth(log):
    truth = world.make_world(num_users=150, num_items=400, seed=3)
    rows = frame(log)
    users = rows.user_id.str[1:].astype(int).to_numpy()
    topics = truth.item_topics[rows.item_id.str[1:].astype(int)]
    expected = truth.expected_watch(users, topics)
    assert np.corrcoef(expected, rows.watch_fraction)[0, 1] > 0.5


def test_logged_propensities_are_those_of_the_draws(log):
    # The mean of 1 / propensity over draws is the number of items, whatever the policy prefers.
    rows = frame(log)
    assert (rows.propensity > 0).all()
    random = rows[rows.policy == "random"]
    share = len(random) / len(rows)
    assert abs(share - 0.15) < 0.03
    assert (rows.propensity >= 0.15 / 400 - 1e-9).all()


def test_tastes_of_tied_topics_go_together_across_areas():
    truth = world.make_world(num_users=2000, num_items=400, seed=0)
    correlation = np.corrcoef(truth.tastes.T)
    areas = np.array(truth.topic_areas)
    across = np.abs(correlation[areas[:, None] != areas[None, :]])
    assert np.quantile(across, 0.9) > 0.4


@pytest.mark.parametrize("name", ["num_users", "num_days", "slots_per_day"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"world.simulate_log.{name} is 0"):
        world.simulate_log(**{**SIZES, name: 0})
