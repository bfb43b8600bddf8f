"""A work directory: which stage made what, from what, with which configuration.

Every finished stage leaves a record in W/stages/. A stage is up to date when its record's recipe,
a hash of recexplore's version, its configuration and the recipes of all that it reads, is today's
recipe and what it wrote still lies there as it was. The record is written last: a stage that was
killed has none, and is run again; one that failed before it wrote anything keeps its old one.
"""

import ast
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import resource
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import recexplore
from recexplore import artifacts
from recexplore.configuration import Configuration, call_configured
from recexplore.distributed import processes
from recexplore.errors import InputError, Unfinished
from recexplore.progress import Progress

_MEBIBYTE = 1 << 20
_MARK = "recipe.json"  # in the folder of a stage that resumes: what is being made there


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step from artefacts to artefacts.

    Attributes:
      verb: its name on the command line.
      function: called as function(work, progress, *arguments), configured by gin.
      reads: what it reads, relative to the work directory.
      writes: what it writes, likewise.
      model: the model it trains, which is also its gin scope; empty for other stages.
      resumes: it keeps what an interrupted run with the same recipe has left in `writes`.
      together: several processes can run it as one program.
    """

    verb: str
    function: Callable[..., None]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    model: str = ""
    resumes: bool = False
    together: bool = False

    @property
    def name(self) -> str:
        return f"{self.verb} {self.model}".strip()

    @property
    def selector(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    @property
    def arguments(self) -> tuple[str, ...]:
        return (self.model,) if self.model else ()


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """All that decides what a stage makes, and the hash of it."""

    bindings: dict[str, str]
    sources: dict[str, list]
    hash: str


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a stage stands.

    Attributes:
      reason: why it isn't up to date; empty when it is.
      made_otherwise: how the configuration that made it differs from today's, if it does.
    """

    reason: str = ""
    made_otherwise: str = ""


