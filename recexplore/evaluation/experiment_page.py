"""The report's part on the experiment: what was claimed, every arm, best of n, and tuning."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from recexplore.evaluation import figures
from recexplore.evaluation.experiment import RIVALS
from recexplore.evaluation.report import figure

ARMS = {
    "control": "no exploration",
    "random_novel": "random novel cluster",
    "popular_novel": "most popular novel cluster",
    "markov": "Markov by the last clusters",
    "bandit": "contextual bandit",
    "novelty_only": "novelty model alone (n = 1)",
    **{f"best_of_{n}": f"best of {n}" for n in (2, 5, 10, 20, 50)},
    "alignment_only": "alignment model alone",
    "exhaustive": "both models over all clusters",
    "policy_gradient": "novelty model tuned on reward",
    "oracle": "best of 20 by the truth",
}
_OURS, _SINGLE = "best_of_20", "novelty_only"
_RIVALS = tuple(name for name in RIVALS if name != _SINGLE)
_COLUMNS = (  # metric, is a change, heading
    ("slot_positive_playback_rate", False, "slot played"),
    ("positive_playback_rate", True, "positive<br>playback"),
    ("completion_rate", True, "completion"),
    ("ueuc", True, "UEUC"),
    ("daily_active_users", True, "daily<br>active"),
    ("interests_gained", False, "interests<br>gained"),
    ("novel_share", False, "novel<br>share"),
    ("distinct_clusters", False, "distinct<br>clusters"),
)
_ENDS = ("", "_low", "_high")
_LIMITS = {
    "one_draw": "one draw of the novelty model",
    "best_of_n": "best of 20, as it is",
    "count_oracle": "with every cluster drawn",
    "policy_oracle": "with the 20 truly best clusters proposed",
    "uniform_proposals": "with 20 clusters proposed at random",
    "alignment_oracle": "with the truth of the history to choose by",
    "all_oracle": "with every cluster drawn and that truth",
    "user_oracle": "with the truth of the very user to choose by",
}


def claims(metrics: Mapping[str, float]) -> list[str]:
    """What the experiment says of what was to be shown, in sentences; whatever it is."""
    found = [
        _setting(metrics),
        _against(metrics, "control"),
        _against(metrics, _SINGLE),
        _rivals(metrics, "positive_playback_rate", "positive playback rate"),
        _rivals(metrics, "ueuc", "number of unique engaged pairs"),
        _gap(metrics),
        _novelty(metrics),
    ]
    return [sentence for sentence in found if sentence]


def sections(
    metrics: Mapping[str, float], study: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Heading → HTML.

    Args:
      metrics: as in metrics.json.
      study: study.json.
      examples: examples.json.
    """
    at_one = [row for row in study["scaling"] if row["temperature"] == 1.0]
    found = {
        "The experiment: every arm": _arms(metrics, "experiment"),
        "Best of n under the truth": figure(
            "What more draws buy: truth, the score they are chosen by, distance from the novelty "
            "model, diversity.",
            figures.best_of_n(at_one),
        )
        + _limits(metrics)
        + _kept(study["kept"])
        + _samplers(study["samplers"]),
    }
    if study["tuning"]:
        curves = {_tuned_in_words(name): rows for name, rows in study["tuning"].items()}
        found["One model tuned on reward instead"] = figure(
            "Answers to held-out histories as tuning goes on.", figures.tuning(curves)
        )
    found["Why these: explorations, candidate by candidate"] = _examples(examples)
    if any(key.startswith("suppressed/") for key in metrics):
        found["With a final ranker that suppresses exploration"] = _suppressed(metrics)
    found["Trusting the score less, and estimates without an experiment"] = _hedges(
        study
    ) + _off_policy(study["off_policy"])
    return found


def _tuned_in_words(name: str) -> str:
    """`free_kl_0_05` is "free, KL 0.05"."""
    if weight := re.search(r"_kl_(\d+(_\d+)?)$", name):
        name = f"{name[: weight.start()]}, KL {weight[1].replace('_', '.')}"
    return name.replace("_", " ")


