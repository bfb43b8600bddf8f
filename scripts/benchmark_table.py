"""What an exploration table costs: size on disk, opening, and look-ups in process.

Histories of two clusters drawn at random, five clusters for each; every table is opened and
asked in a fresh process. Half of the look-ups at each level ban two clusters.

python scripts/benchmark_table.py
python scripts/benchmark_table.py --counts 1000000 10000000 --clusters 5000
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from recexplore.serving.exploration import LEVELS, Popular
from recexplore.serving.exploration_table import ExplorationTable

CHOSEN = 5
FINGERPRINT = "synthetic"


def main() -> None:
    """Prints two markdown tables: what tables take, and how long look-ups do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000_000], help="of histories")
    parser.add_argument("--clusters", type=int, default=2_000)
    parser.add_argument("--look_ups", type=int, default=100_000, help="of each level")
    parser.add_argument("--temporary", type=Path, help="where tables are written")
    parser.add_argument("--open", type=Path, help="the figures of this table only")
    flags = parser.parse_args()
    if flags.open:
        print(measure(flags.open, flags.look_ups), end="")
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
                f"{built - start:.1f} s, written in {written - built:.1f} s, {size / 1e6:.0f} MB"
            )
            command = [sys.executable, __file__, "--open", folder]
            subprocess.run([*command, "--look_ups", str(flags.look_ups)], check=True)


def random_table(count: int, num_clusters: int) -> ExplorationTable:
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
        fingerprints={"clusters": FINGERPRINT},
    )


def measure(folder: Path, look_ups: int) -> str:
    """Opens the table, then looks up histories of every level; nothing was read before."""
    start = time.perf_counter()
    table = ExplorationTable.open(folder, FINGERPRINT)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    table.check()
    checked = time.perf_counter() - start
    lines = [f"opened in {opened * 1e3:.1f} ms; checked in {checked:.2f} s", ""]
    lines += ["| level | look-ups | median, µs | p99, µs | p99.9, µs |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    asked = questions(table, look_ups)
    for level in LEVELS:
        seconds = []
        for place, history in enumerate(asked[level]):
            banned = (place % 11, place % 13) if place % 2 else ()
            start = time.perf_counter()
            found = table.look_up(history, banned)
            seconds.append(time.perf_counter() - start)
            assert found.level == level
        percentiles = np.percentile(seconds, [50, 99, 99.9]) * 1e6
        cells = [level, f"{look_ups:,}", *(f"{value:.1f}" for value in percentiles)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