class WorkDirectory:
    """The stages of one run over one folder.

    Args:
      folder: the work directory.
      stages: all stages, in order.
      configuration: the run's gin configuration.
    """

    def __init__(self, folder: Path, stages: Sequence[Stage], configuration: Configuration):
        self.folder = folder
        self._stages = stages
        self._configuration = configuration
        self._makers = {output: stage for stage in stages for output in stage.writes}
        self._recipes: dict[str, _Recipe] = {}

    def status(self, stage: Stage) -> Status:
        """Compares a stage's record with what would be made today."""
        recipe, record = self._recipe(stage), self._record(stage)
        if record is None:
            begun = self._begun(stage)
            if begun is not None and begun["configuration"] != recipe.bindings:
                difference = _difference(begun["configuration"], recipe.bindings)
                return Status(f"begun otherwise: {difference}", made_otherwise=difference)
            return Status("not made yet")
        if record["configuration"] != recipe.bindings:
            difference = _difference(record["configuration"], recipe.bindings)
            return Status(difference, made_otherwise=difference)
        if record["version"] != recexplore.__version__:
            difference = f"recexplore was {record['version']}, now {recexplore.__version__}"
            return Status(difference, made_otherwise=difference)
        if record["recipe"] != recipe.hash:
            return Status(f"what it reads has changed{_gone(record, recipe)}")
        if record["outputs"] != self._outputs(stage):
            return Status("what it wrote is gone or was changed")
        return Status()

    def run(self, stage: Stage, progress: Progress, overwrite: bool = False) -> bool:
        """Runs a stage unless it is up to date; returns whether it ran.

        Several processes run it together; the first prepares the folder and writes the record.

        Raises:
          InputError: an input isn't there or isn't up to date, a value is left open, or the stage's
            artefacts were made with another configuration and `overwrite` is False.
        """
        reason = processes.first_says(lambda: self._why(stage, overwrite))
        if not reason:
            progress.say(f"{stage.name}: up to date")
            return False
        progress.say(f"{stage.name}: {reason}, making {', '.join(stage.writes)}")
        recipe = self._recipe(stage)
        before = self._record(stage)
        processes.first_says(lambda: self._prepare(stage, recipe))
        start = time.monotonic()
        try:
            operative = call_configured(
                stage.function,
                stage.model,
                recipe.bindings,
                self.folder,
                progress,
                *stage.arguments,
            )
        except Unfinished:  # others may be writing what this stage writes
            raise
        except Exception:
            if before is not None and before["outputs"] == self._outputs(stage):
                if processes.is_first():
                    artifacts.write_json(self.record_path(stage), before)
            raise
        seconds = time.monotonic() - start
        processes.first_says(lambda: self._finish(stage, recipe, operative, seconds))
        progress.say(f"{stage.name}: done in {seconds:.0f} s")
        return True

    def _why(self, stage: Stage, overwrite: bool) -> str:
        """Why a stage must run; empty when it needn't."""
        status = self.status(stage)
        self._check_inputs(stage)
        if status.made_otherwise and not overwrite:
            raise InputError(
                f"{self.folder}: {stage.name} was made with another configuration "
                f"({status.made_otherwise}). Choose another --workdir, or add --overwrite to "
                "make it, and all that follows from it, again."
            )
        return status.reason

    def _finish(self, stage: Stage, recipe: _Recipe, operative: str, seconds: float) -> None:
        """Writes the operative configuration beside what was made, and the record last."""
        for name in stage.writes:
            path = self.folder / name
            beside = path / "config.gin" if path.is_dir() else path.with_suffix(".config.gin")
            with artifacts.new_file(beside) as temporary:
                temporary.write_text(operative)
        self._write_record(stage, recipe, seconds)

    def _outputs(self, stage: Stage) -> dict[str, list[int]]:
        return {name: _fingerprint(self.folder / name) for name in stage.writes}

    def record_path(self, stage: Stage) -> Path:
        """Where the record of a finished stage lies."""
        return self.folder / "stages" / f"{stage.name.replace(' ', '_')}.json"

    @contextlib.contextmanager
    def locked(self, others_too: bool = False) -> Iterator[None]:
        """Keeps other runs out of the work directory; of several processes the first does it.

        Args:
          others_too: those that have another share of the same work may come in.

        Raises:
          InputError: another run has it, or the folder can't be made.
        """
        with contextlib.ExitStack() as held:
            processes.first_says(lambda: self._lock(held, others_too))
            yield

    def _lock(self, held: contextlib.ExitStack, others_too: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"--workdir {self.folder} is not a folder. Choose another.") from error
        except FileNotFoundError as error:
            raise InputError(f"--workdir {self.folder} can't be made. Choose another.") from error
        lock = held.enter_context(open(self.folder / ".lock", "a+"))
        try:
            kind = fcntl.LOCK_SH if others_too else fcntl.LOCK_EX
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.folder} is in use by another recexplore run. Wait for it to end, or "
                "choose another --workdir."
            ) from error
        if not others_too:
            artifacts.remove_leftovers(self.folder)

    def _check_inputs(self, stage: Stage) -> None:
        for name in stage.reads:
            maker = self._makers[name]
            status = self.status(maker)
            if status.reason:
                raise InputError(
                    f"{self.folder / name}, which {stage.name} reads, is not up to date "
                    f"({status.reason}). Run `recexplore {maker.verb}"
                    f"{' --model ' + maker.model if maker.model else ''}` with this configuration "
                    "first, or `recexplore run` for all stages."
                )
        self._configuration.check_required(stage.selector, stage.model)

    def _begun(self, stage: Stage) -> dict[str, Any] | None:
        """What an interrupted run of a stage that resumes was making, if there was one."""
        if not stage.resumes:
            return None
        return _read_if_whole(self.folder / stage.writes[0] / _MARK, {"recipe", "configuration"})

    def _prepare(self, stage: Stage, recipe: _Recipe) -> None:
        """Removes what another recipe left behind, and only that."""
        self.record_path(stage).unlink(missing_ok=True)
        if not stage.resumes:
            return
        for name in stage.writes:
            path = self.folder / name
            begun = self._begun(stage)
            if begun is None or begun["recipe"] != recipe.hash:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
                artifacts.write_json(
                    path / _MARK, {"recipe": recipe.hash, "configuration": recipe.bindings}
                )

    def _recipe(self, stage: Stage) -> _Recipe:
        if stage.name not in self._recipes:
            bindings = self._configuration.reachable_from(stage.selector, stage.model)
            sources = _outside_files(bindings)
            inputs = {name: self._recipe(self._makers[name]).hash for name in stage.reads}
            made_by = (recexplore.__version__, stage.name)
            text = json.dumps([made_by, bindings, sources, inputs], sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()
            self._recipes[stage.name] = _Recipe(bindings, sources, digest)
        return self._recipes[stage.name]

    def _record(self, stage: Stage) -> dict[str, Any] | None:
        path = self.record_path(stage)
        needed = {"recipe", "configuration", "outputs", "version"}
        return _read_if_whole(path, needed)

    def _write_record(self, stage: Stage, recipe: _Recipe, seconds: float) -> None:
        artifacts.write_json(
            self.record_path(stage),
            {
                "stage": stage.name,
                "recipe": recipe.hash,
                "configuration": recipe.bindings,
                "sources": recipe.sources,
                "reads": list(stage.reads),
                "outputs": self._outputs(stage),
                "seconds": round(seconds, 1),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "version": recexplore.__version__,
            },
        )


def _read_if_whole(path: Path, keys: set[str]) -> dict[str, Any] | None:
    """A JSON object with at least `keys`; None where there is no such thing."""
    try:
        found = artifacts.read_json(path)
    except (InputError, OSError):
        return None
    return found if isinstance(found, dict) and keys <= found.keys() else None


def _outside_files(bindings: dict[str, str]) -> dict[str, list]:
    """Size and time of every file outside the work directory that a binding names.

    A path, a pattern of paths, or the URL of a database in a file; of a folder all files in it, and
    checkpoints in folders of their own. What a database server or a bucket holds can't be told; to
    read it again, remove the artefact made from it.
    """
    found = {}
    for name in sorted({text for value in bindings.values() for text in _strings(value)}):
        path = name.partition("://")[2] or name
        for match in [path] if os.path.exists(path) else sorted(glob.glob(path)):
            files = sorted(Path(match).iterdir()) if Path(match).is_dir() else [Path(match)]
            for file in files:
                if file.is_file() or file.match("checkpoint_*"):
                    stat = file.stat()
                    found[str(file)] = [stat.st_size, stat.st_mtime_ns]
    return found


def _strings(text: str) -> Iterator[str]:
    """The strings in a binding's text, which is a Python literal or names a function."""
    try:
        waiting = [ast.literal_eval(text)]
    except (ValueError, SyntaxError):
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, str) and value and "\0" not in value:
            yield value