def _change(metrics: Mapping[str, float], arm: str, metric: str, other: str) -> str:
    """A relative change with its interval, in words; empty if it isn't known."""
    key = f"experiment/{arm}/{metric}_against_{other}"
    if f"{key}_high" not in metrics:
        return ""
    value, low, high = (metrics[f"{key}{end}"] for end in ("", "_low", "_high"))
    verdict = "more" if low > 0 else "less" if high < 0 else "not clearly different"
    return f"<b>{_percent(value)}</b> ({_percent(low)} to {_percent(high)}: {verdict})"


def _setting(metrics: Mapping[str, float]) -> str:
    if "experiment/users" not in metrics:
        return ""
    return (
        f"On a simulated platform of <b>{metrics['experiment/users']:,.0f}</b> users, "
        f"<b>{metrics['experiment/days']:.0f}</b> days, arms differ in what fills one slot of the "
        "page. Positive playback: half of an item or more was watched."
    )


def _against(metrics: Mapping[str, float], other: str) -> str:
    played = _change(metrics, _OURS, "positive_playback_rate", other)
    engaged = _change(metrics, _OURS, "ueuc", other)
    if not played or not engaged:
        return ""
    return (
        f"Best of 20 against {escape(ARMS[other])}: positive playback rate {played}, unique "
        f"engaged user–cluster pairs {engaged}."
    )


def _rivals(metrics: Mapping[str, float], metric: str, words: str) -> str:
    """Which arms best of 20 is above, level with and below in a metric, by interval."""
    above, level, below = [], [], []
    for other in _RIVALS:
        key = f"experiment/{_OURS}/{metric}_against_{other}"
        if f"{key}_high" not in metrics:
            continue
        where = above if metrics[f"{key}_low"] > 0 else level
        (below if metrics[f"{key}_high"] < 0 else where).append(ARMS[other])
    parts = [
        f"{verdict} {escape(', '.join(names))}"
        for verdict, names in (
            ("above", above),
            ("not clearly different from", level),
            ("below", below),
        )
        if names
    ]
    return f"Its {words} is {'; '.join(parts)}." if parts else ""


def _gap(metrics: Mapping[str, float]) -> str:
    if "study/share" not in metrics:
        return ""
    share, low, high = (metrics[f"study/share{end}"] for end in ("", "_low", "_high"))
    return (
        f"The alignment model closes <b>{share:.0%}</b> ({low:.0%} to {high:.0%}) of the gap "
        "between one draw and the best of 20 by the truth, as far as a history can tell it."
    )


def _novelty(metrics: Mapping[str, float]) -> str:
    shares = [metrics.get(f"experiment/{arm}/novel_share") for arm in (_OURS, _SINGLE)]
    change = _change(metrics, _OURS, "novel_share", _SINGLE)
    if None in shares or not change:
        return ""
    return (
        f"Of its impressions <b>{shares[0]:.1%}</b> are in clusters new to the user, of the "
        f"novelty model's alone {shares[1]:.1%}: a change of {change}."
    )


def _percent(value: float) -> str:
    return f"{value:+.1%}".replace("-", "−")


def _arms(metrics: Mapping[str, float], experiment: str) -> str:
    names = [name for name in ARMS if f"{experiment}/{name}/positive_playback_rate" in metrics]
    metric = "slot_positive_playback_rate"
    rows = [
        (ARMS[name], *(metrics[f"{experiment}/{name}/{metric}{end}"] for end in _ENDS))
        for name in names
    ]
    heads = "".join(f"<th class='n'>{head}</th>" for _, _, head in _COLUMNS)
    lines = []
    for name in names:
        cells = "".join(
            _cell(metrics, f"{experiment}/{name}/{metric}", change)
            for metric, change, _ in _COLUMNS
        )
        kind = " class='ours'" if name.startswith("best_of") else ""
        lines.append(f"<tr{kind}><td>{escape(ARMS[name])}</td>{cells}</tr>")
    return (
        f"<table class='wide'><thead><tr><th>arm</th>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
        "<p class='soft'>Arms differ in what fills one slot of the page. Percentages with a sign "
        "are changes of the whole page against no exploration, with what users did before taken "
        "out (CUPED). Small figures are 95 % intervals, users resampled. UEUC: unique engaged "
        "user–cluster pairs a user.</p>"
        + _alike(metrics)
        + figure("Positive playbacks of the slot, by arm.", figures.arms(rows, "share played"))
    )


