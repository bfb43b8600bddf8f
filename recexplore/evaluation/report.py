"""One self-contained page: what was run, how good it is, what it proposes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from recexplore import artifacts

_STYLE = """
:root { --ink: #1a202c; --soft: #4a5568; --line: #e2e8f0; --accent: #2b6cb0; }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
  background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; margin: 0 0 .6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0 .9rem; } .soft { color: var(--soft); font-size: .92rem; }
.summary { border-left: 4px solid var(--accent); padding: .1rem 0 .1rem 1rem; }
.summary p { margin: .45rem 0; }
figure { margin: 1.4rem 0; } figure svg { max-width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { border-bottom: 2px solid #a0aec0; vertical-align: bottom; } thead .group { border: 0;
  padding-bottom: 0; color: var(--soft); font-weight: 600; text-align: center; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.ours { background: #f3f7fc; } .best { font-weight: 700; }
.interval { color: var(--soft); font-size: .84em; font-weight: 400; }
dl { display: grid; grid-template-columns: 1fr 1fr; column-gap: 3rem; margin: .5rem 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .3rem .2rem;
  border-bottom: 1px solid var(--line); font-size: .92rem; break-inside: avoid; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
table.wide { font-size: .8rem; } table.wide td, table.wide th { padding: .35rem .3rem; }
table.wide td:first-child { min-width: 9.5rem; }
table.list td { padding: .15rem .7rem; border: 0; }
table.list tr.first td { border-top: 1px solid var(--line); padding-top: .5rem; }
table.list tr.last td { padding-bottom: .5rem; }
pre { background: #f7fafc; padding: .9rem; font-size: .8rem; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; }
  h2, figcaption { break-after: avoid; } figure, tr { break-inside: avoid; }
  thead { display: table-header-group; } }
"""
_COLUMNS = {"recall@10": "recall@10", "ndcg@10": "NDCG@10"}
_KINDS = {"": "history left out", "_unseen": "all seen left out"}
_RECOMMENDED = {  # column → heading, digits
    "recall@10": ("recall@10", 3),
    "serendipity@10": ("serendipity", 3),
    "engaged_pairs@10": ("engaged pairs", 2),
    "novelty@10": ("novelty, bits", 2),
    "coverage@10": ("coverage", 2),
}
_OFF_POLICY = {
    "off_policy_ips": ("inverse propensity", 3),
    "off_policy_snips": ("self-normalised", 3),
    "off_policy_dr": ("doubly robust", 3),
    "off_policy_ess": ("effective rows", 0),
}
_ITEMS = {
    "items": "item recommender",
    "items_popularity": "popularity, fading",
    "items_cooccurrence": "co-occurrence with the last items",
}
_ITEM_COLUMNS = {
    "recall@5": ("recall@5", 3),
    "recall@10": ("recall@10", 3),
    "recall@20": ("recall@20", 3),
    "ndcg@10": ("NDCG@10", 3),
}
_ALIGNMENT_COLUMNS = {
    "pairwise_accuracy": "pairs in order",
    "pairwise_accuracy_same_history": "pairs in order, same history",
    "spearman": "Spearman",
    "calibration_error": "calibration error",
}


@dataclasses.dataclass(frozen=True)
class Contents:
    """What goes into the report.

    Attributes:
      metrics: as in metrics.json; what is missing is shown as a dash.
      methods: ranking methods in the order to show them: metric prefix → name in words.
      facts: what the data are: name → value.
      figures: caption → SVG text.
      explorations: history in words → chosen clusters: description, score as a probability,
        log-probability.
      configuration: the run's bindings, as text.
      baselines: the methods among `methods` that ours should beat.
      recommenders: methods whose recommendations are described, likewise.
      policies: what is valued on logged propensities, likewise; shown where it was.
      claims: sentences that stand first, as HTML.
      proofs: heading → HTML of sections that come before all others.
    """

    metrics: Mapping[str, float]
    methods: Mapping[str, str]
    facts: Mapping[str, Any]
    figures: Mapping[str, str]
    explorations: Sequence[tuple[Sequence[str], Sequence[tuple[str, float, float]]]]
    configuration: str
    baselines: Sequence[str] = ("popularity", "markov", "pair_markov", "ease")
    recommenders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    policies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    claims: Sequence[str] = ()
    proofs: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_report(path: Path, contents: Contents) -> None:
    """Writes the page, atomically; same contents, same bytes.

    Args:
      path: of the page.
      contents: all text in it is escaped; the figures' SVG is taken as it is.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>recexplore report</title><style>{_STYLE}</style></head><body>",
        "<h1>Exploration report</h1>",
        _summary(contents),
        *(f"<h2>{escape(heading)}</h2>{body}" for heading, body in contents.proofs.items()),
        "<h2>Data</h2>",
        _facts(contents.facts),
        "<h2>Finding the next novel cluster</h2>",
        _ranking_table(contents),
        _recommended(contents),
        _off_policy(contents),
        "<h2>Predicting collective feedback</h2>",
        _alignment_table(contents.metrics),
        _items_within_their_cluster(contents),
        "<h2>Figures</h2>",
        *(figure(caption, svg) for caption, svg in contents.figures.items()),
        "<h2>Explorations in words</h2>",
        _explorations(contents.explorations),
        f"<h2>Configuration</h2><pre>{escape(contents.configuration)}</pre>",
        "</body></html>\n",
    ]
    with artifacts.new_file(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def figure(caption: str, svg: str) -> str:
    """A figure with its caption, as HTML."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _summary(contents: Contents) -> str:
    sentences = [
        *contents.claims,
        _ranking_sentence(contents, "recall@10", "with the history left out of the ranking"),
        _ranking_sentence(contents, "recall@10_unseen", "with all that the user has seen left out"),
        _alignment_sentence(contents.metrics),
        _exploration_sentence(contents.metrics),
    ]
    return f"<div class='summary'>{''.join(f'<p>{s}</p>' for s in sentences if s)}</div>"


def _ranking_sentence(contents: Contents, column: str, when: str) -> str:
    """Our best method beside the best baseline, whichever of them is ahead."""
    values = {
        name: contents.metrics[f"{name}/{column}"]
        for name in contents.methods
        if f"{name}/{column}" in contents.metrics
    }
    ours = [name for name in values if name not in contents.baselines]
    theirs = [name for name in values if name in contents.baselines]
    if not ours or not theirs:
        return ""
    mine, rival = (max(names, key=values.__getitem__) for names in (ours, theirs))
    verdict = _verdict(values[mine], values[rival])
    return (
        f"The next novel cluster, {when}, is among the first ten in <b>{values[mine]:.1%}</b> of "
        f"held-out moves for our best method ({escape(contents.methods[mine])}): {verdict} the "
        f"best baseline's {values[rival]:.1%} ({escape(contents.methods[rival])})."
    )


def _alignment_sentence(metrics: Mapping[str, float]) -> str:
    models = ("alignment", "target_mean", "target_mean_shrunk")
    values = [metrics.get(f"{model}/pairwise_accuracy") for model in models]
    if None in values:
        return ""
    own, mean = values[0], max(values[1:])
    return (
        f"The alignment model puts <b>{own:.1%}</b> of pairs of held-out feedback in order: "
        f"{_verdict(own, mean)} the {mean:.1%} of the next cluster's mean."
    )


def _exploration_sentence(metrics: Mapping[str, float]) -> str:
    names = ("histories", "distinct_clusters", "valid_fraction", "novel_fraction")
    values = [metrics.get(f"explore/{name}") for name in names]
    if None in values:
        return ""
    histories, distinct, valid, novel = values
    return (
        f"The exploration table answers {histories:,.0f} histories with {distinct:.0f} distinct "
        f"clusters; {_share(valid)} of its answers exist and {_share(novel)} are new to the "
        "history."
    )


def _verdict(own: float, other: float) -> str:
    return "above" if own > other else "below" if own < other else "level with"


def _share(value: float) -> str:
    """A percentage that says 100 only of the whole."""
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"


def _ranking_table(contents: Contents) -> str:
    columns = [f"{column}{kind}" for kind in _KINDS for column in _COLUMNS]
    metrics = contents.metrics
    best = {c: max(metrics.get(f"{m}/{c}", -1.0) for m in contents.methods) for c in columns}
    rows = []
    for method, name in contents.methods.items():
        cells = "".join(_cell(metrics, f"{method}/{column}", best[column]) for column in columns)
        kind = "" if method in contents.baselines else " class='ours'"
        rows.append(f"<tr{kind}><td>{escape(name)}</td>{cells}</tr>")
    groups = "".join(
        f"<th class='group' colspan='{len(_COLUMNS)}'>{label}</th>" for label in _KINDS.values()
    )
    heads = "".join(f"<th class='n'>{head}</th>" for head in _COLUMNS.values()) * len(_KINDS)
    return (
        f"<table><thead><tr><th class='group'></th>{groups}</tr>"
        f"<tr><th>method</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "<p class='soft'>Every cluster is ranked for every held-out novel transition. Small "
        "figures are 95 % intervals, users resampled; the best of each column is bold; our "
        "methods are shaded. Baselines' constants were chosen on the validation period.</p>"
    )


def _recommended(contents: Contents) -> str:
    columns = {f"{column}_unseen": head for column, head in _RECOMMENDED.items()}
    table = _plain_table(contents, contents.recommenders, "method", columns)
    if not table:
        return ""
    return (
        f"<h2>What is recommended</h2>{table}<p class='soft'>The first ten of each method, all "
        "that the user has seen left out; best of n has at most n. Serendipity: the next cluster "
        "is among them, but among the first ten neither by popularity nor by nearness to the last "
        "two clusters. Engaged pairs: of a user's first ten, the clusters that they moved into in "
        "the whole period, mean over users. Novelty: mean of −log₂ of a recommended cluster's "
        "share of the training moves. Coverage: share of all clusters recommended to anyone.</p>"
    )


def _off_policy(contents: Contents) -> str:
    table = _plain_table(contents, contents.policies, "policy", _OFF_POLICY)
    if not table:
        return ""
    return (
        f"<h2>What the log says of other policies</h2>{table}<p class='soft'>Mean watch fraction "
        "if every held-out impression had been filled by the policy: a cluster new to the user, "
        "and any of its items. Estimated from logged propensities. Effective rows: how many "
        "impressions of the policy's own would tell as much; where they are few, even the "
        "intervals are too narrow.</p>"
    )


def _items_within_their_cluster(contents: Contents) -> str:
    baselines = tuple(name for name in _ITEMS if name != "items")
    beside = dataclasses.replace(contents, baselines=baselines)
    table = _plain_table(beside, _ITEMS, "method", _ITEM_COLUMNS)
    if not table:
        return ""
    return (
        f"<h2>Items within their cluster</h2>{table}<p class='soft'>For every item that a user "
        "engaged with in the held-out period, all items of its cluster that the user hadn't met "
        "are ranked. Baselines' constants were chosen on the validation period.</p>"
    )


def _plain_table(
    contents: Contents,
    names: Mapping[str, str],
    what: str,
    columns: Mapping[str, tuple[str, int]],
) -> str:
    """A row for each that has any of the columns; empty if none has."""
    rows = []
    for method, name in names.items():
        if any(f"{method}/{column}" in contents.metrics for column in columns):
            cells = "".join(
                _cell(contents.metrics, f"{method}/{column}", digits=digits)
                for column, (_, digits) in columns.items()
            )
            kind = "" if method in contents.baselines else " class='ours'"
            rows.append(f"<tr{kind}><td>{escape(name)}</td>{cells}</tr>")
    if not rows:
        return ""
    heads = "".join(f"<th class='n'>{head}</th>" for head, _ in columns.values())
    return (
        f"<table><thead><tr><th>{what}</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table>"
    )


def _cell(
    metrics: Mapping[str, float], key: str, best: float | None = None, digits: int = 3
) -> str:
    if key not in metrics:
        return "<td class='n'>–</td>"
    mark = " best" if metrics[key] == best else ""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    interval = (
        ""
        if low is None or high is None
        else f"<br><span class='interval'>{low:.{digits}f} – {high:.{digits}f}</span>"
    )
    return f"<td class='n{mark}'>{metrics[key]:,.{digits}f}{interval}</td>"


def _alignment_table(metrics: Mapping[str, float]) -> str:
    names = {
        "alignment": "alignment model",
        "target_mean": "mean of the next cluster",
        "target_mean_shrunk": "the same, shrunk towards the overall mean",
    }
    head = "".join(f"<th class='n'>{label}</th>" for label in _ALIGNMENT_COLUMNS.values())
    rows = []
    for prefix, name in names.items():
        values = (metrics.get(f"{prefix}/{column}") for column in _ALIGNMENT_COLUMNS)
        cells = (f"<td class='n'>{'–' if v is None else f'{v:.3f}'}</td>" for v in values)
        rows.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return (
        f"<table><thead><tr><th>method</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table><p class='soft'>Guessing puts half of all pairs in order. The calibration error "
        "is the mean distance of predicted and held-out feedback by tenths of the prediction: "
        "lower is better.</p>"
    )


def _explorations(explorations) -> str:
    rows = []
    for history, chosen in explorations:
        words = " → ".join(map(escape, history))
        for place, (description, score, log_probability) in enumerate(chosen):
            first, last = place == 0, place == len(chosen) - 1
            marks = " ".join(["first"] * first + ["last"] * last)
            rows.append(
                f"<tr class='{marks}'><td>{words if first else ''}</td>"
                f"<td>{escape(description)}</td><td class='n'>{score:.3f}</td>"
                f"<td class='n'>{_signed(log_probability)}</td></tr>"
            )
    return (
        "<table class='list'><thead><tr><th>history</th><th>explores</th>"
        "<th class='n'>predicted feedback</th><th class='n'>log-probability</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _signed(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(_readable(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def _readable(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
        return f"{value:,.4g}"
    return f"{value:,.0f}"