def _fingerprint(path: Path) -> list[int]:
    """Number of files, bytes and a checksum of a file or folder; zeros when it is missing.

    Of each file the checksum covers the first and the last mebibyte, so that it stays cheap.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = [path] if path.exists() else []
    checksum, total = 0, 0
    for file in files:
        size = file.stat().st_size
        total += size
        with open(file, "rb") as content:
            checksum = zlib.crc32(content.read(_MEBIBYTE), checksum)
            content.seek(max(size - _MEBIBYTE, 0))
            checksum = zlib.crc32(content.read(_MEBIBYTE), checksum)
    return [len(files), total, checksum]


def _gone(record: dict[str, Any], recipe: _Recipe) -> str:
    """Which files outside the work directory aren't there any more."""
    gone = sorted(record.get("sources", {}).keys() - recipe.sources.keys())
    if not gone:
        return ""
    others = f" and {len(gone) - 1} more files are" if len(gone) > 1 else " is"
    return f": {gone[0]}{others} gone. If you moved them, put them back or leave a link"


def _difference(before: dict[str, str], now: dict[str, str]) -> str:
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    shown = [
        f"{name.replace('recexplore.', '')} was {before.get(name, 'not set')}, now "
        f"{now.get(name, 'not set')}"
        for name in changed[:3]
    ]
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(shown) + more