def _alike(metrics: Mapping[str, float]) -> str:
    """How often intervals see a difference where there is none."""
    names = {
        "positive_playback_rate": "positive playback",
        "ueuc": "UEUC",
        "daily_active_users": "daily active users",
    }
    rates = ", ".join(
        f"{words} {metrics[f'same_treatment/{name}']:.1%} as it is and "
        f"{metrics[f'same_treatment/{name}_adjusted']:.1%} with CUPED"
        for name, words in names.items()
    )
    return (
        "<p class='soft'>When users are split in two for nothing, the intervals see a difference "
        f"in this share of 200 splits (it should be 5 %): {rates}.</p>"
    )


def _cell(metrics: Mapping[str, Any], key: str, change: bool) -> str:
    key = f"{key}_change" if change else key
    if f"{key}_high" not in metrics:
        return "<td class='n'>–</td>"
    show = _percent if change else _number
    value, low, high = (show(metrics[f"{key}{end}"]) for end in _ENDS)
    interval = f"{low} to {high}".replace("%", "").replace(" to +", " to ")
    return f"<td class='n'>{value}<br><span class='interval'>{interval}</span></td>"


def _number(value: float) -> str:
    return (
        f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    )


def _limits(metrics: Mapping[str, float]) -> str:
    """True satisfaction with each part swapped for what could not be better."""
    lines = "".join(
        f"<tr{' class=ours' if name == 'best_of_n' else ''}><td>{escape(words)}</td>"
        f"<td class='n'>{metrics[f'study/satisfaction_{name}']:.4f}</td></tr>"
        for name, words in _LIMITS.items()
        if f"study/satisfaction_{name}" in metrics
    )
    return (
        "<table><thead><tr><th>what limits it: one part swapped at a time</th>"
        f"<th class='n'>true satisfaction</th></tr></thead><tbody>{lines}</tbody></table>"
    )


