"""Collective feedback against closed forms and known truth."""

import ibis
import numpy as np
import pyarrow as pa
import pytest

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.feedback import collective


def moves(rows, split="train", propensities=None):
    """(history, next, watch_fraction, liked, skipped) → TRANSITIONS."""
    return pa.table(
        {
            "split": [split] * len(rows),
            "history": pa.array([list(r[0]) for r in rows], pa.list_(pa.int32())),
            "next_cluster": pa.array([r[1] for r in rows], pa.int32()),
            "watch_fraction": [float(r[2]) for r in rows],
            "liked": [bool(r[3]) for r in rows],
            "shared": [False] * len(rows),
            "skipped": [bool(r[4]) for r in rows],
            "propensity": pa.array(propensities or [None] * len(rows), pa.float32()),
        }
    )


def test_the_reward_is_the_weighted_sum():
    table = ibis.memtable(moves([((0, 1), 2, 0.8, True, False), ((0, 1), 2, 0.1, False, True)]))
    values = table.select(r=collective.reward(table)).to_pyarrow()["r"].to_pylist()
    assert values == pytest.approx([0.8 + 1.0, 0.1 - 1.0])
    with pytest.raises(InputError, match="names .'smiled'"):
        collective.reward(table, {"smiled": 1.0})
    with pytest.raises(InputError, match=r"signal_weights\['liked'\] is nan"):
        collective.reward(table, {"liked": float("nan")})


def test_shrinkage_and_labels_by_hand():
    rows = [((0, 1), 2, 1.0, False, False)] * 2 + [((3, 1), 2, 0.4, False, False)]
    rows += [((0, 1), 4, 0.2, False, False)]
    found = collective.collective_feedback(
        ibis.memtable(moves(rows)), history_length=2, shrinkage=4.0, outliers=0.0, rounding=0.1
    )
    by_move = {(tuple(r["history"]), r["next_cluster"]): r for r in found.table.to_pylist()}
    mean_of_2 = (1.0 + 1.0 + 0.4) / 3
    shrunk = {
        ((0, 1), 2): (2 * 1.0 + 4 * mean_of_2) / 6,
        ((3, 1), 2): (1 * 0.4 + 4 * mean_of_2) / 5,
        ((0, 1), 4): 0.2,
    }
    low, high = min(shrunk.values()), max(shrunk.values())
    for move, value in shrunk.items():
        assert by_move[move]["label"] == pytest.approx(round((value - low) / (high - low), 1))
    assert by_move[((0, 1), 2)]["count"] == 2
    assert (found.low, found.high) == pytest.approx((low, high))


def test_held_out_rows_are_neither_shrunk_nor_rounded():
    train = moves([((0, 1), 2, x, False, False) for x in (0.0, 1.0)])
    train = pa.concat_tables([train, moves([((0, 1), 3, x, False, False) for x in (0.0, 0.2)])])
    test = moves([((0, 1), 2, 0.337, False, False)], split="test")
    found = collective.collective_feedback(
        ibis.memtable(pa.concat_tables([train, test])),
        history_length=2,
        shrinkage=1.0,
        outliers=0.0,
    )
    row = [r for r in found.table.to_pylist() if r["split"] == "test"][0]
    assert row["reward"] == pytest.approx(0.337)
    assert row["label"] == pytest.approx((0.337 - found.low) / (found.high - found.low))


def test_histories_are_cut_to_their_last_clusters_and_rare_moves_dropped(tmp_path):
    rows = [((9, 0, 1), 2, 0.5, False, False), ((8, 0, 1), 2, 0.7, False, False)]
    rows += [((0, 5), 2, 0.9, False, False), ((4,), 2, 0.9, False, False)]
    rows += [((0, 5), 3, 0.1, False, False)] * 2
    found = collective.collective_feedback(
        ibis.memtable(moves(rows)), history_length=2, min_count=2, shrinkage=1.0
    )
    artifacts.write_table(tmp_path / "c.parquet", found.table, artifacts.COLLECTIVE)
    kept = [(r["history"], r["count"]) for r in found.table.to_pylist()]
    assert kept == [([0, 1], 2), ([0, 5], 2)]
    assert found.dropped == {
        "transitions with fewer than 2 clusters of history": 1,
        "training moves made by fewer than 2 users": 1,
    }
    with pytest.raises(InputError, match="min_count = 9"):
        collective.collective_feedback(ibis.memtable(moves(rows)), history_length=2, min_count=9)


