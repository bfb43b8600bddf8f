"""The closed loop on the page: what each round of exploring and learning was worth."""

import math
from collections.abc import Mapping
from html import escape

from recexplore.evaluation import figures
from recexplore.evaluation.report import figure

HEADING = "Closing the loop"
_PREFIX = "closed_loop/round_"
_WORDS = {
    "random": "any new cluster",
    "first": "the first table, kept",
    "latest": "the table of each round",
}


def num_rounds(metrics: Mapping[str, float]) -> int:
    """How many rounds there were."""
    return len({name.split("/")[1] for name in metrics if name.startswith(_PREFIX)})


def sections(metrics: Mapping[str, float]) -> dict[str, str]:
    """Heading → HTML; empty where there was no loop.

    Args:
      metrics: as in metrics.json.
    """
    rounds = range(1, num_rounds(metrics) + 1)
    if not rounds:
        return {}
    lines = {
        words: [_estimate(metrics, f"{number}/{arm}/satisfaction") for number in rounds]
        for arm, words in _WORDS.items()
    }
    svg = figures.rounds(lines, "true satisfaction with explorations")
    words = (
        "<p>Each round explores by a table learned from all that was logged before it. Users who "
        "stay with the first table, and users who are shown any new cluster, live at the same "
        "time. 95 % intervals, users resampled.</p>"
    )
    shown = figure("Satisfaction with explorations, round by round.", svg)
    return {HEADING: f"{_claim(metrics, rounds[-1])}{words}{shown}{_table(metrics)}"}


def _estimate(metrics: Mapping[str, float], name: str) -> tuple[float, float, float]:
    """Value and interval; nan where nothing was explored."""
    ends = ("", "_low", "_high")
    value, low, high = (metrics.get(f"{_PREFIX}{name}{end}", math.nan) for end in ends)
    return value, low, high


def _claim(metrics: Mapping[str, float], last: int) -> str:
    value, low, high = _estimate(metrics, f"{last}/latest/satisfaction_against_first")
    if math.isnan(value):
        return ""
    verdict = "more" if low > 0 else "less" if high < 0 else "not clearly different"
    return (
        f"<p>In round {last} explorations by its table satisfy users <b>{value:+.1%}</b> "
        f"({low:+.1%} to {high:+.1%}: {verdict}) against those by the first table.</p>"
    )


def _table(metrics: Mapping[str, float]) -> str:
    head = "".join(f"<th>{escape(words)}</th>" for words in _WORDS.values())
    rows = []
    for number in range(1, num_rounds(metrics) + 1):
        for metric, words in (
            ("satisfaction", "satisfaction"),
            ("positive_playback_rate", "positive playbacks"),
        ):
            cells = []
            for arm in _WORDS:
                value, low, high = _estimate(metrics, f"{number}/{arm}/{metric}")
                text = f"{value:.3f} <small>{low:.3f}–{high:.3f}</small>"
                cells.append(f"<td>{'–' if math.isnan(value) else text}</td>")
            rows.append(f"<tr><td>round {number}, {words}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
