"""The whole step against enumeration, an argmax in numpy, and itself in other company."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_pair import (
    ALIGNMENT,
    BANNED,
    HISTORIES,
    LEFT_OUT,
    NOVELTY,
    B,
    M,
    batch_of,
    enumerated,
    explore,
    pick,
    prefix_of,
    whole_scores,
)

from recexplore.inference.best_of_n import Prefixes, explore_step

INDEPENDENT = dict(num_samples=16, num_chosen=3, sampler="independent")
DISTINCT = dict(
    num_samples=5, num_chosen=2, sampler="distinct", temperature=1.5, selection_temperature=0.7
)
EXHAUSTIVE = dict(num_samples=1, num_chosen=3, sampler="exhaustive", relevance_weight=0.5)
EVERY = pytest.mark.parametrize(
    "settings", [INDEPENDENT, DISTINCT, EXHAUSTIVE], ids=lambda s: s["sampler"]
)
RANDOM = pytest.mark.parametrize("settings", [INDEPENDENT, DISTINCT], ids=lambda s: s["sampler"])


def found_with(settings, **how):
    return jax.device_get(explore(**how, **settings))


@functools.cache
def scores():
    return whole_scores()


@functools.cache
def log_probabilities():
    return enumerated(LEFT_OUT)


def drawn(found, row):
    return sorted({int(cluster) for cluster in found.draws.clusters[row] if cluster >= 0})


def best(value, clusters, count):
    ordered = sorted(clusters, key=lambda cluster: -value[cluster])[:count]
    return ordered + [-1] * (count - len(ordered))


def test_best_of_n_is_an_argmax_in_numpy():
    found = found_with(INDEPENDENT)
    for row in range(B):
        assert found.clusters[row].tolist() == best(scores()[row], drawn(found, row), 3)
    assert (found.propensities == (found.clusters >= 0)).all()


def test_exhaustive_best_of_n_is_an_argmax_over_all_allowed():
    found = found_with(EXHAUSTIVE)
    value = log_probabilities() + 0.5 * scores()
    for row in range(B):
        allowed = set(range(M)) - LEFT_OUT[row]
        assert drawn(found, row) == sorted(allowed)
        assert found.clusters[row].tolist() == best(value[row], allowed, 3)


def test_soft_best_of_n_returns_the_propensities_of_its_choices():
    found = found_with(DISTINCT)
    for row in range(B):
        left = {cluster: np.exp(scores()[row, cluster] / 0.7) for cluster in drawn(found, row)}
        for cluster, propensity in zip(found.clusters[row], found.propensities[row], strict=True):
            if cluster < 0:
                assert not left and propensity == 0
            else:
                expected = left[cluster] / sum(left.values())
                assert propensity == pytest.approx(expected, rel=1e-4)
                del left[cluster]


@EVERY
def test_numbers_beside_the_clusters_are_those_of_whole_forward_passes(settings):
    found = found_with(settings)
    tempered = enumerated(LEFT_OUT, temperature=settings.get("temperature", 1.0))
    for clusters, numbers, expected in (
        (found.clusters, found.scores, scores()),
        (found.clusters, found.log_probabilities, log_probabilities()),
        (found.draws.clusters, found.draw_scores, scores()),
        (found.draws.clusters, found.draws.log_probabilities, log_probabilities()),
        (found.draws.clusters, found.draws.tempered, tempered),
    ):
        np.testing.assert_allclose(numbers, pick(expected, clusters), atol=1e-4)


@EVERY
def test_history_and_banned_clusters_never_appear_and_counts_are_right(settings):
    found = found_with(settings)
    for row in range(B):
        missing = {*HISTORIES[row], *BANNED[row]}
        assert missing.isdisjoint(found.draws.clusters[row].tolist())
        assert missing.isdisjoint(found.clusters[row].tolist())
        assert found.num_allowed[row] == M - len(missing)
        assert found.num_distinct[row] == len(drawn(found, row))
        if settings is DISTINCT:
            assert found.num_distinct[row] == min(5, M - len(missing))


def agree(found, other, rows):
    """The same choices; numbers up to rounding, which differs between shapes."""
    found, other = (jax.tree.leaves(x) for x in (jax.tree.map(lambda x: x[rows], found), other))
    for ours, theirs in zip(found, other, strict=True):
        if ours.dtype.kind == "i":
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@RANDOM
def test_the_answer_does_not_depend_on_the_rest_of_the_batch(settings):
    together = found_with(settings)
    agree(together, found_with(settings), list(range(B)))  # the same key, the same answer
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    agree(together, found_with(settings, batch=batch_of(order)), order)
    copies = [2, 2, 2, 6, 6, 2, 2, 2]
    agree(together, found_with(settings, batch=batch_of(copies)), copies)


@RANDOM
def test_neither_does_it_when_alone_and_padded_wider(settings):
    together = found_with(settings)
    for row in range(B):
        agree(together, found_with(settings, batch=batch_of([row], wider=3)), [row])


@RANDOM
def test_another_key_draws_others(settings):
    found, other = found_with(settings), found_with(settings, seed=8)
    choices = [row for row in range(B) if found.num_allowed[row] > 1]
    changed = found.draws.clusters[choices] != other.draws.clusters[choices]
    assert changed.any(axis=1).sum() >= len(choices) - 1


def test_histories_have_draws_of_their_own():
    """The same prompt with another history draws otherwise."""
    batch = batch_of([2] * B)
    histories = np.full_like(batch.history, -1)
    histories[:, 0] = [-1, 0, 1, 2, 3, 4, 5, 6]
    found = found_with(INDEPENDENT, batch=batch._replace(history=histories))
    assert len({tuple(row) for row in found.draws.clusters.tolist()}) == B


@EVERY
def test_batches_of_one_shape_share_a_program(settings):
    found_with(settings)
    programs = explore_step._cache_size()
    for seed in range(3):
        found_with(settings, batch=batch_of(np.random.default_rng(seed).permutation(B)), seed=seed)
    assert explore_step._cache_size() == programs


def test_bfloat16_stays_close_to_float32():
    models = {}
    for name, model in (("novelty_model", NOVELTY), ("alignment_model", ALIGNMENT)):
        models[name] = type(model)(dataclasses.replace(model.config, dtype="bfloat16"))
    prefixes = Prefixes(*(prefix_of(model) for model in models.values()))
    assert prefixes.novelty.keys.dtype == "bfloat16"
    found = found_with(DISTINCT, prefixes=prefixes, **models)
    for row in range(B):
        count = min(5, M - len(LEFT_OUT[row]))
        assert (found.draws.clusters[row] >= 0).sum() == found.num_distinct[row] == count
        assert LEFT_OUT[row].isdisjoint(drawn(found, row))
    for numbers, clusters, expected, tolerance in (
        (found.draws.log_probabilities, found.draws.clusters, log_probabilities(), 0.1),
        (found.draw_scores, found.draws.clusters, scores(), 0.1),
        (found.scores, found.clusters, scores(), 0.1),
    ):
        assert numbers.dtype == np.float32
        np.testing.assert_allclose(numbers, pick(expected, clusters), atol=tolerance)
