"""The report's figures, as SVG text. matplotlib's object interface only: no global state."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568")
_STYLE = {
    "svg.hashsalt": "recexplore",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
}


def training_curves(curves: Mapping[str, Sequence[Mapping[str, float | int]]]) -> str:
    """Training and validation loss by step, one panel a model.

    Args:
      curves: model → the lines of its metrics.jsonl.
    """
    columns = min(4, max(1, len(curves)))
    rows = -(-len(curves) // columns)
    figure, axes = _figure(3.1 * columns, 2.7 * rows, rows, columns)
    for axis, (name, lines) in zip(axes, curves.items(), strict=False):
        for key, label, colour in (
            ("loss", "training", _COLOURS[0]),
            ("validation_loss", "validation", _COLOURS[1]),
        ):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                marker = "o" if key == "validation_loss" else ""
                axis.plot(
                    *zip(*points, strict=True), label=label, color=colour, marker=marker, ms=3
                )
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.legend(fontsize=9, frameon=False)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    return _svg(figure)


def scaling(
    counts: Sequence[int], scores: Sequence[float], recalls: Sequence[float], k: int
) -> str:
    """What more proposals buy: the chosen clusters' score, and recall@k.

    Args:
      counts: n, numbers of proposals.
      scores: mean alignment score, as a probability, of the best cluster for each n.
      recalls: recall@k of the k best.
      k: clusters kept.
    """
    figure, axes = _figure(8.4, 3.1, 1, 2)
    for axis, values, label in (
        (axes[0], scores, "predicted feedback of the best"),
        (axes[1], recalls, f"recall@{k}"),
    ):
        axis.plot(counts, values, color=_COLOURS[0], marker="o")
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.minorticks_off()
        axis.set(xlabel="proposals n", ylabel=label)
    return _svg(figure)


def arms(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """Each arm's value with its interval, from the first at the top.

    Args:
      rows: arm in words, value, low, high.
      label: of the values.
    """
    figure, (axis,) = _figure(8.4, 0.36 * len(rows) + 1.0, 1, 1)
    places = np.arange(len(rows))[::-1]
    names, *columns = zip(*rows, strict=True)
    value, low, high = map(np.array, columns)
    axis.hlines(places, low, high, color=_COLOURS[0], linewidth=2)
    axis.plot(value, places, "o", color=_COLOURS[0], ms=6)
    axis.set_yticks(places, names)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.grid(axis="y", visible=False)
    axis.set(xlabel=label)
    return _svg(figure)


def rounds(lines: Mapping[str, Sequence[tuple[float, float, float]]], label: str) -> str:
    """Values of several arms, round by round, with their intervals.

    Args:
      lines: arm in words → value, low, high of each round.
      label: of the values.
    """
    figure, (axis,) = _figure(7.2, 3.4, 1, 1)
    for place, (name, estimates) in enumerate(lines.items()):
        value, low, high = np.array(estimates).T
        numbers = np.arange(1, len(value) + 1) + 0.04 * (place - (len(lines) - 1) / 2)
        errors = np.stack([value - low, high - value])
        axis.errorbar(
            numbers, value, errors, color=_COLOURS[place], label=name, marker="o", ms=5, capsize=3
        )
    axis.set_xticks(np.arange(1, len(value) + 1))
    axis.set(xlabel="round", ylabel=label)
    axis.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def best_of_n(rows: Sequence[Mapping[str, float | int]]) -> str:
    """Best of n under the truth: satisfaction beside the score that is chosen by, distance from the
    novelty model, diversity.

    Args:
      rows: of `study.scaling`, at temperature 1.
    """
    counts = [row["n"] for row in rows]
    figure, axes = _figure(9.6, 5.8, 2, 2)
    panels = (
        (
            "true satisfaction",
            ("oracle_satisfaction", "chosen by the truth", "--"),
            ("theory_satisfaction", "theory, normal proxy", ":"),
            ("satisfaction", "chosen by alignment", "-"),
        ),
        ("alignment score, 0 to 1", ("score", "best of n", "-")),
        (
            "KL from the novelty model",
            ("divergence_bound", "log n − (n−1)/n", ":"),
            ("divergence", "best of n", "-"),
        ),
        ("clusters shown, effectively", ("effective_clusters", "best of n", "-")),
    )
    colours = {"-": _COLOURS[0], "--": _COLOURS[1], ":": _COLOURS[5]}
    for axis, (label, *lines) in zip(axes, panels, strict=True):
        for key, name, style in lines:
            marker = "o" if style == "-" else ""
            values = [row[key] for row in rows]
            axis.plot(counts, values, style, color=colours[style], label=name, marker=marker, ms=4)
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(n) for n in counts], fontsize=9)
        axis.minorticks_off()
        axis.set(xlabel="draws n", ylabel=label)
        if len(lines) > 1:
            axis.legend(fontsize=8, frameon=False, loc="lower right")
    return _svg(figure)


def tuning(curves: Mapping[str, Sequence[Mapping[str, float | int]]]) -> str:
    """What becomes of models tuned on reward, step by step.

    Args:
      curves: model in words → rows of `experiments.tuning_curve`.
    """
    panels = {
        "valid": "share of valid answers",
        "reward": "reward (alignment score)",
        "satisfaction": "true satisfaction",
        "distinct_clusters": "different clusters",
    }
    figure, axes = _figure(9.6, 5.8, 2, 2)
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for place, (name, rows) in enumerate(curves.items()):
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            style = ("-", "--", "-.")[place // len(_COLOURS) % 3]
            colour = _COLOURS[place % len(_COLOURS)]
            axis.plot(steps, values, style, color=colour, label=name, linewidth=1.8)
        axis.set(xlabel="step", ylabel=label)
    axes[0].set_ylim(-0.03, 1.03)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _svg(figure)


def reliability(bins: Float[np.ndarray, "3 bins"]) -> str:
    """Mean held-out label against mean prediction, by bin of prediction."""
    figure, (axis,) = _figure(4.6, 4.2, 1, 1)
    predicted, truth, _ = bins
    low, high = min(predicted.min(), truth.min()), max(predicted.max(), truth.max())
    axis.plot([low, high], [low, high], color="#a0aec0", linestyle="--", label="perfect")
    axis.plot(predicted, truth, "o", color=_COLOURS[0], label="alignment model")
    axis.set_aspect("equal")
    axis.set(xlabel="predicted feedback", ylabel="held-out feedback")
    axis.legend(fontsize=9, frameon=False)
    return _svg(figure)


def cluster_map(
    centroids: Float[np.ndarray, "M E"],
    sizes: Int[np.ndarray, "M"],
    branches: Int[np.ndarray, "M"],
    descriptions: Sequence[str],
    labelled: int = 24,
) -> str:
    """Clusters in the plane of their centroids' two main directions.

    Args:
      centroids: of the clusters.
      sizes: interactions, the area of the dots.
      branches: which branch of the tree each belongs to, the colour.
      descriptions: of the clusters; the biggest that find room are written.
      labelled: how many to write at most.
    """
    centred = centroids - centroids.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    # The sign of a direction is arbitrary; fix it so that the picture is the same every time.
    directions = directions[:2] * np.sign(directions[:2].sum(axis=1, keepdims=True) + 1e-12)
    x, y = (centred @ directions.T).T
    figure, (axis,) = _figure(9.0, 5.6, 1, 1)
    area = 20 + 500 * sizes / max(sizes.max(), 1)
    _, colours = np.unique(branches, return_inverse=True)
    axis.scatter(
        x, y, s=area, c=[_COLOURS[c % len(_COLOURS)] for c in colours], alpha=0.55, linewidths=0
    )
    axis.set_axis_off()
    axis.margins(0.12)
    _write_labels(figure, axis, x, y, sizes, descriptions, labelled)
    return _svg(figure)


def _write_labels(figure, axis, x, y, sizes, descriptions, labelled) -> None:
    """Writes the biggest clusters' names where they don't overlap."""
    figure.draw_without_rendering()  # fixes the layout that the boxes below are measured in
    taken = []
    for cluster in np.argsort(-sizes, kind="stable"):
        text = axis.annotate(
            descriptions[cluster],
            (x[cluster], y[cluster]),
            fontsize=9,
            ha="center",
            va="center",
            parse_math=False,  # a description may hold a $
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        box = text.get_window_extent().expanded(1.05, 1.15)
        inside = box.x0 > 0 and box.x1 < figure.bbox.width
        if len(taken) >= labelled or not inside or any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)


def _figure(width: float, height: float, rows: int, columns: int):
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
