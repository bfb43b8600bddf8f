"""What an exploration table costs: size on disk, opening, and look-ups in process.

Histories of two clusters drawn at random, five clusters for each; every table is opened and
asked in a fresh process. Half of the look-ups at each level ban two clusters. They are
made in rounds, and the figures are medians of the rounds' percentiles: where there is other work,
some rounds are interrupted.

python scripts/benchmark_table.py
python scripts/benchmark_table.py --counts 1000000 10000000 --clusters 5000
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from recexplore.serving.exploration import LEVELS, Popular
from recexplore.serving.exploration_table import ExplorationTable

CHOSEN = 5
OPENINGS = 9
ROUNDS = 20
FINGERPRINT = "synthetic"


def main() -> None:
    """Prints what the table takes, and a markdown table of how long look-ups do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000_000], help="of histories")
    parser.add_argument("--clusters", type=int, default=2_000)
    parser.add_argument("--look_ups", type=int, default=100_000, help="of each level")
    parser.add_argument("--temporary", type=Path, help="where tables are written")
    parser.add_argument("--open", type=Path, help="only open this table, and say in how many ms")
    parser.add_argument("--ask", type=Path, help="only look up in this table")
    flags = parser.parse_args()
    if flags.open:
        start = time.perf_counter()
        ExplorationTable.open(flags.open, FINGERPRINT)
        print((time.perf_counter() - start) * 1e3)
        return
    if flags.ask:
        print(measure(flags.ask, flags.look_ups), end="")
        return
    for count in flags.counts:
        with tempfile.TemporaryDirectory(dir=flags.temporary) as folder:
            start = time.perf_counter()
            table = random_table(count, flags.clusters)
            built = time.perf_counter()
            table.write(folder)
            written = time.perf_counter()
            size = sum(file.stat().st_size for file in Path(folder).rglob("*.arrow"))
            print(
                f"{count:,} histories of {flags.clusters:,} clusters: built in "
                f"{built - start:.1f} s, written in {written - built:.1f} s, {size / 1e6:.0f} MB",
                flush=True,
            )
            fresh = [sys.executable, __file__]
            opened = sorted(
                float(subprocess.check_output([*fresh, "--open", folder])) for _ in range(OPENINGS)
            )
            print(
                f"opened in {opened[OPENINGS // 2]:.1f} ms, the median of {OPENINGS} fresh "
                f"processes; the slowest took {opened[-1]:.1f} ms",
                flush=True,
            )
            command = [*fresh, "--ask", folder, "--look_ups", str(flags.look_ups)]
            subprocess.run(command, check=True)


def random_table(count: int, num_clusters: int, fingerprint: str = FINGERPRINT) -> ExplorationTable:
    """A table of `count` different pairs, whose clusters follow neither of the pair."""
    random = np.random.default_rng(0)
    pairs = random.choice(num_clusters * (num_clusters - 1), count, replace=False)
    first, step = np.divmod(pairs, num_clusters - 1)
    second = (first + step + 1) % num_clusters
    clusters = np.arange(CHOSEN) * 7 + random.integers(num_clusters, size=(count, 1))
    clusters %= num_clusters
    own = (clusters == first[:, None]) | (clusters == second[:, None])
    order = np.argsort(own, axis=1, kind="stable")
    clusters = np.take_along_axis(np.where(own, -1, clusters), order, axis=1)
    scores = np.sort(random.normal(size=clusters.shape).astype(np.float32))[:, ::-1]
    every = np.arange(num_clusters, dtype=np.int32)
    return ExplorationTable.build(
        np.stack([first, second], axis=1).tolist(),
        clusters,
        scores,
        scores - 5.0,
        np.ones_like(scores),
        counts=random.integers(1, 100, count),
        popular=Popular(every, np.zeros(len(every), np.float32), np.zeros(len(every), np.float32)),
        num_clusters=num_clusters,
        fingerprints={"clusters": fingerprint},
    )


def measure(folder: Path, look_ups: int) -> str:
    """Checks the table, then looks up histories of every level."""
    table = ExplorationTable.open(folder, FINGERPRINT)
    start = time.perf_counter()
    table.check()
    lines = [f"checked in {time.perf_counter() - start:.2f} s", ""]
    lines += ["| level | look-ups | median, µs | p99, µs | p99.9, µs |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    asked = questions(table, look_ups)
    gc.collect()
    gc.freeze()  # or look-ups would be charged for going through all these questions
    for level in LEVELS:
        rounds = []
        for some in np.array_split(np.arange(look_ups), ROUNDS):
            taken = [timed(table, asked[level][i], i, level) for i in some.tolist()]
            rounds.append(np.percentile(taken, [50, 99, 99.9]) * 1e6)
        cells = [level, f"{look_ups:,}", *(f"{x:.1f}" for x in np.median(rounds, axis=0))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def timed(table: ExplorationTable, history: list[int], place: int, level: str) -> float:
    """Seconds of one look-up."""
    banned = (place % 11, place % 13) if place % 2 else ()
    start = time.perf_counter()
    found = table.look_up(history, banned)
    taken = time.perf_counter() - start
    assert found.level == level
    return taken


def questions(table: ExplorationTable, count: int) -> dict[str, list[list[int]]]:
    """Histories in a random order: of the table, strange ones with a known end, and empty ones."""
    random = np.random.default_rng(1)
    size = table.about.num_clusters
    known = [list(history) for history, _ in table]
    present = set(map(tuple, known))
    strange: list[list[int]] = []
    while len(strange) < count:
        drawn = random.integers(size, size=(count, 2)).tolist()
        strange += [pair for pair in drawn if tuple(pair) not in present]
    histories = [known[place] for place in random.integers(len(known), size=count)]
    return dict(zip(LEVELS, (histories, strange[:count], [[]] * count), strict=True))


if __name__ == "__main__":
    main()
