"""The choice among candidates against sorting in Python and closed forms in numpy."""

import functools

import jax
import numpy as np
import pytest
from small_pair import agrees

from recexplore.errors import InputError
from recexplore.inference.selection import BestOfN, Candidates, select

B, C = 40, 7


@functools.partial(jax.jit, static_argnums=0)
def choose(settings, candidates, keys):
    return select(settings, candidates, keys)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def some_candidates():
    """Rows with one to seven candidates in any order, half of them with equal scores."""
    random = np.random.default_rng(0)
    clusters = random.permuted(np.tile(np.arange(20), (B, 1)), axis=1)[:, :C].astype(np.int32)
    scores = random.integers(0, 3, (B, C)).astype(np.float32)
    log_probabilities = -random.integers(1, 3, (B, C)).astype(np.float32)
    scores[::2] += random.normal(size=(B // 2, C))
    missing = np.arange(C) >= (np.arange(B) % C + 1)[:, None]
    log_probabilities[missing] = -np.inf
    scores[missing] = 100.0  # which means nothing
    return Candidates(np.where(missing, -1, clusters), scores, log_probabilities)


def best(candidates, value):
    """[B] lists of places, the best first; ties go to the likelier, then to the smaller id."""
    clusters, _, log_probabilities = candidates
    return [
        sorted(
            np.flatnonzero(clusters[row] >= 0),
            key=lambda c, row=row: (-value[row, c], -log_probabilities[row, c], clusters[row, c]),
        )
        for row in range(B)
    ]


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, -1.0])
@pytest.mark.parametrize("num_chosen", [1, 4, C + 2])
def test_the_best_are_chosen_in_order(num_chosen, weight):
    candidates = some_candidates()
    settings = BestOfN(16, num_chosen, relevance_weight=weight)
    found = choose(settings, candidates, keys(B))
    value = candidates.scores
    if weight is not None:
        value = candidates.log_probabilities + np.float32(weight) * candidates.scores
    for row, places in enumerate(best(candidates, value)):
        chosen = places[:num_chosen]
        blank = num_chosen - len(chosen)
        for field, none in zip(candidates._fields, (-1, -np.inf, -np.inf), strict=True):
            expected = getattr(candidates, field)[row, chosen].tolist() + [none] * blank
            np.testing.assert_array_equal(getattr(found, field)[row], expected)
        assert found.propensities[row].tolist() == [1.0] * len(chosen) + [0.0] * blank


ROW = Candidates(
    np.array([[8, 3, 5, 0, -1, -1]], np.int32),
    np.array([[0.5, -0.3, 1.2, 0.1, 9.0, 9.0]], np.float32),
    np.array([[-1.0, -0.5, -2.5, -3.0, -np.inf, -np.inf]], np.float32),
)
MANY = 20_000
SOFT = pytest.mark.parametrize(("temperature", "weight"), [(1.0, None), (0.4, 0.3)])


def logits_of(temperature, weight):
    value = ROW.scores[0, :4].astype(np.float64)
    if weight is not None:
        value = ROW.log_probabilities[0, :4] + weight * value
    return value / temperature


def soft(num_chosen, temperature, weight):
    settings = BestOfN(16, num_chosen, relevance_weight=weight, selection_temperature=temperature)
    rows = Candidates(*(np.tile(array, (MANY, 1)) for array in ROW))
    return jax.device_get(choose(settings, rows, keys(MANY)))


def places_of(clusters):
    return np.argmax(clusters[..., None] == ROW.clusters[0], axis=-1)


@SOFT
def test_a_soft_choice_of_one_follows_the_softmax(temperature, weight):
    chances = np.exp(logits_of(temperature, weight))
    chances /= chances.sum()
    found = soft(1, temperature, weight)
    places = places_of(found.clusters[:, 0])
    assert agrees(np.bincount(places, minlength=4), chances)
    np.testing.assert_allclose(found.propensities[:, 0], chances[places], rtol=1e-5)


@SOFT
def test_a_soft_choice_of_some_follows_plackett_and_luce(temperature, weight):
    strength = np.exp(logits_of(temperature, weight))
    found = soft(6, temperature, weight)
    assert (found.clusters[:, 4:] == -1).all() and (found.propensities[:, 4:] == 0).all()
    places = places_of(found.clusters[:, :4])
    in_order = strength[places]
    left = np.cumsum(in_order[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(found.propensities[:, :4], in_order / left, rtol=1e-4)
    pairs, counts = np.zeros((4, 4)), np.zeros((4, 4))
    for first, second in np.argwhere(~np.eye(4, dtype=bool)):
        share = strength[first] / strength.sum()
        pairs[first, second] = share * strength[second] / (strength.sum() - strength[first])
    np.add.at(counts, tuple(places[:, :2].T), 1)
    assert agrees(counts, pairs)


def test_a_soft_choice_depends_on_its_own_key_alone():
    settings = BestOfN(16, 3, selection_temperature=1.0)
    candidates = some_candidates()
    together = choose(settings, candidates, keys(B))
    order = np.random.default_rng(0).permutation(B)
    shuffled = choose(settings, Candidates(*(x[order] for x in candidates)), keys(B)[order])
    np.testing.assert_array_equal(shuffled.clusters, np.asarray(together.clusters)[order])
    other = choose(settings, candidates, keys(B, seed=1))
    assert (np.asarray(other.clusters) != np.asarray(together.clusters)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"num_samples": 2, "num_chosen": 3}, "num_chosen is 3; it must lie between 1 and .*, 2"),
        ({"num_chosen": 0}, "num_chosen is 0"),
        ({"num_chosen": 0, "sampler": "exhaustive"}, "num_chosen is 0"),
        ({"sampler": "beam"}, "sampler is 'beam'; it must be one of independent, distinct"),
        ({"temperature": 0.0}, "temperature is 0.0; it must lie in 1e-6..1e6"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"selection_temperature": -0.5}, "selection_temperature is -0.5; it must be 0 or lie"),
        ({"selection_temperature": float("nan")}, "selection_temperature is nan"),
        ({"selection_temperature": float("inf")}, "selection_temperature is inf; it must be a fin"),
        ({"temperature": 1e-39}, "temperature is 1e-39; it must lie in"),
        ({"relevance_weight": float("nan")}, "relevance_weight is nan; it must be a finite number"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=r"selection\.BestOfN\." + message):
        BestOfN(**settings)


def test_the_exhaustive_sampler_may_choose_more_than_n():
    assert BestOfN(num_samples=1, num_chosen=5, sampler="exhaustive").num_chosen == 5
