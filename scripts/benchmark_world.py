"""How fast the simulated platform is: days, the log, the truth about clusters; and its memory.

python scripts/benchmark_world.py
python scripts/benchmark_world.py --users 50000 --days 14
"""

import argparse
import resource
import time

import numpy as np

from recexplore.simulation.platform import Platform
from recexplore.simulation.world import Settings, simulate_log


def main() -> None:
    """Prints a markdown table; the peak of memory is the process's up to then."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--clusters", type=int, default=200)
    flags = parser.parse_args()
    settings = Settings(num_users=flags.users, num_items=flags.items)
    print("| what | seconds | a day | interactions a second | peak, GB |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    platform, seconds = timed(Platform, settings)
    print_row("a platform is drawn", seconds)
    rows, seconds = timed(run_days, platform, flags.days)
    print_row(f"{flags.days} days of {flags.users:,} users", seconds, flags.days, rows)
    clusters = np.random.default_rng(0).integers(0, flags.clusters, flags.items)
    _, seconds = timed(platform.world.cluster_satisfaction, clusters, flags.clusters)
    print_row(f"truth about {flags.clusters} clusters", seconds)
    del platform
    log, seconds = timed(simulate_log, settings, flags.days)
    rows = log.interactions.count().to_pyarrow().as_py()
    print_row("the same days as a log", seconds, flags.days, rows)


def run_days(platform: Platform, days: int) -> int:
    """Number of impressions."""
    return sum(len(platform.show().users) for _ in range(days))


def timed(function, *arguments):
    """What the function returns, and seconds."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def print_row(what: str, seconds: float, days: int = 0, rows: int = 0) -> None:
    """A row of the table."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    a_day, a_second = (f"{seconds / days:.2f}", f"{rows / seconds:,.0f}") if days else ("", "")
    print(f"| {what} | {seconds:.1f} | {a_day} | {a_second} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
