"""Gathers from a work directory what the report shows."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recexplore import artifacts
from recexplore.evaluation import experiment_page, figures, loop_page
from recexplore.evaluation.report import Contents, write_report
from recexplore.feedback.transitions import busiest
from recexplore.interests.cluster_table import ClusterTable
from recexplore.serving.exploration import HISTORY
from recexplore.serving.exploration_table import ExplorationTable

_METHODS = {
    "popularity": "popularity",
    "markov": "Markov, last cluster",
    "pair_markov": "Markov, last two clusters",
    "ease": "EASE, all clusters seen",
}
_NO_MODEL = ("popularity", "markov", "pair_markov", "ease", "nearest", "random_novel")
_POLICIES = {
    "random_novel": "random",
    "novelty_only": "novelty model, one draw",
    "best_of_5": "best of 5 by alignment",
    "best_of_20": "best of 20 by alignment",
    "alignment_only": "alignment model, all clusters",
    "exhaustive": "both models, all clusters",
}
_FEW = (1, 5, 20)  # draws, of those shown in the table; all stand in metrics.json
_SIZES = (
    "interactions",
    "users",
    "items",
    "clusters",
    "train transitions",
    "validation transitions",
    "test transitions",
    "validation from",
    "test from",
)
_TOP_BRANCHES = 3  # levels of the cluster tree that give the map its colours


def write(
    work: Path,
    *,
    model_folders: Mapping[str, Path],
    novelty_histories: Mapping[str, int],
    num_examples: int,
    experiment: Path | None = None,
) -> None:
    """Writes report.html from the artefacts of all stages before it.

    Args:
      work: the work directory.
      model_folders: model → folder with its metrics.jsonl.
      novelty_histories: novelty model → how many clusters of history it reads.
      num_examples: explorations shown in words.
      experiment: folder of the experiment, where there was one.
    """
    clusters = ClusterTable.read(work / "clusters")
    table = ExplorationTable.open(work / "exploration", clusters.fingerprint)
    metrics = artifacts.read_json(work / "metrics.json")
    scaling = artifacts.read_json(work / "evaluation" / "scaling.json")
    bins = np.array(artifacts.read_json(work / "evaluation" / "calibration.json"))
    curves = {name: _curves(folder) for name, folder in model_folders.items()}
    methods = {
        **_METHODS,
        **{n: f"novelty model, {k} clusters" for n, k in novelty_histories.items()},
        "novelty_sampled": "novelty model, likeliest of n samples",
        "best_of_n": "best of n by alignment",
    }
    counts = [int(n) for n in scaling["n"]]
    fewer = {f"best_of_{n}": f"best of {n} by alignment" for n in _FEW}
    recommenders = {
        "random_novel": "random order",
        "nearest": "nearest to the last two",
        **{name: words for name, words in methods.items() if name != "best_of_n"},
        **{name: words for name, words in fewer.items() if f"{name}/recall@10" in metrics},
        "best_of_n": methods["best_of_n"],
        "alignment_only": _POLICIES["alignment_only"],
        "exhaustive": _POLICIES["exhaustive"],
    }
    contents = Contents(
        metrics=metrics,
        methods=methods,
        baselines=_NO_MODEL,
        recommenders=recommenders,
        policies=_POLICIES,
        facts=_facts(work, clusters),
        figures={
            "Best of n: what more proposals buy, on held-out histories.": figures.scaling(
                counts, scaling["score"], scaling["recall"], scaling["k"]
            ),
            "Calibration of the alignment model: a tenth of the held-out moves at each dot.": (
                figures.reliability(bins)
            ),
            "Training: loss by step.": figures.training_curves(curves),
            "Interest clusters by their centroids; area shows interactions, colour the branch of "
            "the cluster tree.": figures.cluster_map(
                clusters.centroids,
                clusters.num_interactions,
                _branches(clusters),
                clusters.descriptions,
            ),
        },
        explorations=_some_explorations(table, clusters.descriptions, work, num_examples),
        configuration=(work / "evaluation" / "config.gin").read_text(encoding="utf-8"),
        **_proofs(metrics, experiment),
    )
    write_report(work / "report.html", contents)


def _proofs(metrics: Mapping[str, float], experiment: Path | None) -> dict[str, Any]:
    if experiment is None:
        return {"proofs": loop_page.sections(metrics)}
    study, examples = (
        artifacts.read_json(experiment / name) for name in ("study.json", "examples.json")
    )
    return {
        "claims": experiment_page.claims(metrics),
        "proofs": experiment_page.sections(metrics, study, examples) | loop_page.sections(metrics),
    }


def _curves(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a run that was killed while writing it
            found.append(json.loads(line))
    return found


def _facts(work: Path, clusters: ClusterTable) -> dict[str, Any]:
    counts = {
        **artifacts.read_json(work / "interactions" / "counts.json"),
        "clusters": clusters.num_clusters,
        **artifacts.read_json(work / "feedback" / "counts.json"),
    }
    size = [name for name in _SIZES if name in counts]
    left_out = [name for name in counts if name.startswith(("dropped", "left out"))]
    others = [name for name in counts if name not in {*size, *left_out}]
    shown = [*size, *others, *(name for name in left_out if counts[name])]
    return {name: counts[name] for name in shown}


def _branches(clusters: ClusterTable) -> np.ndarray:
    """The tree node a few levels down that each cluster hangs from."""
    return np.array(
        [(path[:_TOP_BRANCHES] or [cluster])[-1] for cluster, path in enumerate(clusters.paths)]
    )


def _some_explorations(table: ExplorationTable, descriptions: list[str], work: Path, count: int):
    """Explorations of the histories at which most users stood, no two with the same end."""
    histories = artifacts.read_table(work / "feedback" / "histories.parquet", artifacts.HISTORIES)
    shown = []
    for history in busiest(histories, count, lambda h: table.look_up(h).level == HISTORY):
        exploration = table.look_up(history)
        chosen = [
            (descriptions[cluster], 1 / (1 + float(np.exp(-score))), log_probability)
            for cluster, score, log_probability in zip(
                exploration.clusters,
                exploration.scores,
                exploration.log_probabilities,
                strict=True,
            )
        ]
        shown.append(([descriptions[cluster] for cluster in history], chosen[:5]))
    return shown