def test_the_estimate_finds_a_known_ratio_of_variances():
    random = np.random.default_rng(0)
    targets = np.repeat(np.arange(20), 200)
    counts = random.integers(1, 8, len(targets))
    true_means = random.normal(size=20)[targets] + 0.5 * random.normal(size=len(targets))
    draws = [m + 1.5 * random.normal(size=n) for m, n in zip(true_means, counts, strict=True)]
    means = np.array([d.mean() for d in draws])
    squares = np.array([(d**2).mean() for d in draws])
    found = collective.estimate_shrinkage(targets, counts, counts, means, squares)
    assert found == pytest.approx(1.5**2 / 0.5**2, rel=0.15)


def test_the_estimate_finds_it_from_weighted_reactions():
    random = np.random.default_rng(1)
    targets = np.repeat(np.arange(20), 300)
    true_means = random.normal(size=20)[targets] + 0.5 * random.normal(size=len(targets))
    sums = []
    for mean in true_means:
        w = random.choice([0.1, 0.5, 1.0], size=random.integers(1, 12))
        r = mean + 1.5 * random.normal(size=len(w))
        sums.append((w.sum(), (w**2).sum(), np.average(r, weights=w), np.average(r**2, weights=w)))
    found = collective.estimate_shrinkage(targets, *np.array(sums).T)
    assert found == pytest.approx(1.5**2 / 0.5**2, rel=0.15)


def test_what_was_shown_on_purpose_counts_less():
    rows = [((0, 1), 2, w, False, False) for w in (1.0, 0.2, 0.4)] + [((0, 1), 3, 0.1, False, True)]
    table = moves(rows, propensities=[0.4, 0.1, 0.05, 0.1])
    found = collective.collective_feedback(
        ibis.memtable(table), history_length=2, min_propensity=0.1, shrinkage=0.0, outliers=0.0
    )
    first = found.table.to_pylist()[0]
    assert first["count"] == 3
    assert first["weight"] == pytest.approx(0.25 + 1 + 1)
    assert first["watch_fraction"] == pytest.approx((0.25 * 1.0 + 0.2 + 0.4) / 2.25)
    assert first["reward"] == pytest.approx((0.25 * 1.0 + 0.2 + 0.4) / 2.25)
    plain = collective.collective_feedback(
        ibis.memtable(table), history_length=2, shrinkage=0.0, outliers=0.0
    )
    assert plain.table.to_pylist()[0]["reward"] == pytest.approx((1.0 + 0.2 + 0.4) / 3)
    assert plain.table["weight"].to_pylist() == [3, 1]
    with pytest.raises(InputError, match="4 transitions have no propensity"):
        collective.collective_feedback(
            ibis.memtable(moves(rows)), history_length=2, min_propensity=0.1
        )


def test_weighted_moves_are_shrunk_by_what_they_are_worth():
    rows = [((0, 1), 2, 0.8, False, False)] * 2 + [((0, 1), 3, w, False, False) for w in (0.3, 0.5)]
    rows += [((5, 1), 3, 0.6, False, False)]
    table = moves(rows, propensities=[0.5, 0.25, 0.01, 0.04, 0.01])
    found = collective.collective_feedback(
        ibis.memtable(table),
        history_length=2,
        min_propensity=0.01,
        shrinkage=3.0,
        outliers=0.0,
        rounding=0.01,
    )
    by_move = {(tuple(r["history"]), r["next_cluster"]): r for r in found.table.to_pylist()}
    w = 0.25  # of the one shown with probability 0.04, beside one of weight 1
    mean, users = (0.3 + w * 0.5) / (1 + w), (1 + w) ** 2 / (1 + w**2)
    of_3 = (0.3 + w * 0.5 + 0.6) / (2 + w)
    shrunk = {
        ((0, 1), 2): 0.8,  # alone in its cluster, however little it weighs
        ((0, 1), 3): (users * mean + 3 * of_3) / (users + 3),
        ((5, 1), 3): (0.6 + 3 * of_3) / 4,
    }
    assert (found.low, found.high) == pytest.approx((min(shrunk.values()), 0.8))
    for move, value in shrunk.items():
        label = (value - found.low) / (found.high - found.low)
        assert by_move[move]["label"] == pytest.approx(label, abs=0.006)
    assert by_move[((0, 1), 2)]["weight"] == pytest.approx(0.02 + 0.04)


