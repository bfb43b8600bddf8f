"""Every history through the compiled step, shard by shard: how an exploration table is filled.

Shards are numbered, and each is a function of the job alone. A process computes those of its share
that aren't there yet, so that a run that was killed goes on where it was, and several machines
divide the work without a word between them: shard s belongs to process s mod N.
"""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

import recexplore
from recexplore import artifacts
from recexplore.distributed import processes
from recexplore.errors import InputError, Preempted, Unfinished
from recexplore.explorer import Explorer
from recexplore.inference.best_of_n import BestOfN, Exploration
from recexplore.inference.bulk import Times
from recexplore.inference.grouping import deal
from recexplore.inference.launch import Model
from recexplore.interests.cluster_table import ClusterTable
from recexplore.models import saved
from recexplore.progress import Progress, Update
from recexplore.serving import arrow_files
from recexplore.serving.exploration import Answers
from recexplore.serving.exploration_table import ExplorationTable
from recexplore.serving.shards import MANIFEST, Manifest, Shard, Shards
from recexplore.tasks.vocabulary import Vocabulary

_IN_LOG, _PAIRS = "log", "pairs"


class Job(NamedTuple):
    """What is to be computed.

    Attributes:
      histories: cluster ids, oldest first, right-padded with -1.
      shards: the rows of each shard's batches.
      manifest: of its shards.
      banned: clusters not to propose.
      settings: n, k and how to draw and choose.
      seed: of the draws.
    """

    histories: Int[np.ndarray, "R K"]
    shards: list[list[Int[np.ndarray, "rows"]]]
    manifest: Manifest
    banned: Sequence[int]
    settings: BestOfN
    seed: int


def plan(
    histories: Sequence[Sequence[int]],
    *,
    banned: Sequence[int],
    settings: BestOfN,
    seed: int,
    batch_size: int,
    shard_size: int,
    made_from: Mapping[str, str],
) -> Job:
    """Deals histories out to batches and shards.

    Args:
      histories: cluster ids, oldest first.
      banned: clusters not to propose.
      settings: n, k and how to draw and choose.
      seed: of the draws.
      batch_size: histories a call of the compiled step.
      shard_size: batches a shard; a process that is killed has lost as many at most.
      made_from: fingerprints of the clusters, the vocabulary and both models, by name.

    Raises:
      InputError: no history, or a size below 1.
    """
    for name, size in (("batch_size", batch_size), ("shard_size", shard_size)):
        if size < 1:
            raise InputError(f"pipeline.explore.{name} is {size}; it must be at least 1.")
    if not len(histories):
        raise InputError(
            "There is no history to explore: neither the log nor another source that "
            "pipeline.explore.histories may name holds one."
        )
    length = max(max(map(len, histories)), 1)
    rows = np.array(
        [[*history, *[-1] * (length - len(history))] for history in histories], np.int32
    )
    batches = deal(rows, batch_size)
    shards = [batches[start : start + shard_size] for start in range(0, len(batches), shard_size)]
    said = {
        **dataclasses.asdict(settings),
        "banned": sorted({int(cluster) for cluster in banned}),
        "seed": seed,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "recexplore": recexplore.__version__,
        "jax": importlib.metadata.version("jax"),  # others may round otherwise
        "jaxlib": importlib.metadata.version("jaxlib"),
        "device": jax.local_devices()[0].device_kind,
    }
    manifest = Manifest(
        dict(made_from),
        said,
        arrow_files.digest([rows]),
        len(rows),
        len(shards),
        length,
        settings.num_chosen,
    )
    return Job(rows, shards, manifest, banned, settings, seed)


def compute(
    job: Job, folder: Path, explorer: Explorer, pair: tuple[Model, Model], progress: Progress
) -> None:
    """Computes the shards of this process's share that aren't there yet.

    Args:
      job: what to compute.
      folder: of its shards.
      explorer: asks the models.
      pair: the novelty and the alignment model.
      progress: where to say what is going on.

    Raises:
      InputError: see `Shards` and `Explorer.explore`.
      Preempted: SIGTERM came; all finished shards are there.
    """
    try:
        _compute(job, Shards(folder, job.manifest), explorer, pair, progress)
    except FileNotFoundError:
        if folder.exists():
            raise
        # another process did our share too, and the table is made


def _compute(
    job: Job, shards: Shards, explorer: Explorer, pair: tuple[Model, Model], progress: Progress
) -> None:
    index, count = processes.share()
    mine = range(index, len(job.shards), count)
    wanted = [number for number in mine if not _is_there(shards, job, number, progress)]
    kept = len(mine) - len(wanted)
    if kept:
        progress.say(f"  {kept} of {len(mine)} shards are there already")
    if not wanted:
        return
    total = sum(len(rows) for number in wanted for rows in job.shards[number])
    with processes.PreemptionNotice(), progress.bar("explore") as update:
        writer = _Writer(job, shards, wanted, _Pace(update, total))
        batches = _batches(job, wanted)
        times = explorer.explore_stream(
            *pair, batches, job.banned, job.settings, job.seed, writer.take
        )
        if processes.stop_wanted():
            there = len(job.shards) - len(shards.missing())
            raise Preempted(f"Told to stop; {there} of {len(job.shards)} shards are there.")
    progress.say(f"  {_account(total, times)}")


