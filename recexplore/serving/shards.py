"""An exploration table in the making: shards, each whole or absent, that several processes fill.

    folder/manifest.json        what is being made, of what, and in how many shards
    folder/shard-00007.arrow    some histories and their answers; see `shard_schema`

Nothing in a shard says who computed it, or when: whoever computes it again writes the same bytes.
So a process that was killed has lost its unfinished shards and nothing else, and one that comes
late, or twice, does no harm. (On machines of the same kind: other processors may round otherwise.)
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.serving import arrow_files
from recexplore.serving.exploration import Answers
from recexplore.serving.table_files import answer_fields

MANIFEST = "manifest.json"
_FORMAT = 1
_CHECKED = "sha256"


class Shard(NamedTuple):
    """The answers to some histories.

    Attributes:
      answers: to each history.
      num_distinct: different clusters that were proposed.
      num_allowed: clusters that could have been.
    """

    answers: Answers
    num_distinct: Int[np.ndarray, "R"]
    num_allowed: Int[np.ndarray, "R"]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that the shards' bytes depend on.

    Attributes:
      made_from: fingerprints of the clusters, the vocabulary and both models, by name.
      settings: of the exploration, by name; JSON values.
      histories: digest of all histories, in their order.
      num_histories: how many there are.
      num_shards: that they are divided into.
      history_length: K, of the longest.
      num_chosen: k, clusters of an answer.
    """

    made_from: Mapping[str, str]
    settings: Mapping[str, Any]
    histories: str
    num_histories: int
    num_shards: int
    history_length: int
    num_chosen: int

    @property
    def digest(self) -> str:
        """Tells one job from another."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Shards:
    """The folder of one job.

    Args:
      folder: where shards lie; made where there is none.
      manifest: what they must be shards of.

    Raises:
      InputError: the folder has shards of another job.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._manifest = manifest
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {"format": _FORMAT, **dataclasses.asdict(manifest)}
        path = folder / MANIFEST
        if not path.exists():
            artifacts.write_json(path, wanted)
        if other := _difference(_read_manifest(path), json.loads(json.dumps(wanted))):
            raise InputError(
                f"{folder} has shards of another exploration table: {other}. Remove the folder to "
                "begin anew, or go on with what it was begun with."
            )

    def path(self, number: int) -> Path:
        """Where a shard lies once it is there."""
        return self._folder / f"shard-{number:05d}.arrow"

    def write(self, number: int, shard: Shard) -> None:
        """Adds a shard, which isn't there before it is whole.

        Raises:
          FileNotFoundError: the folder is gone: another process has made the table of it.
        """
        columns = [*shard.answers, shard.num_distinct, shard.num_allowed]
        schema = shard_schema(self._manifest).with_metadata({_CHECKED: arrow_files.digest(columns)})
        temporary = self._folder / f".{uuid.uuid4().hex}.tmp"
        try:
            arrow_files.write(temporary, columns, schema)
            os.replace(temporary, self.path(number))
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, number: int) -> Shard:
        """Reads a shard and checks that it is what was written.

        Raises:
          InputError: it isn't there, or was damaged.
        """
        path = self.path(number)
        remedy = "`recexplore explore` computes it again, and keeps the others."
        columns = arrow_files.read(path, shard_schema(self._manifest), MANIFEST, remedy)
        written = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}
        if written.get(_CHECKED.encode(), b"").decode() != arrow_files.digest(columns):
            raise InputError(f"{path} isn't what was written: its digest differs. {remedy}")
        return Shard(Answers(*columns[:-2]), columns[-2], columns[-1])

    def is_there(self, number: int, histories: Int[np.ndarray, "R K"]) -> bool:
        """Whether a shard needn't be computed.

        Args:
          number: of the shard.
          histories: that it must have the answers to.

        Raises:
          InputError: it is there and damaged, or answers to something else.
        """
        if not self.path(number).exists():
            return False
        if not np.array_equal(self.read(number).answers.histories, histories):
            raise InputError(
                f"{self.path(number)} has the answers to other histories than it should. "
                "`recexplore explore` computes it again, and keeps the others."
            )
        return True

    def difference(self, other: Path) -> str:
        """How the job of another folder differs from this one, in words."""
        return _difference(
            _read_manifest(other / MANIFEST), _read_manifest(self._folder / MANIFEST)
        )

    def missing(self) -> list[int]:
        """The shards that aren't there yet."""
        return [n for n in range(self._manifest.num_shards) if not self.path(n).exists()]


def shard_schema(manifest: Manifest) -> pa.Schema:
    """The columns of a shard: `Answers`, then how many clusters were drawn and could have been."""
    return pa.schema(
        [
            *answer_fields(manifest.history_length, manifest.num_chosen),
            arrow_files.number("num_distinct", pa.int32()),
            arrow_files.number("num_allowed", pa.int32()),
        ]
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    found = artifacts.read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is not what recexplore writes. Remove its folder.")
    return found


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], name: str = "") -> str:
    """Which value differs first, in words; empty where none does."""
    keys = found.keys() | wanted.keys()
    for key in sorted(keys, key=lambda key: (key not in ("made_from", "settings"), key)):
        before, now = found.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            if inner := _difference(before, now, f"{name}{key}."):
                return inner
        elif before != now:
            short = [str(value)[:40] for value in (before, now)]
            return f"{name}{key} was {short[0]}, now {short[1]}"
    return ""