def _kept(rows: Sequence[Mapping[str, Any]]) -> str:
    """The k best of n: whoever keeps all that was drawn has gained nothing by scoring."""
    counts, sizes = (sorted({row[name] for row in rows}) for name in ("n", "k"))
    value = {(row["n"], row["k"]): f"{row['satisfaction']:.4f}" for row in rows}
    lines = "".join(
        f"<tr><td>{n} drawn</td>"
        + "".join(f"<td class='n'>{value.get((n, k), '')}</td>" for k in sizes)
        + "</tr>"
        for n in counts
    )
    heads = "".join(f"<th class='n'>{k} kept</th>" for k in sizes)
    return (
        "<p class='soft'>True satisfaction of the k of n different clusters of highest score. "
        "With all kept, scoring gains nothing.</p>"
        f"<table><thead><tr><th>n</th>{heads}</tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def _samplers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Independent against distinct draws."""
    names = {"independent": "independent draws", "distinct": "all draws different"}
    counts = sorted({row["n"] for row in rows})
    value = {(row["n"], row["sampler"]): row for row in rows}
    lines = "".join(
        f"<tr><td>{words}</td>"
        + "".join(f"<td class='n'>{value[n, name]['satisfaction']:.4f}</td>" for n in counts)
        + "</tr>"
        for name, words in names.items()
    )
    heads = "".join(f"<th class='n'>n = {n}</th>" for n in counts)
    return (
        "<p class='soft'>True satisfaction of the best of n.</p>"
        f"<table><thead><tr><th>draws</th>{heads}</tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for example in examples:
        words = escape(" → ".join(example["history"]))
        last = len(example["candidates"]) - 1
        for place, candidate in enumerate(example["candidates"]):
            marks = " ".join(["first"] * (place == 0) + ["last"] * (place == last))
            name = escape(candidate["description"])
            name = f"<b>{name}</b>, chosen" if candidate["chosen"] else name
            rows.append(
                f"<tr class='{marks}'><td>{words if place == 0 else ''}</td><td>{name}</td>"
                f"<td class='n'>{candidate['probability']:.1%}</td>"
                f"<td class='n'>{candidate['score']:.3f}</td>"
                f"<td class='n'>{candidate['truth']:.3f}</td></tr>"
            )
    return (
        "<table class='list'><thead><tr><th>history</th><th>candidates drawn, best first</th>"
        "<th class='n'>novelty</th><th class='n'>alignment</th><th class='n'>truth</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table><p class='soft'>Best of 20 at the "
        "histories at which most users stood. Novelty: the novelty model's probability. Alignment: "
        "predicted feedback, 0 to 1. Truth: expected satisfaction of users with that history.</p>"
    )


def _suppressed(metrics: Mapping[str, float]) -> str:
    """How much of an arm's effect is left when a ranker throws exploration out."""
    metric = "positive_playback_rate"
    lines = []
    for name, words in ARMS.items():
        key = f"suppressed/{name}/{metric}"
        if name == "control" or key not in metrics:
            continue
        cells = [
            _cell(metrics, f"{experiment}/{name}/{measure}", change)
            for measure, change in (
                ("explored_share", False),
                ("explored_positive_playback_rate", False),
                ("ueuc", True),
            )
            for experiment in ("experiment", "suppressed")
        ]
        lines.append(f"<tr><td>{escape(words)}</td>{''.join(cells)}</tr>")
    groups = ("slots that explore", "exploration played", "UEUC, change")
    head = "".join(f"<th class='group' colspan='2'>{group}</th>" for group in groups)
    below = "<th class='n'>all</th><th class='n'>suppressed</th>" * len(groups)
    return (
        f"<table class='wide'><thead><tr><th class='group'></th>{head}</tr><tr><th>arm</th>{below}"
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "<p class='soft'>The same experiment, but the final ranker throws out the exploration "
        "items that it expects least of.</p>"
    )


def _hedges(study: Mapping[str, Any]) -> str:
    """What choosing less greedily costs and buys."""
    lines = "".join(
        f"<tr><td>{escape(row['hedge'])}</td><td class='n'>{row['score']:.3f}</td>"
        f"<td class='n'>{row['satisfaction']:.4f}</td>"
        f"<td class='n'>{row['effective_clusters']:.1f}</td>"
        f"<td class='n'>{row['divergence']:.2f}</td></tr>"
        for row in study["hedges"]
    )
    return (
        "<table><thead><tr><th>best of 20, chosen by</th><th class='n'>alignment score</th>"
        "<th class='n'>true satisfaction</th><th class='n'>clusters, effectively</th>"
        f"<th class='n'>KL</th></tr></thead><tbody>{lines}</tbody></table>{_soft(study)}"
    )


def _soft(study: Mapping[str, Any]) -> str:
    chosen = study["strength"]["chosen"]
    if chosen is None:
        return (
            "<p class='soft'>There was too little feedback in randomly filled slots to choose a "
            "softer selection on.</p>"
        )
    return (
        "<p class='soft'>Soft: one of the 20, with probability in proportion to "
        f"exp({chosen:g} · score); of the strengths that can be told, feedback in randomly filled "
        "slots is highest there.</p>"
    )


def _off_policy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Estimates of arms from randomly filled slots, beside the truth of the same days."""
    kinds = {
        "inverse_propensity": "inverse propensity",
        "self_normalised": "self-normalised",
        "doubly_robust": "doubly robust",
    }
    lines = []
    for row in rows:
        cells = "".join(_cell(row, kind, change=False) for kind in kinds)
        lines.append(
            f"<tr><td>{escape(ARMS[row['arm']])}</td><td class='n'>{row['truth']:.3f}</td>{cells}"
            f"<td class='n'>{row['effective']:.0f}</td></tr>"
        )
    heads = "".join(f"<th class='n'>{head}</th>" for head in kinds.values())
    return (
        f"<table><thead><tr><th>watch fraction in the slot</th><th class='n'>truth</th>{heads}"
        f"<th class='n'>rows' worth</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "<p class='soft'>What randomly filled slots on the days after the log say of arms that "
        "were not tried, and what each gets when one of those days is lived with it; items are "
        "drawn uniformly from the cluster.</p>"
    )
