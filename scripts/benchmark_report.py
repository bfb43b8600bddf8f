"""The benchmark's results as lines, a markdown table, JSON and a plot."""

import json
from pathlib import Path

import matplotlib
from matplotlib.ticker import NullFormatter, ScalarFormatter

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BASELINES = ("generate", "reuse")
SAMPLERS = ("independent", "distinct")
COLOURS = {
    "generate": "#b5651d",
    "reuse": "#d9a441",
    "independent": "#1f5fa8",
    "distinct": "#2a9d74",
}
LABELS = {
    "generate": "transformers, generate",
    "reuse": "transformers, caches reused",
    "independent": "recexplore, independent",
    "distinct": "recexplore, distinct",
}
STEADY = 1.5  # slowest round over fastest
STYLES = {"hierarchy": "-", "deep": "--"}
MARKERS = {"hierarchy": "o", "deep": "s"}


def machine_lines(machine: dict) -> str:
    """What it runs on, and how well both sides agree."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"{machine['device']}, {machine['cpus']} cores; {versions}"]
    rates = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in machine["matmul rates"].items())
    lines.append(
        f"matrix products, Gflop/s: {rates}; memory {machine['memory rate'] / 1e9:.0f} GB/s"
    )
    for name, value in machine.get("largest differences", {}).items():
        lines.append(f"largest difference of {name}: {value:.1e}")
    return "\n".join(lines)


def progress(rows: list[dict]) -> str:
    """One line for each row that has just been measured."""
    return "\n".join(
        f"B={r['batch']} n={r['samples']} T={r['length']} {r['clusters']}: "
        + ", ".join(f"{name} {seconds:.4g} s" for name, seconds in r["seconds"].items())
        for r in rows
    )


def crossing_line(result: dict) -> str:
    """From which n on scoring every cluster is cheaper than best of n."""
    samples = {
        int(name.partition("n=")[2]): seconds
        for name, seconds in result.items()
        if name.startswith("independent ")
    }
    slower = [n for n, seconds in samples.items() if seconds >= result["exhaustive"]]
    where = f"cheaper from n={min(slower)} on" if slower else f"dearer up to n={max(samples)}"
    return (
        f"exhaustive M={result['num_clusters']} {result['clusters']} B={result['batch']}: "
        f"{result['batch'] / result['exhaustive']:.1f} decisions/s, {where} (than independent)"
    )


def table(rows: list[dict]) -> str:
    """Decisions per second, ratios and shares, in markdown."""
    methods, ratios = list(rows[0]["decisions"]), list(rows[0]["ratios"])
    shares = [f"{name}, % of matmul rate" for name in SAMPLERS]
    bounds = [f"{name}, % of bound" for name in SAMPLERS]
    header = ["B", "n", "T", "clusters", *methods, *ratios, *shares, *bounds]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [str(row[name]) for name in ("batch", "samples", "length", "clusters")]
        cells += [f"{row['decisions'][name]:.3g}" for name in methods]
        cells += [f"{row['ratios'][name]:.1f}" for name in ratios]
        cells += [f"{100 * row['share_of_matmul_rate'][name]:.0f}" for name in SAMPLERS]
        cells += [
            f"{100 * row['share_of_bound'][name]:.0f} ({row['bound_by'][name]})"
            for name in SAMPLERS
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summary(machine: dict, rows: list[dict]) -> str:
    """The lines that others read: ratios, growth with n, masking and selection."""
    lines = []
    for row in rows:
        where = f"B={row['batch']} n={row['samples']}"
        usual = row["length"] == 8 and row["clusters"] == "hierarchy"
        for theirs in BASELINES:
            ratio = row["ratios"].get(f"independent / {theirs}")
            if ratio is None or row["samples"] < 16:
                continue
            other = f"independent / {theirs} {where} T={row['length']} {row['clusters']}: "
            lines.append((f"ratio {theirs} {where} " if usual else other) + f"{ratio:.1f}")
    lines += _growth(rows)
    for share in machine.get("masking and selection", []):
        where = f"B={share['batch']} n={share['samples']} T={share['length']}"
        for name, value in share.items():
            if name not in ("batch", "samples", "length"):
                lines.append(f"masking and selection {where} {name}: {100 * value:.1f} %")
    lines += _unsteady(rows)
    lines += [crossing_line(result) for result in machine.get("exhaustive", [])]
    return "\n".join(lines)


def _growth(rows: list[dict]) -> list[str]:
    """How much longer a step with the most samples takes than one with the fewest."""
    lines = []
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["batch"], row["length"], row["clusters"]), []).append(row)
    for (batch, _, shape), group in groups.items():
        group = sorted(group, key=lambda row: row["samples"])
        if len(group) < 2:
            continue
        first, last = group[0], group[-1]
        for sampler in SAMPLERS:
            growth = last["seconds"][sampler] / first["seconds"][sampler]
            lines.append(
                f"growth from n={first['samples']} to n={last['samples']} at B={batch}, "
                f"{sampler}, {shape}: {growth:.1f}"
            )
    return lines


def _unsteady(rows: list[dict]) -> list[str]:
    """A warning where rounds differ by more than what the machine alone explains."""
    spread = {
        f"{name} at B={row['batch']} n={row['samples']} T={row['length']}": max(times) / min(times)
        for row in rows
        for name, times in row["rounds"].items()
    }
    worst = max(spread, key=spread.get)
    if spread[worst] < STEADY:
        return []
    return [
        f"WARNING: rounds of {worst} differ by a factor of {spread[worst]:.1f}. "
        "Something else runs on this machine, and threads that wait for each other suffer most: "
        "don't trust the ratios."
    ]


def write(folder: Path, machine: dict, rows: list[dict]) -> None:
    """Prints table and lines; writes both with the JSON and the plot."""
    text = f"{table(rows)}\n\n{summary(machine, rows)}\n"
    print(f"\nDecisions per second:\n\n{text}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(f"{machine_lines(machine)}\n\n{text}")
    (folder / "results.json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n"
    )
    plot(folder / "results.png", rows)
    print(f"Written to {folder}: results.md, results.json, results.png")


def plot(path: Path, rows: list[dict]) -> None:
    """Decisions per second over n, a panel for each B, and over T where several were measured."""
    batches = sorted({row["batch"] for row in rows})
    lengths = sorted({row["length"] for row in rows})
    common = max(lengths, key=lambda length: sum(row["length"] == length for row in rows))
    panels = [
        (f"B = {batch}, T = {common}", "samples", "n, samples for each prompt", [
            row for row in rows if row["batch"] == batch and row["length"] == common
        ])
        for batch in batches
    ]  # fmt: skip
    if len(lengths) > 1:
        other = next(row for row in rows if row["length"] != common)
        at = (other["batch"], other["samples"])
        same = [row for row in rows if (row["batch"], row["samples"]) == at]
        panels.append((f"B = {at[0]}, n = {at[1]}", "length", "T, tokens of a description", same))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels) + 0.6, 4.2), sharey=True, squeeze=False
    )
    for axis, (title, field, label, some) in zip(axes[0], panels, strict=True):
        _panel(axis, field, some)
        axis.set(title=title, xlabel=label)
    axes[0][0].set_ylabel("decisions per second")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(panels)), frameon=False
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis, field: str, rows: list[dict]) -> None:
    for shape in dict.fromkeys(row["clusters"] for row in rows):
        chosen = sorted((r for r in rows if r["clusters"] == shape), key=lambda row: row[field])
        for method in chosen[0]["decisions"]:
            theirs = method in BASELINES
            if theirs and shape != rows[0]["clusters"]:
                continue  # measured once for all shapes
            axis.plot(
                [row[field] for row in chosen],
                [row["decisions"][method] for row in chosen],
                STYLES[shape],
                marker=MARKERS[shape],
                markersize=8 if method == "independent" else 4,  # both can be seen where they meet
                fillstyle="none" if method == "independent" else "full",
                linewidth=3 if method == "independent" else 1.5,
                color=COLOURS[method],
                label=LABELS[method] if theirs else f"{LABELS[method]}, {shape}",
            )
    axis.set(xscale="log", yscale="log")
    ticks = sorted({row[field] for row in rows})
    axis.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(which="major", alpha=0.3)
