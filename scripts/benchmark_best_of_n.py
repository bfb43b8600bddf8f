"""How fast is best of n? recexplore's compiled step beside transformers, on the same weights.

    generate       transformers: `generate` with n return sequences, then a reward pass over them
    reuse          transformers: every cache reused by hand
    independent    recexplore: n independent draws
    distinct       recexplore: n draws without replacement

Each method must give the k best of n for B prompts: P tokens that all prompts share, S tokens of
history, descriptions of T tokens. transformers draws any tokens; recexplore draws clusters.

    python scripts/benchmark_best_of_n.py --quick
    python scripts/benchmark_best_of_n.py
    python scripts/benchmark_best_of_n.py --preset gemma2_2b --dtype bfloat16 --batch 1 8 64 \\
        --samples 1 16 64
"""

import argparse
import ctypes
import dataclasses
import functools
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_costs as costs
import benchmark_pair as pairs
import benchmark_report as report
import jax
import numpy as np
from benchmark_report import BASELINES, SAMPLERS

SHAPES = ("hierarchy", "deep")
TOLERANCE = 1e-4
QUICK = [(8, 1), (8, 16), (8, 64), (32, 16)]
LARGE = 500  # samples of all prompts together, from which cells are looked at closely
CROSSING_BATCH = 8
CROSSING_CLUSTERS = (100, 300, 1000)
CROSSING_SAMPLES = (1, 4, 16, 64)
LEAST_ROUNDS, MOST_ROUNDS = 3, 15


class Cell(NamedTuple):
    """What is measured together: B prompts, n samples, descriptions of T tokens."""

    batch: int
    samples: int
    length: int


class Bench(NamedTuple):
    """What all cells share.

    Attributes:
      flags: of the command line.
      pair: the models.
      baseline: the same in torch; None to leave transformers out.
      flops_rate: the machine's, measured on matrix products.
      bytes_rate: the device memory's.
    """

    flags: argparse.Namespace
    pair: pairs.Pair
    baseline: Any
    flops_rate: float
    bytes_rate: float


def main() -> None:
    """Measures all cells and writes table, JSON and plot."""
    flags = parse_flags()
    keep_freed_memory()
    bench, machine = prepare(flags)
    cells = list(grid(flags))
    rows = []
    for cell in cells:
        large = cell.batch * cell.samples >= LARGE
        measured = measure(bench, cell, flags.shapes if large or not flags.quick else SHAPES[:1])
        rows += measured
        print(report.progress(measured), flush=True)
        if large:
            machine["masking and selection"].append(masking_share(bench, cell, measured))
    if not (flags.quick or flags.without_exhaustive):
        machine["exhaustive"] = crossing(bench)
    report.write(flags.output, machine, rows)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="four cells, in some minutes")
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="B")
    add("--samples", type=int, nargs="+", default=[1, 4, 16, 64], help="n")
    add("--lengths", type=int, nargs="+", default=[4, 8, 16], help="T; all at the middle cell")
    add("--chosen", type=int, default=5, help="k, at most n")
    add("--prefix", type=int, default=64, help="P")
    add("--history", type=int, default=32, help="S")
    add("--num_clusters", type=int, default=1000, help="M")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--preset", choices=("small", "gemma2_2b"), default="small")
    add("--vocab_size", type=int, default=4096, help="V of --preset small")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--num_layers", type=int, help="instead of the preset's")
    add("--scan_unroll", type=int, help="instead of the preset's")
    add("--without_transformers", action="store_true", help="so with gemma2_2b, or in bfloat16")
    add("--without_exhaustive", action="store_true", help="as --quick does")
    add("--seconds", type=float, default=20.0, help="for each cell, after the least rounds")
    add("--output", type=Path, default=Path("work/benchmark_best_of_n"))
    flags = parser.parse_args()
    if flags.quick:
        flags.seconds = min(flags.seconds, 8.0)
    if flags.preset != "small" or flags.dtype != "float32":
        flags.without_transformers = True
    if min(flags.lengths) < 4:
        parser.error("--lengths must be at least 4: three words and EOS")
    return flags


