"""What is asked of the models on the held-out period, with models that are tables."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from recexplore import artifacts, held_out, pipeline
from recexplore.evaluation import logged, metrics, off_policy, offline
from recexplore.evaluation.arms import Asked
from recexplore.evaluation.baselines import Rows
from recexplore.evaluation.offline import SUFFIXES
from recexplore.explorer import Explorer
from recexplore.inference.best_of_n import Exploration
from recexplore.inference.launch import Model
from recexplore.inference.selection import BestOfN
from recexplore.progress import Progress

M = 14
MODEL = Model(None, None)  # what it is made of is nobody's business here


def some_rows(count, seed):
    random = np.random.default_rng(seed)
    last_two = random.permuted(np.tile(np.arange(4), (count, 1)), axis=1)[:, :2]
    seen = np.zeros((count, M), bool)
    np.put_along_axis(seen, last_two, True, axis=1)
    users = np.array([f"u{i % 12}" for i in range(count)])
    return Rows(users, last_two.tolist(), last_two, random.integers(4, M, count), seen)


ROWS = some_rows(50, 2)


class Tables(Explorer):
    """An explorer whose models are functions of the last cluster; it counts what it is asked."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.log_p = np.log(random.dirichlet(np.ones(M), M))
        self.logits = random.normal(size=(M, M))
        self.asked = []

    num_clusters = M

    def scores(self, model, histories, progress):
        self.asked += histories
        return self.logits[[history[-1] for history in histories]]

    def log_probabilities(self, model, histories, excluded, progress):
        log_p = self.log_p[[history[-1] for history in histories]]
        return np.where(excluded, -np.inf, log_p[:, None])

    def explore(self, novelty, alignment, histories, banned, settings, seed, progress):
        random = np.random.default_rng(seed)
        n = settings.num_samples
        clusters = np.stack([
            random.choice(np.setdiff1d(np.arange(M), [*history, *out]), n)
            for history, out in zip(histories, banned, strict=True)
        ])  # fmt: skip
        last = np.array([history[-1] for history in histories])[:, None]
        scores = self.logits[last, clusters]
        chosen = offline.choose(clusters, scores, settings.num_chosen)
        own = [np.where(chosen < 0, -np.inf, t[last, chosen]) for t in (self.logits, self.log_p)]
        draws = SimpleNamespace(clusters=clusters, log_probabilities=self.log_p[last, clusters])
        return Exploration(chosen, *own, (chosen >= 0) * 1.0, draws, scores, None, None)


@pytest.fixture
def progress():
    return Progress(silent=True)


@pytest.fixture
def board():
    centroids = np.random.default_rng(1).normal(size=(M, 3))
    return held_out.board_with_baselines(some_rows(80, 0), some_rows(40, 1), ROWS, centroids, 0)


def recall(scores, kind):
    mask = ROWS.known_mask if kind == "seen" else ROWS.history_mask
    return metrics.recall(metrics.ranks(scores, ROWS.targets, mask), 10).mean()


def test_the_alignment_model_is_asked_once_for_each_different_history(progress):
    explorer = Tables()
    histories = [*ROWS.histories, [1, 3], [3, 1]]
    scores, which = held_out.score_distinct(explorer, MODEL, histories, progress)
    different = {tuple(history) for history in histories}
    assert len(explorer.asked) == len(different) < len(histories)
    expected = explorer.logits[[history[-1] for history in histories]]
    np.testing.assert_array_equal(scores[which], expected)


def test_the_board_begins_with_all_that_needs_no_model(board):
    found = board.metrics()
    names = {key.split("/")[0] for key in found}
    assert names == {"popularity", "markov", "pair_markov", "ease", "nearest", "random_novel"}
    for suffix in SUFFIXES.values():
        assert found[f"random_novel/coverage@10{suffix}"] == 1.0
        assert found[f"random_novel/recall@10{suffix}"] == pytest.approx(10 / 12, abs=0.2)
        assert found[f"nearest/serendipity@10{suffix}"] == 0.0


def test_models_rank_by_likelihood_by_score_and_by_both(board, progress):
    explorer = Tables()
    last = ROWS.last_two[:, 1]
    log_p, scores = explorer.log_p[last], explorer.logits[last]
    held_out.add_models(
        board,
        explorer,
        {"novelty": MODEL, "other": MODEL},
        ROWS,
        scores,
        progress,
        novelty_histories={"novelty": 2, "other": 1},
        explores="novelty",
        relevance_weight=3.0,
    )
    found = board.metrics()
    methods = {"novelty": log_p, "alignment_only": scores, "exhaustive": log_p + 3 * scores}
    for kind, suffix in SUFFIXES.items():
        for name, values in methods.items():
            assert found[f"{name}/recall@10{suffix}"] == pytest.approx(recall(values, kind))


