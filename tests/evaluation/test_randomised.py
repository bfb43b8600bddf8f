"""Estimates from a log's randomised share, against the truth of the same days."""

import dataclasses

import numpy as np
import pytest

from recexplore.evaluation import experiment, off_policy, policies, randomised
from recexplore.simulation.world import Settings, make_world

SETTINGS = Settings(num_users=3000, num_items=600, exploration_share=0.5, seed=5)
NUM_CLUSTERS = 20


@pytest.fixture(scope="module")
def scene():
    clusters = make_world(SETTINGS).item_topics // 10
    return experiment.Scene(SETTINGS, 4, clusters, NUM_CLUSTERS, 2, pre_period=2)


@pytest.fixture(scope="module")
def lived(scene):
    random = np.random.default_rng(0)
    log_p = random.normal(size=(NUM_CLUSTERS**2, NUM_CLUSTERS))
    truth = experiment.truth_of_histories(scene, 2)
    some = {
        "uniform": lambda asked: policies.uniform(asked.allowed),
        "novelty": lambda asked: np.exp(asked.among_allowed(log_p)),
        "best": lambda asked: policies.best_of_n(
            asked.among_allowed(log_p), truth[asked.histories], 20
        ),
    }
    settings = experiment.Experiment()
    told, values = randomised.live_days(scene, settings, 3, some, lambda day, days: None)
    return told, values, some


def test_policies_are_worth_what_estimates_say_within_their_error(lived):
    told, values, some = lived
    assert values["best"] > values["uniform"] + 0.02
    for name, policy in some.items():
        weights = off_policy.importance_weights(told.log, policy(told.asked))
        terms = weights * told.log.rewards
        error = terms.std() / np.sqrt(len(terms))
        assert abs(terms.mean() - values[name]) < 3.5 * error, name
        assert abs(weights.mean() - 1) < 3.5 * weights.std() / np.sqrt(len(weights)), name


def test_rows_are_of_users_who_were_asked_and_of_the_one_slot(lived, scene):
    told, _, _ = lived
    assert told.log.contexts.max() < len(told.asked.histories)
    shown = len(told.log.rewards) / len(told.asked.histories)
    assert shown == pytest.approx(SETTINGS.exploration_share, abs=0.03)
    assert (told.log.propensities > 0).all() and (told.log.propensities < 0.2).all()


def test_the_scene_stays_where_it_was(scene, lived):
    assert scene.platform.day == 4
    assert dataclasses.asdict(scene.platform.settings) == dataclasses.asdict(SETTINGS)