def keep_freed_memory() -> None:
    """Lets freed memory stay with the process instead of going back to the system (glibc).

    Large arrays would be mapped anew, page by page, at every call; on virtual machines that can
    take longer than the arithmetic. It makes both sides faster and steadier.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, map_at_most, arenas_at_most = -1, -4, -8
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(map_at_most, 0)
        libc.mallopt(arenas_at_most, 1)


def grid(flags: argparse.Namespace) -> Iterator[Cell]:
    """B by n at the middle T, and the other T at the middle B and n."""
    length = _middle(flags.lengths)
    if flags.quick:
        yield from (Cell(batch, samples, length) for batch, samples in QUICK)
        return
    for batch, samples in itertools.product(flags.batch, flags.samples):
        yield Cell(batch, samples, length)
    for other in flags.lengths:
        if other != length:
            yield Cell(_middle(flags.batch), _middle(flags.samples), other)


def _middle(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]


def prepare(flags: argparse.Namespace) -> tuple[Bench, dict]:
    """Models on both sides, checked against each other, and the machine's rates."""
    max_length = flags.prefix + flags.history + max(flags.lengths)
    config = pairs.preset(flags.preset, flags.vocab_size, max_length, flags.dtype)
    changes = {name: getattr(flags, name) for name in ("num_layers", "scan_unroll")}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    pair = pairs.random_pair(config, seed=0)
    machine = {
        "device": jax.devices()[0].device_kind,
        "cpus": _num_cpus(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "flags": {name: str(value) for name, value in vars(flags).items()},
        "config": dataclasses.asdict(config),
        "masking and selection": [],
    }
    rates = {"jax": costs.jax_matmul_rate(config)}
    baseline = None
    if not flags.without_transformers:
        import transformers_baseline as transformers

        baseline = transformers.export(config, pair.novelty_params, pair.alignment_params)
        rates["torch"] = transformers.matmul_rate(config, _num_cpus())
        machine["versions"] |= transformers.versions()
        machine["largest differences"] = agreement(pair, baseline, flags)
    machine["matmul rates"] = rates
    machine["memory rate"] = costs.memory_rate()
    print(report.machine_lines(machine), flush=True)
    return Bench(flags, pair, baseline, max(rates.values()), machine["memory rate"]), machine


def agreement(pair: pairs.Pair, baseline: Any, flags: argparse.Namespace) -> dict[str, float]:
    """The largest differences between both sides.

    Raises:
      SystemExit: they are too large for a comparison of speed to mean anything.
    """
    import transformers_baseline as transformers

    length = _middle(flags.lengths)
    inputs = inputs_for(flags, pair.config, batch=4)
    prompt = transformers.prompt(baseline, inputs.prefix, inputs.histories)
    tokens = prompt.whole().numpy().astype(np.int32)
    ends = np.full(len(tokens), tokens.shape[1])
    logits = jax.jit(pair.novelty_model.apply)(pair.novelty_params, tokens)
    scores = jax.jit(pair.alignment_model.apply)(pair.alignment_params, tokens, ends)
    descriptions = descriptions_for(flags, pair.config, "hierarchy", length)
    explore = explorer_for(pair, descriptions, inputs, "independent", 4, 1)
    explored = explore(0)
    chosen = np.array(descriptions)[np.asarray(explored.clusters)[:, 0]]
    with_chosen = np.concatenate([tokens, chosen], axis=1)
    differences = {
        "logits": np.abs(transformers.logits(baseline, tokens) - logits).max(),
        "scores": np.abs(transformers.scores(baseline, tokens) - scores).max(),
        "scores from reused caches": transformers.largest_difference_of_cached_scores(
            baseline, prompt, 4, length
        ),
        "scores of explore_step": np.abs(
            transformers.scores(baseline, with_chosen) - explored.scores[:, 0]
        ).max(),
    }
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} differ by {difference:.2g}, more than {TOLERANCE:g}.")
    return {name: float(difference) for name, difference in differences.items()}


def inputs_for(flags, config, batch: int) -> pairs.Inputs:
    return pairs.random_inputs(
        batch, flags.prefix, flags.history, flags.num_clusters, config.vocab_size
    )


@functools.lru_cache
def _descriptions(shape: str, num_clusters: int, length: int, vocab_size: int) -> list[list[int]]:
    return pairs.cluster_descriptions(shape, num_clusters, length, vocab_size)


def descriptions_for(flags, config, shape: str, length: int) -> list[list[int]]:
    return _descriptions(shape, flags.num_clusters, length, config.vocab_size)


def explorer_for(pair, descriptions, inputs, sampler, samples, chosen) -> Callable:
    trie = pairs.device_trie(descriptions, pair.config.vocab_size)
    return pairs.explorer(pair, trie, inputs, sampler, samples, min(chosen, samples))


def measure(bench: Bench, cell: Cell, shapes: Sequence[str]) -> list[dict]:
    """One row for each shape of the clusters; all methods take turns in the same rounds."""
    flags, pair = bench.flags, bench.pair
    inputs = inputs_for(flags, pair.config, cell.batch)
    runs = _baseline_runs(bench.baseline, inputs, cell)
    for shape, sampler in itertools.product(shapes, SAMPLERS):
        descriptions = descriptions_for(flags, pair.config, shape, cell.length)
        runs[shape, sampler] = explorer_for(
            pair, descriptions, inputs, sampler, cell.samples, flags.chosen
        )
    scored = {name: _scored(run) for name, run in runs.items() if isinstance(name, tuple)}
    seconds = interleaved(runs, flags.seconds)
    return [_row(bench, cell, shape, seconds, scored) for shape in shapes]


