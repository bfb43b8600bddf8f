"""What best of n gains, against simulation and on cases that can be told by hand."""

import numpy as np
import pytest
from scipy import special

from recexplore.errors import InputError
from recexplore.evaluation import policies, study

ROWS, CLUSTERS = 60, 30


def visits(noise, seed=0):
    """Scores that know the truth of the history but for noise; users differ from their history."""
    random = np.random.default_rng(seed)
    log_p = random.normal(size=(ROWS, CLUSTERS))
    log_p[random.random(log_p.shape) < 0.2] = -np.inf
    log_p = special.log_softmax(log_p, axis=1)
    believed = random.random((ROWS, CLUSTERS))
    satisfaction = np.clip(believed + 0.05 * random.normal(size=believed.shape), 0, 1)
    scores = special.logit(np.clip(believed, 0.01, 0.99)) + noise * random.normal(size=log_p.shape)
    recent = random.integers(-1, CLUSTERS, (ROWS, 3))
    return study.Visits(np.arange(ROWS) // 2, log_p, scores, satisfaction, believed, recent)


def test_visits_are_read_as_they_were_written(tmp_path):
    written = visits(noise=1.0)
    written.write(tmp_path / "visits.npz")
    for before, after in zip(written, study.Visits.read(tmp_path / "visits.npz"), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-6)
        assert after.dtype == before.dtype
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "visits.npz").read_bytes()[:100])
    (tmp_path / "empty.npz").touch()
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.arange(3))
    for name in ("damaged.npz", "empty.npz", "array.npz", "missing.npz"):
        with pytest.raises(InputError, match=f"{name} holds no visits.*recexplore experiment"):
            study.Visits.read(tmp_path / name)


def test_the_gap_is_closed_by_scores_that_order_as_the_truth_does():
    found = study.gap_closed(visits(noise=0.0))
    assert found["share"] == pytest.approx(1.0, abs=1e-3)
    assert found["share_high"] - found["share_low"] < 1e-3


def test_the_gap_is_not_closed_by_scores_that_know_nothing():
    found = study.gap_closed(visits(noise=1e6))
    assert abs(found["share"]) < 0.2 and found["share_low"] <= found["share"] <= found["share_high"]


def test_swapping_a_part_for_its_oracle_is_what_simulation_finds():
    asked, random = visits(noise=1.0), np.random.default_rng(1)
    found = study.gap_closed(asked, n=5)
    totals = dict.fromkeys(("one_draw", "best_of_n", "alignment_oracle", "user_oracle"), 0.0)
    times = 2000
    for row in range(ROWS):
        draws = random.choice(CLUSTERS, (times, 5), p=np.exp(asked.log_p[row]))
        worth = asked.satisfaction[row][draws]
        totals["one_draw"] += worth[:, 0].sum()
        for name, by in (
            ("best_of_n", asked.scores),
            ("alignment_oracle", asked.believed),
            ("user_oracle", asked.satisfaction),
        ):
            best = by[row][draws].argmax(axis=1)
            totals[name] += worth[np.arange(times), best].sum()
    for name, total in totals.items():
        assert found[f"satisfaction_{name}"] == pytest.approx(total / ROWS / times, abs=0.004)
    possible = np.isfinite(asked.log_p)
    greedy = np.where(possible, asked.scores, -np.inf).argmax(axis=1)
    expected = asked.satisfaction[np.arange(ROWS), greedy].mean()
    assert found["satisfaction_count_oracle"] == pytest.approx(expected)
    top = np.sort(np.where(possible, asked.believed, -np.inf), axis=1)[:, -5:-4]
    proposed = possible & (asked.believed >= top)
    best = np.where(proposed, asked.scores, -np.inf).argmax(axis=1)
    expected = asked.satisfaction[np.arange(ROWS), best].mean()
    assert found["satisfaction_policy_oracle"] == pytest.approx(expected)


def test_scaling_begins_with_one_draw_and_stays_below_the_bound():
    rows = study.scaling(visits(noise=0.5))
    assert len(rows) == len(study.SAMPLE_COUNTS) * len(study.TEMPERATURES)
    plain = [row for row in rows if row["temperature"] == 1.0]
    assert plain[0]["divergence"] == pytest.approx(0, abs=1e-12)
    assert plain[0]["theory_satisfaction"] == pytest.approx(plain[0]["satisfaction"])
    scores = [row["score"] for row in plain]
    assert scores == sorted(scores)
    assert all(row["divergence"] <= row["divergence_bound"] + 1e-12 for row in plain)
    assert all(row["oracle_satisfaction"] >= row["satisfaction"] - 1e-3 for row in plain)


def test_keeping_all_that_was_drawn_gains_nothing_from_scores():
    asked = visits(noise=0.0)
    blind = asked._replace(scores=np.random.default_rng(2).normal(size=asked.scores.shape))
    kept, unseen = (
        {(row["n"], row["k"]): row["satisfaction"] for row in study.kept_of_drawn(some)}
        for some in (asked, blind)
    )
    for n in (5, 10, 20):
        assert kept[n, n] == pytest.approx(unseen[n, n], abs=0.01)
        assert kept[n, 1] > unseen[n, 1] + 0.1


def test_every_part_is_there_and_hedges_fit_what_is_given():
    asked, told = visits(noise=1.0), []
    found = study.everything(asked, 2.0, lambda done, parts: told.append((done, parts)))
    assert set(found) == {"scaling", "gap", "kept", "samplers", "strengths", "hedges"}
    assert told[-1] == (6, 6)
    assert [row["hedge"] for row in found["hedges"]] == ["plain", "soft"]
    again = study.everything(asked, None, lambda done, parts: None, [asked.scores + 1])
    names = [row["hedge"] for row in again["hedges"]]
    assert names == ["plain", "ensemble mean", "ensemble worst case", "ensemble less spread"]
    plain, *others = (row["satisfaction"] for row in again["hedges"])
    assert others == pytest.approx([plain] * 3)  # members that agree on the order
    soft = {row["strength"]: row["satisfaction"] for row in found["strengths"]}
    single = policies.expected(np.exp(asked.log_p), asked.satisfaction).mean()
    assert soft[0.0] == pytest.approx(single) and soft[16.0] > soft[0.0]