def test_weights_undo_what_a_recommender_favours():
    random = np.random.default_rng(0)
    taste = random.random(20_000)  # of each user for cluster 2; who likes it is shown it more often
    propensity = 0.02 + 0.6 * taste
    shown = random.random(len(taste)) < propensity
    rows = [((0, 1), 2, watched, False, False) for watched in taste[shown]]
    rows += [((0, 1), 3, 0.0, False, True)]
    table = moves(rows, propensities=[*propensity[shown], 0.02])
    rewards = {}
    for floor in (None, 0.02):
        found = collective.collective_feedback(
            ibis.memtable(table), history_length=2, min_propensity=floor, shrinkage=0.0
        )
        rewards[floor] = found.table.to_pylist()[0]["reward"]
    assert rewards[None] > 0.6
    assert rewards[0.02] == pytest.approx(0.5, abs=0.02)


def test_moves_that_differ_by_noise_alone_are_shrunk_wholly():
    random = np.random.default_rng(0)
    counts = np.full(100, 3)
    draws = random.normal(size=(100, 3))
    draws = draws - draws.mean(axis=1, keepdims=True)
    found = collective.estimate_shrinkage(
        np.zeros(100, int), counts, counts, draws.mean(axis=1), (draws**2).mean(axis=1)
    )
    assert found == 1e6
    alone = np.ones(5, int)
    zeros, means = np.zeros(5, int), np.arange(5.0)
    assert collective.estimate_shrinkage(zeros, alone, alone, means, alone) == 1e6


@pytest.mark.parametrize(
    "argument",
    [
        {"rounding": 0.0},
        {"min_count": 0},
        {"shrinkage": -1.0},
        {"outliers": 0.5},
        {"min_propensity": 0.0},
    ],
)
def test_arguments_out_of_range_are_named(argument):
    table = ibis.memtable(moves([((0, 1), 2, 0.5, False, False)]))
    with pytest.raises(InputError, match=f"collective_feedback.{next(iter(argument))} is"):
        collective.collective_feedback(table, history_length=2, **argument)


def test_the_same_bytes_in_whatever_order_and_batches():
    random = np.random.default_rng(0)
    rows = [
        ((a, b), c, watched, liked, skipped)
        for a, b, c, watched, liked, skipped in zip(
            *random.integers(0, 3, (2, 4000)),
            random.integers(3, 6, 4000),
            random.random(4000),
            *(random.random((2, 4000)) < 0.3),
            strict=True,
        )
    ]
    table = moves(rows)
    shuffled = table.take(pa.array(random.permutation(4000)))
    batches = pa.Table.from_batches(shuffled.to_batches(max_chunksize=37))
    first, again = (
        collective.collective_feedback(ibis.memtable(t), history_length=2) for t in (table, batches)
    )
    assert first.shrinkage == again.shrinkage
    for name in ("reward", "label", "count"):
        assert first.table[name].equals(again.table[name])


def test_shrinkage_comes_from_the_training_rows_alone():
    random = np.random.default_rng(0)
    rows = [((0, h), t, w, False, False) for h in (1, 2) for t in (8, 9) for w in random.random(6)]
    late = moves([((0, 1), 9, 1.0, True, False)] * 50, split="test")
    alone = collective.collective_feedback(ibis.memtable(moves(rows)), history_length=2)
    both = collective.collective_feedback(
        ibis.memtable(pa.concat_tables([moves(rows), late])), history_length=2
    )
    assert (alone.shrinkage, alone.low, alone.high) == (both.shrinkage, both.low, both.high)


def test_what_leaves_nothing_to_learn_is_refused():
    same = moves([((0, 1), 2, 0.5, False, False), ((3, 1), 4, 0.5, False, False)])
    with pytest.raises(InputError, match="All 2 training moves have the same shrunk reward, 0.5"):
        collective.collective_feedback(ibis.memtable(same), history_length=2)
    late = moves([((0, 1), 2, 0.5, False, False)], split="test")
    for table in (late, late.slice(0, 0)):
        with pytest.raises(InputError, match="no novel transition from 2 clusters"):
            collective.collective_feedback(ibis.memtable(table), history_length=2)