def collect(job: Job, folder: Path) -> Shard:
    """The answers to all histories of a job, in the order of the histories.

    Args:
      job: what was computed.
      folder: of its shards.

    Raises:
      Unfinished: some shards are other processes' work, and not there yet.
      InputError: a shard is damaged.
    """
    shards = Shards(folder, job.manifest)
    if missing := len(shards.missing()):
        raise Unfinished(
            f"This process's share is done; {missing} of {len(job.shards)} shards are still to "
            f"come. Whoever finishes the last of them makes the table.{_others(shards, folder)}"
        )
    parts = [shards.read(number) for number in range(len(job.shards))]
    order = np.argsort(np.concatenate([rows for shard in job.shards for rows in shard]))
    return jax.tree.map(lambda *values: np.concatenate(values)[order], *parts)


def _others(shards: Shards, folder: Path) -> str:
    """What is said of jobs beside this one, to which other processes may have gone by mistake."""
    said = [
        f" {other} belongs to another job: {shards.difference(other)}. Shards of one job must be "
        "computed with the same models, settings, versions and kind of device."
        for other in sorted(folder.parent.iterdir())
        if other != folder and (other / MANIFEST).exists()
    ]
    return "".join(said)


def fingerprints(work: Path, models: Mapping[str, Model]) -> dict[str, str]:
    """Of all that an exploration table is made from.

    Args:
      work: the work directory.
      models: by name.
    """
    return {
        "clusters": ClusterTable.read(work / "clusters").fingerprint,
        "vocabulary": Vocabulary(work / "vocabulary").fingerprint,
        **{name: saved.fingerprint(model.network, model.params) for name, model in models.items()},
    }


def check_banned(banned: Any, num_clusters: int) -> None:
    """Checks clusters that nobody is to get.

    Args:
      banned: what `pipeline.explore.banned` is bound to.
      num_clusters: M.

    Raises:
      InputError: it is no list of clusters.
    """
    listed = isinstance(banned, list | tuple) and all(type(cluster) is int for cluster in banned)
    if not listed or any(not 0 <= cluster < num_clusters for cluster in banned):
        raise InputError(
            f"pipeline.explore.banned is {banned!r}; it must be a list of cluster ids, whole "
            f"numbers of 0..{num_clusters - 1}."
        )


def made_by_others(folder: Path, made_from: Mapping[str, str]) -> bool:
    """Whether a process that has another share of a job was the last, and has made the table.

    Args:
      folder: of tables.
      made_from: the fingerprints that the job's table has.
    """
    if not processes.is_one_of_many():
        return False
    try:
        table = ExplorationTable.open(folder, made_from["clusters"])
    except InputError:
        return False
    return table.about.fingerprints == made_from


def histories_asked(
    work: Path, num_clusters: int, asked: str
) -> tuple[list[list[int]], Int[np.ndarray, "R"]]:
    """The histories to explore, and how often users stood at each.

    Args:
      work: the work directory.
      num_clusters: M.
      asked: "log", "pairs", or the path of a file; see `pipeline.explore`.

    Raises:
      InputError: all pairs, where a history isn't one; see also `read_histories`.
    """
    if asked not in (_IN_LOG, _PAIRS):
        return read_histories(asked, num_clusters)
    table = artifacts.read_table(work / "feedback" / "histories.parquet", artifacts.HISTORIES)
    histories, counts = table["history"].to_pylist(), table["count"].to_numpy()
    if asked == _IN_LOG:
        return histories, counts
    if histories and len(histories[0]) != 2:
        raise InputError(
            f"pipeline.explore.histories is {_PAIRS!r}, which is for histories of 2 clusters; "
            f"these have {len(histories[0])}, too many to write down all. Bind {_IN_LOG!r}, or a "
            "file."
        )
    pairs = [[a, b] for a in range(num_clusters) for b in range(num_clusters) if a != b]
    stood = dict(zip(map(tuple, histories), counts.tolist(), strict=True))
    return pairs, np.array([stood.get(tuple(pair), 0) for pair in pairs], np.int64)


