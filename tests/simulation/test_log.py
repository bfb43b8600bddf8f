"""The simulated log: deterministic, in the schema, with a truth that shows in it."""

import numpy as np
import pytest

from recexplore.errors import InputError
from recexplore.interactions.schema import check_log
from recexplore.simulation import log as simulated
from recexplore.simulation.platform import Platform
from recexplore.simulation.world import Settings, make_world, simulate_log

SETTINGS = Settings(num_users=150, num_items=400, seed=3)


@pytest.fixture(scope="module")
def log():
    return check_log(simulate_log(SETTINGS, num_days=4))


def frame(log):
    return log.interactions.to_pandas().sort_values(["user_id", "timestamp"], ignore_index=True)


def test_same_settings_same_log_and_another_seed_another(log):
    again = check_log(simulate_log(SETTINGS, num_days=4))
    other = check_log(simulate_log(Settings(num_users=150, num_items=400, seed=4), num_days=4))
    assert frame(log).equals(frame(again))
    assert not frame(log).equals(frame(other))


def test_the_log_passes_all_checks_and_items_speak_of_their_topics(log):
    assert log.dropped == {}
    world = make_world(SETTINGS)
    items = log.items.to_pandas().set_index("item_id")
    assert len(items) == 400
    for item in (0, 111, 399):
        topic = world.item_topics[item]
        text = items.loc[f"v{item}", "text"]
        assert world.topic_areas[topic] in text and world.topic_names[topic] in text


def test_watching_follows_the_hidden_truth(log):
    rows = frame(log)
    users = rows.user_id.str[1:].astype(int).to_numpy()
    items = rows.item_id.str[1:].astype(int).to_numpy()
    truth = make_world(SETTINGS).satisfaction(users, items)
    assert np.corrcoef(truth, rows.watch_fraction)[0, 1] > 0.5


def test_rows_of_the_log_are_those_of_the_platform():
    settings = Settings(num_users=20, num_items=250, new_item_share=0.1)
    platform = Platform(settings)
    arrived = platform.arrive()
    days = [platform.show(np.zeros(len(arrived), int)), platform.show()]
    rows = simulated.as_log(platform.world, days, seed=0).interactions.to_pandas()
    joined = {
        name: np.concatenate([getattr(day, name) for day in days]) for name in days[0]._fields
    }
    assert rows.user_id.tolist() == [f"u{user}" for user in joined["users"]]
    assert rows.item_id.tolist() == [f"v{item}" for item in joined["items"]]
    names = np.array(["production", "random", "exploration"])
    assert rows.policy.tolist() == names[joined["source"]].tolist()
    assert (rows.policy == "exploration").sum() == len(arrived)
    for name in ("watch_fraction", "liked", "shared", "skipped", "propensity", "timestamp"):
        np.testing.assert_array_equal(rows[name], joined[name])


def test_a_log_of_no_days_is_refused():
    with pytest.raises(InputError, match="world.simulate_log.num_days is 0"):
        simulate_log(SETTINGS, num_days=0)