def _baseline_runs(baseline: Any, inputs: pairs.Inputs, cell: Cell) -> dict:
    """The transformers side, warmed up with a single sample: there is nothing to compile."""
    if baseline is None:
        return {}
    import transformers_baseline as transformers

    prompt = transformers.prompt(baseline, inputs.prefix, inputs.histories)
    methods = {"generate": transformers.generate_then_score, "reuse": transformers.reuse_caches}
    for method in methods.values():
        method(baseline, prompt, 1, cell.length)
    return {
        name: lambda _, method=method: method(baseline, prompt, cell.samples, cell.length)
        for name, method in methods.items()
    }


def _scored(explore: Callable) -> int:
    """Descriptions that a step scores, duplicates left out; compiles the step as well."""
    return int(np.sum(explore(0).num_distinct))


def interleaved(
    runs: dict[Any, Callable], budget: float, least: int = LEAST_ROUNDS
) -> dict[Any, list[float]]:
    """Seconds of every run in every round; rounds go on until the budget is spent."""
    seconds = {name: [] for name in runs}
    start = time.perf_counter()
    for round_number in range(1, MOST_ROUNDS + 1):
        for name, run in runs.items():
            before = time.perf_counter()
            run(round_number)
            seconds[name].append(time.perf_counter() - before)
        if round_number >= least and time.perf_counter() - start > budget:
            break
    return seconds


def _row(bench: Bench, cell: Cell, shape: str, seconds: dict, scored: dict) -> dict:
    """Medians, ratios and shares of what the machine can do, for one shape of the clusters."""
    flags, config = bench.flags, bench.pair.config
    rounds = {name: seconds[name] for name in BASELINES if name in seconds}
    rounds |= {sampler: seconds[shape, sampler] for sampler in SAMPLERS}
    medians = {name: float(np.median(values)) for name, values in rounds.items()}
    branching = pairs.branching_nodes(descriptions_for(flags, config, shape, cell.length))
    row = {
        **cell._asdict(),
        "clusters": shape,
        "novelty_steps": len(branching),
        "rounds": rounds,
        "seconds": medians,
        "decisions": {name: cell.batch / value for name, value in medians.items()},
        "ratios": {
            f"{ours} / {theirs}": medians[theirs] / medians[ours]
            for theirs in BASELINES
            if theirs in medians
            for ours in SAMPLERS
        },
        "share_of_matmul_rate": {},
        "share_of_bound": {},
        "bound_by": {},
    }
    passes = {"generate": costs.generate_passes, "reuse": costs.reuse_passes}
    for name, value in medians.items():
        work = costs.Work(
            cell.batch,
            cell.samples,
            flags.prefix,
            flags.history,
            cell.length,
            tuple(min(cell.samples, nodes) for nodes in branching),
            scored.get((shape, name), 0),
        )
        needed = passes.get(name, costs.recexplore_passes)(work)
        bound = costs.bound(config, needed, bench.flops_rate, bench.bytes_rate)
        rate = costs.flops(config, needed) / value
        row["share_of_matmul_rate"][name] = rate / bench.flops_rate
        row["share_of_bound"][name] = bound.seconds / value
        row["bound_by"][name] = bound.binds
    return row


def masking_share(bench: Bench, cell: Cell, rows: list[dict]) -> dict:
    """Share of a step that is not the networks: the same step with networks of almost no cost."""
    flags = bench.flags
    tiny = pairs.random_pair(pairs.smallest(bench.pair.config), seed=0)
    inputs = inputs_for(flags, tiny.config, cell.batch)
    result = {**cell._asdict()}
    for row, sampler in itertools.product(rows[:1] if flags.quick else rows, SAMPLERS):
        shape = row["clusters"]
        descriptions = descriptions_for(flags, tiny.config, shape, cell.length)
        run = explorer_for(tiny, descriptions, inputs, sampler, cell.samples, flags.chosen)
        run(0)
        least = np.median(interleaved({"tiny": run}, 1.0)["tiny"])
        result[f"{sampler}, {shape}"] = float(least / row["seconds"][sampler])
    return result


def crossing(bench: Bench) -> list[dict]:
    """Seconds of scoring every cluster beside those of best of n, over M and n."""
    flags, pair = bench.flags, bench.pair
    length = _middle(flags.lengths)
    results = []
    for num_clusters, shape in itertools.product(CROSSING_CLUSTERS, flags.shapes):
        descriptions = _descriptions(shape, num_clusters, length, pair.config.vocab_size)
        inputs = pairs.random_inputs(
            CROSSING_BATCH, flags.prefix, flags.history, num_clusters, pair.config.vocab_size
        )
        make = functools.partial(explorer_for, pair, descriptions, inputs)
        runs = {"exhaustive": make("exhaustive", flags.chosen, flags.chosen)}
        for samples in CROSSING_SAMPLES:
            runs[f"independent n={samples}"] = make("independent", samples, flags.chosen)
        for run in runs.values():
            run(0)
        medians = {k: float(np.median(v)) for k, v in interleaved(runs, flags.seconds).items()}
        results.append(
            {"batch": CROSSING_BATCH, "num_clusters": num_clusters, "clusters": shape} | medians
        )
        print(report.crossing_line(results[-1]), flush=True)
    return results


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