def read_histories(path: str, num_clusters: int) -> tuple[list[list[int]], Int[np.ndarray, "R"]]:
    """Histories that somebody else has chosen, and how often users stand at each.

    Args:
      path: of a Parquet file with a column "history", lists of cluster ids, oldest first, and maybe
        a column "count"; without it all count alike.
      num_clusters: M.

    Raises:
      InputError: no such file, other columns, or a row that is no history or is there twice.
    """
    where = f"pipeline.explore.histories names {path!r}"
    if not Path(path).exists():
        raise InputError(
            f"{where}, and there is no such file. It must be 'log', 'pairs', or the path of a "
            "Parquet file."
        )
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{where}, which can't be read as Parquet ({error}). It must be 'log', 'pairs', or the "
            "path of a Parquet file."
        ) from error
    kinds = {field.name: field.type for field in table.schema}
    kind = kinds.get("history", pa.null())
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not listed or not pa.types.is_integer(kinds["history"].value_type):
        raise InputError(f"{where}, which has no column 'history' of lists of whole numbers.")
    histories = table["history"].to_pylist()
    seen: set[tuple[int, ...]] = set()
    for row, history in enumerate(histories):
        known = history and all(c is not None and 0 <= c < num_clusters for c in history)
        if not known or len(set(history)) < len(history):
            raise InputError(
                f"{where}, whose row {row} is {history}. A history has at least one cluster, each "
                f"once, of 0..{num_clusters - 1}."
            )
        if (key := tuple(history)) in seen:
            raise InputError(f"{where}, in which {history} stands twice (row {row}).")
        seen.add(key)
    if "count" not in kinds:
        return histories, np.ones(len(histories), np.int64)
    counts = table["count"]
    whole = pa.types.is_integer(counts.type) and not counts.null_count
    if not whole or any(count < 0 for count in counts.to_pylist()):
        raise InputError(f"{where}, whose column 'count' must hold whole numbers from 0 on.")
    return histories, counts.to_numpy().astype(np.int64)


def _is_there(shards: Shards, job: Job, number: int, progress: Progress) -> bool:
    try:
        return shards.is_there(number, _left_padded(_histories(job, number)))
    except InputError as error:
        progress.say(f"  {error}")
        return False


def _histories(job: Job, number: int) -> Int[np.ndarray, "rows K"]:
    return job.histories[np.concatenate(job.shards[number])]


def _left_padded(histories: Int[np.ndarray, "rows K"]) -> Int[np.ndarray, "rows K"]:
    """As tables have them: -1 in front of shorter ones."""
    order = np.argsort(histories >= 0, axis=1, kind="stable")
    return np.take_along_axis(histories, order, axis=1)


def _batches(job: Job, wanted: Sequence[int]) -> Iterator[list[list[int]]]:
    for number in wanted:
        for rows in job.shards[number]:
            if processes.stop_wanted():
                return
            yield [[c for c in row if c >= 0] for row in job.histories[rows].tolist()]


class _Writer:
    """Puts answers together to shards, and writes each when it is whole."""

    def __init__(self, job: Job, shards: Shards, wanted: Sequence[int], pace: "_Pace"):
        self._job, self._shards, self._pace = job, shards, pace
        self._wanted = iter(wanted)
        self._begin()

    def _begin(self) -> None:
        self._number = next(self._wanted, -1)
        self._parts: list[Exploration] = []
        self._left = sum(map(len, self._job.shards[self._number]))

    def take(self, found: Exploration) -> None:
        """The answers to the next histories."""
        self._parts.append(found._replace(draws=None, draw_scores=None))
        self._left -= len(found.clusters)
        self._pace.more(len(found.clusters))
        if self._left:
            return
        found = jax.tree.map(lambda *values: np.concatenate(values), *self._parts)
        filled = found.clusters >= 0
        others = (found.scores, found.log_probabilities, found.propensities)
        answers = Answers(
            _left_padded(_histories(self._job, self._number)),
            found.clusters,
            *(np.where(filled, values, 0).astype(np.float32) for values in others),
        )
        self._shards.write(self._number, Shard(answers, found.num_distinct, found.num_allowed))
        self._begin()


class _Pace:
    """How fast it goes, told to whoever watches; the first batch, which compiles, doesn't count."""

    def __init__(self, update: Update, total: int, clock: Callable[[], float] = time.monotonic):
        self._update, self._total, self._clock = update, total, clock
        self._done, self._first, self._since = 0, 0, 0.0

    def more(self, count: int) -> None:
        """So many more histories are done."""
        self._done += count
        if not self._first:
            self._first, self._since = count, self._clock()
            self._update(self._done, self._total)
            return
        a_second = (self._done - self._first) / max(self._clock() - self._since, 1e-9)
        left = (self._total - self._done) / a_second
        self._update(self._done, self._total, a_second=a_second, minutes_left=left / 60)


def _account(total: int, times: Times) -> str:
    """Where the time went, in a line."""
    pace = total / max(times.total - times.compiling, 1e-9)
    return (
        f"{total:,} histories in {times.total:.1f} s, {pace:,.0f} a second after compiling for "
        f"{times.compiling:.1f} s; the device was busy {times.utilisation:.0%} of the time; waited "
        f"{times.waiting:.1f} s for it, took {times.writing:.1f} s to write"
    )
