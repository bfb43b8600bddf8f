"""One self-contained page: what was run, how good it is, what it proposes."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from recexplore import artifacts

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.8rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.lead { color: #4a5568; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: #4a5568; font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.92rem; } td, th { padding: 0.3rem 0.7rem;
  text-align: left; border-bottom: 1px solid #e2e8f0; vertical-align: top; }
th { border-bottom: 2px solid #a0aec0; } td.n, th.n { text-align: right; }
td.n { font-variant-numeric: tabular-nums; } td { white-space: nowrap; }
.best { font-weight: 700; } .interval { color: #718096; font-size: 0.82rem; }
pre { background: #f7fafc; padding: 0.8rem; overflow-x: auto; font-size: 0.82rem; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } }
"""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What goes into the report.

    Attributes:
      metrics: as in metrics.json.
      methods: ranking methods in the order to show them: metric prefix → name in words.
      facts: what the data are: name → value.
      figures: caption → SVG text.
      explorations: history in words → chosen clusters: description, score as a probability,
        log-probability.
      configuration: the run's bindings, as text.
    """

    metrics: Mapping[str, float]
    methods: Mapping[str, str]
    facts: Mapping[str, Any]
    figures: Mapping[str, str]
    explorations: Sequence[tuple[Sequence[str], Sequence[tuple[str, float, float]]]]
    configuration: str


def write_report(path: Path, contents: Contents) -> None:
    """Writes the page, atomically; same contents, same bytes."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>recexplore report</title><style>{_STYLE}</style></head><body>",
        "<h1>Exploration report</h1>",
        _summary(contents.metrics),
        "<h2>Finding the next novel cluster</h2>",
        _ranking_table(contents),
        "<h2>Predicting collective feedback</h2>",
        _alignment_table(contents.metrics),
        *(
            f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, svg in contents.figures.items()
        ),
        "<h2>Explorations in words</h2>",
        _explorations(contents.explorations),
        "<h2>Data</h2>",
        _facts(contents.facts),
        f"<h2>Configuration</h2><pre>{escape(contents.configuration)}</pre>",
        "</body></html>\n",
    ]
    with artifacts.new_file(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _summary(metrics: Mapping[str, float]) -> str:
    def value(name: str) -> float:
        return metrics.get(name, float("nan"))

    return (
        "<p class='lead'>From a user's last clusters alone, the novelty model has the next novel "
        f"cluster among its first ten in <b>{value('novelty/recall@10'):.1%}</b> of held-out moves "
        f"(popularity {value('popularity/recall@10'):.1%}, Markov "
        f"{value('markov/recall@10'):.1%}). The alignment model orders "
        f"<b>{value('alignment/pairwise_accuracy'):.1%}</b> of pairs of held-out feedback "
        f"correctly (the next cluster's mean: {value('target_mean/pairwise_accuracy'):.1%}). The "
        f"exploration table answers {value('explore/histories'):,.0f} histories with "
        f"{value('explore/distinct_clusters'):.0f} distinct clusters; "
        f"{value('explore/valid_fraction'):.0%} of its answers are clusters that exist and "
        f"{value('explore/novel_fraction'):.0%} are new to the history.</p>"
    )


def _ranking_table(contents: Contents) -> str:
    columns = ("recall@10", "ndcg@10", "recall@10_unseen", "ndcg@10_unseen")
    heads = (
        "recall@10, history left out",
        "NDCG@10, history left out",
        "recall@10, all seen left out",
        "NDCG@10, all seen left out",
    )
    metrics = contents.metrics
    best = {c: max(metrics.get(f"{m}/{c}", -1.0) for m in contents.methods) for c in columns}
    rows = []
    for method, name in contents.methods.items():
        cells = []
        for column in columns:
            key = f"{method}/{column}"
            if key not in metrics:
                cells.append("<td class='n'>–</td>")
                continue
            mark = " best" if metrics[key] == best[column] else ""
            interval = f"{metrics[f'{key}_low']:.3f} – {metrics[f'{key}_high']:.3f}"
            cells.append(
                f"<td class='n{mark}'>{metrics[key]:.3f}<br>"
                f"<span class='interval'>{interval}</span></td>"
            )
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th class='n'>{head}</th>" for head in heads)
    return (
        f"<table><tr><th>method</th>{head}</tr>{''.join(rows)}</table>"
        "<p class='lead'>Every cluster is ranked for every held-out novel transition. Small "
        "figures are 95 % intervals, users resampled. The best of each column is bold.</p>"
    )


def _alignment_table(metrics: Mapping[str, float]) -> str:
    columns = {
        "pairwise_accuracy": "pairs in order",
        "pairwise_accuracy_same_history": "pairs of the same history in order",
        "spearman": "Spearman",
    }
    names = {"alignment": "alignment model", "target_mean": "mean of the next cluster"}
    head = "".join(f"<th class='n'>{label}</th>" for label in columns.values())
    rows = []
    for prefix, name in names.items():
        values = (metrics.get(f"{prefix}/{column}") for column in columns)
        cells = (f"<td class='n'>{'–' if v is None else f'{v:.3f}'}</td>" for v in values)
        rows.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th>method</th>{head}</tr>{''.join(rows)}</table>"


def _explorations(explorations) -> str:
    rows = []
    for history, chosen in explorations:
        words = " → ".join(map(escape, history))
        answers = "<br>".join(
            f"{escape(description)} <span class='interval'>feedback {score:.2f}, "
            f"log p {log_probability:.1f}</span>"
            for description, score, log_probability in chosen
        )
        rows.append(f"<tr><td>{words}</td><td>{answers}</td></tr>")
    return f"<table><tr><th>history</th><th>explores</th></tr>{''.join(rows)}</table>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{escape(name)}</td><td class='n'>{escape(_readable(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _readable(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)
