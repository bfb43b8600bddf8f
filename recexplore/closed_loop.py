"""The stage that closes the loop: explore by plan, log it, learn from it, explore better.

    round 1   the run's own table; its planner fills the exploration slot for some days
    round 2   everything is learned again, from the log with those days; the new table plans
    round 3   and again

In every round a part of the users stays with the first table and a part explores at random, so that
what has been learned is told apart from what has changed: users who were explored with have fewer
interests left to find.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.progress import Progress

if TYPE_CHECKING:
    from recexplore.serving.planner import Budget, Planner
    from recexplore.simulation.world import Settings

CLOSED_LOOP = "closed_loop"
METRICS = "metrics.json"  # in its folder
ARMS = ("random", "first", "latest")
_QUARTERS = np.array([0, 1, 2, 2])  # which arm each quarter of the users belongs to
_INGEST, _MODELS = "ingest", ("novelty", "alignment")  # steps
Step = Callable[..., None]


def closed_loop(
    work: Path,
    progress: Progress,
    *,
    platform: "Settings",
    log_days: int,
    learn: Mapping[str, Step],
    budget: "Budget",
    num_rounds: int = 3,
    days_per_round: int = 7,
    bootstrap_samples: int = 500,
    seed: int = 0,
) -> None:
    """The first table → rounds of exploring and learning, and what each round was worth.

    Args:
      work: the work directory.
      progress: where to say what is going on.
      platform: settings of the simulated platform that the log is of.
      log_days: days of the log.
      learn: what is done between rounds, in order: name → a stage, called as stage(work, progress),
        or, where the name is a model's, stage(work, progress, name).
      budget: of the planners.
      num_rounds: rounds of exploring.
      days_per_round: days of each.
      bootstrap_samples: of intervals.
      seed: of who belongs to which arm.

    Raises:
      InputError: no round, no day, or another platform than the log's.
    """
    from recexplore.evaluation import rounds, statistics
    from recexplore.simulation.log import check_same

    for name, value in (("num_rounds", num_rounds), ("days_per_round", days_per_round)):
        if value < 1:
            raise InputError(f"closed_loop.closed_loop.{name} is {value}; it must be at least 1.")
    living = rounds.LivingPlatform(platform, log_days)
    users = [f"u{user}" for user in range(platform.num_users)]
    arm_of = _QUARTERS[statistics.assign(users, len(_QUARTERS), f"closed loop {seed}")]
    counted = artifacts.read_json(work / "interactions" / "counts.json")["interactions"]
    lived = sum(len(day.users) for day in living.days)
    check_same(counted, lived, "closed_loop.closed_loop")
    first = _table_planner(work, work, budget)
    planners = [_random_planner(work, budget), first, first]
    metrics: dict[str, float] = {}
    for number in range(1, num_rounds + 1):
        with progress.bar(f"round {number}") as update:
            explored = living.live(days_per_round, planners, arm_of, update)
        found = rounds.estimates(explored, arm_of, ARMS, bootstrap_samples, seed)
        metrics |= {f"{CLOSED_LOOP}/round_{number}/{name}": v for name, v in found.items()}
        progress.say(
            f"  round {number}: satisfaction "
            + ", ".join(f"{arm} {found.get(f'{arm}/satisfaction', np.nan):.4f}" for arm in ARMS)
        )
        if number < num_rounds:
            folder = work / CLOSED_LOOP / f"round_{number + 1}"
            _learn(work, folder, living.log, learn, progress)
            planners[2] = _table_planner(work, folder, budget)
    artifacts.write_json(work / CLOSED_LOOP / METRICS, metrics)


def _learn(
    work: Path, folder: Path, read_log: Callable, learn: Mapping[str, Step], progress: Progress
) -> None:
    """All that follows from the log, in a work directory of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(work / "clusters", folder / "clusters", dirs_exist_ok=True)
    for name, step in learn.items():
        progress.say(f"  {folder.name}: {name}")
        if name == _INGEST:
            step(folder, progress, read_log=read_log)
        else:
            step(folder, progress, *([name] if name in _MODELS else []))


def _table_planner(work: Path, folder: Path, budget: "Budget") -> "Planner":
    """Plans by the exploration table of a round's folder, with the items of the run itself."""
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.planning import open_planner
    from recexplore.serving.exploration_table import ExplorationTable

    clusters = ClusterTable.read(work / "clusters")
    table = ExplorationTable.open(folder / "exploration", clusters.fingerprint)
    return open_planner(work, table.look_up, budget)


def _random_planner(work: Path, budget: "Budget") -> "Planner":
    """Plans any cluster that is new to the user."""
    from recexplore.evaluation import rounds
    from recexplore.interests.cluster_table import ClusterTable
    from recexplore.planning import open_planner

    clusters = ClusterTable.read(work / "clusters")
    at_random = dataclasses.replace(budget, temperature=1.0)
    return open_planner(work, rounds.random_look_up(clusters.num_clusters), at_random)