def test_best_of_few_are_the_first_of_the_same_draws(board, progress):
    explorer = Tables()
    settings = BestOfN(num_samples=20, num_chosen=10)
    scaling, found = held_out.add_best_of_n(
        board,
        explorer,
        (MODEL, MODEL),
        ROWS,
        progress,
        history_length=2,
        settings=settings,
        proposal_counts=(1, 5, 20, 50),
        seed=4,
    )
    found = board.metrics()
    assert scaling["n"] == [1.0, 5.0, 20.0]
    names = ("best_of_1", "best_of_5", "best_of_20")  # 20 are all there are
    assert [found[f"{name}/recall@10"] for name in names] == pytest.approx(scaling["recall"])
    drawn = explorer.explore(MODEL, MODEL, ROWS.histories, [[]] * 50, settings, 4, None).draws
    first = drawn.clusters[:, 0]
    assert found["best_of_1/recall@10"] == pytest.approx((first == ROWS.targets).mean())
    assert found["best_of_1/coverage@10"] == pytest.approx(len(set(first)) / M)
    assert "best_of_50/recall@10" not in found


def test_the_first_answers_are_written_in_words(progress):
    explorer = Tables()
    settings = BestOfN(num_samples=10, num_chosen=10)
    found = explorer.explore(MODEL, MODEL, ROWS.histories, [[]] * 50, settings, 4, None)
    words = [f"cluster {cluster}" for cluster in range(M)]
    said = list(held_out.inferences(ROWS, found, words, 1, count=7))
    assert len(said) == 7 and len(list(held_out.inferences(ROWS, found, words, 1, 60))) == 50
    for row, line in enumerate(said):
        last = ROWS.histories[row][-1]
        assert line["inputs"] == {
            "inputs_pretokenized": f"interests: cluster {last}; next:",
            "targets_pretokenized": words[ROWS.targets[row]],
        }
        chosen = [words.index(text) for text in line["aux"]["predictions"]]
        assert 0 < len(chosen) <= 10 and line["prediction"] == words[chosen[0]]
        assert set(chosen) == set(found.draws.clusters[row])
        assert line["aux"]["scores"] == pytest.approx(sorted(explorer.logits[last, chosen])[::-1])
        assert line["aux"]["log_probabilities"] == pytest.approx(explorer.log_p[last, chosen])


def test_every_policy_is_valued_by_its_models_and_what_training_says_of_clusters(progress):
    explorer, random = Tables(), np.random.default_rng(5)
    count, histories = 200, [[0, 1], [2, 3], [1, 0]]
    codes = random.integers(0, 3, count)
    allowed = random.random((count, M)) < 0.5
    allowed[:, -1] = True
    for row, code in zip(allowed, codes, strict=True):
        row[histories[code]] = False
    log = off_policy.Log(
        np.arange(count),
        random.integers(0, M, count),
        random.random(count),
        0.1 + 0.9 * random.random(count),
        np.arange(count) // 4,
    )
    impressions = logged.Impressions(histories, Asked(codes, allowed), log, np.full(count, 0.5))
    transitions = pa.table(
        {
            "split": ["train"] * M + ["test"] * M,
            "next_cluster": pa.array([*range(M)] * 2, pa.int32()),
            "watch_fraction": pa.array([0.25] * M + [0.9] * M, pa.float32()),
        }
    )
    found = held_out.off_policy_metrics(
        explorer, (MODEL, MODEL), impressions, transitions, progress, relevance_weight=2.0, seed=0
    )
    last = np.array([histories[code][-1] for code in codes])
    p = np.where(allowed, np.exp(explorer.log_p[last]), 0.0)
    p /= p.sum(axis=1, keepdims=True)
    both = np.where(allowed, explorer.log_p[last] + 2.0 * explorer.logits[last], -np.inf)
    for name, q in (("novelty_only", p), ("exhaustive", np.eye(M)[both.argmax(axis=1)])):
        weights = q[np.arange(count), log.actions] * 0.5 / log.propensities
        assert found[f"{name}/off_policy_ips"] == pytest.approx((weights * log.rewards).mean())
        robust = 0.25 + weights * (log.rewards - 0.25)
        assert found[f"{name}/off_policy_dr"] == pytest.approx(robust.mean())
    assert len({key.split("/")[0] for key in found}) == 6


def test_a_log_that_cannot_tell_values_is_said_in_a_line(tmp_path, capsys):
    def impressions():
        return pipeline._logged_impressions(
            tmp_path, Progress(terminal=False), M, history_length=2, num_users=None, seed=0
        )

    columns = {
        "user_id": ["a", "a"],
        "item_id": ["v", "v"],
        "timestamp": [2, 5],
        "watch_fraction": [0.5, 0.5],
        **dict.fromkeys(("liked", "shared", "skipped"), [False, True]),
        "policy": [None, None],
    }
    items = {"item_id": ["v"], "title": ["v"], "text": ["v"], "embedding": [None]}
    folder = tmp_path / "interactions"
    artifacts.write_table(folder / "items.parquet", pa.table(items), artifacts.ITEMS)

    def log(propensities):
        table = pa.table({**columns, "propensity": propensities})
        artifacts.write_table(folder / "interactions.parquet", table, artifacts.INTERACTIONS)

    without = "no off-policy values: the log has impressions without a propensity"
    log([None, None])
    assert impressions() is None
    assert without in capsys.readouterr().err
    log([0.5, 0.5])  # the feedback is of an older version, which didn't say when testing begins
    assert impressions() is None
    assert "recexplore aggregate --overwrite" in capsys.readouterr().err
    known = {"test": 3, "look_back_days": None}
    artifacts.write_json(tmp_path / "feedback" / "periods.json", known)
    log([0.5, None])
    assert impressions() is None
    assert without in capsys.readouterr().err
