"""One version of an exploration table on disk.

    table.arrow     a row for each history, in ascending order of its key; see `row_schema`
    popular.arrow   the clusters by popularity
    table.json      sizes, fingerprints, and a digest of all values

Both Arrow files are IPC files, uncompressed and in one batch, so that they are read where they lie:
opening maps them into memory, and all processes of a machine share them. Nothing in a version says
when or where it was made: the same table gives the same bytes.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt8

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.serving import arrow_files
from recexplore.serving.exploration import Answers, Popular
from recexplore.serving.history_keys import HistoryKeys, is_ascending

TABLE, POPULAR, ABOUT = "table.arrow", "popular.arrow", "table.json"
FORMAT = 1
REMEDY = "Run `recexplore explore` again."
_POPULAR = pa.schema(
    [
        arrow_files.number("cluster", pa.int32()),
        arrow_files.number("score", pa.float32()),
        arrow_files.number("log_probability", pa.float32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class About:
    """What a table says of itself.

    Attributes:
      history_length: K, clusters of the longest history.
      num_chosen: k, clusters of an answer at most.
      num_clusters: M.
      num_histories: that the models were asked about.
      fingerprints: of what it was made from: "clusters", "vocabulary" and the models by name.
    """

    history_length: int
    num_chosen: int
    num_clusters: int
    num_histories: int
    fingerprints: Mapping[str, str]

    @property
    def width(self) -> int:
        """Places of a row: where K - 1 clusters of the history must be left out, k are left."""
        return self.num_chosen + self.history_length - 1

    @property
    def keys(self) -> HistoryKeys:
        """How histories become keys."""
        return HistoryKeys(self.num_clusters, self.history_length)


class Contents(NamedTuple):
    """All of a table, in arrays that may lie in a mapped file.

    Attributes:
      about: sizes and fingerprints.
      keys: the words of the rows' keys, most significant first.
      exact: 1 where the models were asked about the history, 0 where it stands for those that end
        so.
      rows: histories and answers.
      popular: clusters by popularity.
    """

    about: About
    keys: list[Int[np.ndarray, "R"]]
    exact: UInt8[np.ndarray, "R"]
    rows: Answers
    popular: Popular


def row_schema(about: About) -> pa.Schema:
    """The columns of table.arrow.

    `history` has K places, -1 in front of shorter ones; `clusters` and the values beside them have
    k + K - 1, and clusters of -1 and values of 0 after the last. `exact` is 1 where the models were
    asked about the history; other rows stand for all histories that end so. See `HistoryKeys` for
    `key_0` and, where histories are long, `key_1` and so on.
    """
    fields = [arrow_files.number(f"key_{i}", pa.int64()) for i in range(about.keys.num_words)]
    fields.append(arrow_files.number("exact", pa.uint8()))
    return pa.schema([*fields, *answer_fields(about.history_length, about.width)])


def answer_fields(history_length: int, width: int) -> list[pa.Field]:
    """The columns of histories and what is answered to them; see `Answers`."""
    values = ("scores", "log_probabilities", "propensities")
    return [
        arrow_files.numbers("history", pa.int32(), history_length),
        arrow_files.numbers("clusters", pa.int32(), width),
        *(arrow_files.numbers(name, pa.float32(), width) for name in values),
    ]


def write(folder: Path, contents: Contents) -> None:
    """Writes one version's files into an empty folder."""
    columns = [*contents.keys, contents.exact, *contents.rows]
    arrow_files.write(folder / TABLE, columns, row_schema(contents.about))
    arrow_files.write(folder / POPULAR, contents.popular, _POPULAR)
    said = {
        **dataclasses.asdict(contents.about),
        "format": FORMAT,
        "rows": len(contents.exact),
        "bytes": {name: (folder / name).stat().st_size for name in (TABLE, POPULAR)},
        "sha256": digest(contents),
    }
    artifacts.write_json(folder / ABOUT, said)


def read(folder: Path, clusters: str) -> tuple[Contents, str]:
    """Maps one version's files into memory.

    What costs next to nothing is checked: sizes, columns, and that keys ascend.

    Args:
      folder: of the version.
      clusters: fingerprint of the clusters that it is to be served with.

    Returns:
      The contents, and the digest that they should have.

    Raises:
      InputError: a file is missing or damaged, or the table was made with other clusters.
    """
    said, about = _read_about(folder)
    check_clusters(about, clusters, folder)
    for name in (TABLE, POPULAR):
        found = _size(folder / name)
        if found != said["bytes"][name]:
            problem = "is missing" if found is None else f"has {found:,} bytes"
            raise InputError(
                f"{folder / name} {problem}; {ABOUT} says {said['bytes'][name]:,} bytes. {REMEDY}"
            )
    columns = arrow_files.read(folder / TABLE, row_schema(about), ABOUT, REMEDY)
    popular = arrow_files.read(folder / POPULAR, _POPULAR, ABOUT, REMEDY)
    if len(columns[0]) != said["rows"]:
        raise InputError(
            f"{folder / TABLE} has {len(columns[0]):,} rows, not the {said['rows']:,} that {ABOUT} "
            f"says. {REMEDY}"
        )
    words = about.keys.num_words
    if not is_ascending(columns[:words]):
        raise InputError(f"{folder / TABLE}: its keys are not in ascending order. {REMEDY}")
    rows = Answers(*columns[words + 1 :])
    contents = Contents(about, columns[:words], columns[words], rows, Popular(*popular))
    return contents, said["sha256"]


def check_clusters(about: About, clusters: str, source: Path | str) -> None:
    """Checks that a table is served with the clusters that it was made with.

    Args:
      about: what the table says.
      clusters: fingerprint of those that it is to be served with.
      source: what the error message calls the table.

    Raises:
      InputError: it isn't.
    """
    made_with = about.fingerprints["clusters"]
    if made_with != clusters:
        raise InputError(
            f"{source}: the exploration table was made with other clusters (fingerprint "
            f"{made_with[:12]}) than those it is to be served with ({clusters[:12]}); its cluster "
            f"ids mean something else. {REMEDY}"
        )


def _read_about(folder: Path) -> tuple[dict[str, Any], About]:
    """What table.json says, and the part of it that describes the table."""
    path = folder / ABOUT
    said = artifacts.read_json(path)
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        found = said.get("format") if isinstance(said, dict) else said
        raise InputError(
            f"{path} is of format {found!r}; this version of recexplore reads {FORMAT}. {REMEDY}"
        )
    try:
        about = About(**{field.name: said[field.name] for field in dataclasses.fields(About)})
        clusters = about.fingerprints["clusters"]
        sizes = dataclasses.astuple(about)[:4]
        stated = [*sizes, said["rows"], *(said["bytes"][name] for name in (TABLE, POPULAR))]
        whole = all(type(size) is int for size in stated) and min(stated) >= 0
        whole = whole and min(sizes[:3]) > 0
        whole = whole and all(isinstance(text, str) for text in (said["sha256"], clusters))
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is not what recexplore writes. {REMEDY}")
    return said, about


def digest(contents: Contents) -> str:
    """SHA-256 of all that a table holds, whatever file it lies in."""
    about = json.dumps(dataclasses.asdict(contents.about), sort_keys=True).encode()
    arrays = (*contents.keys, contents.exact, *contents.rows, *contents.popular)
    return arrow_files.digest(arrays, about)


def find_problem(contents: Contents) -> str:
    """What is wrong with a table's values, in words; empty where nothing is.

    The number of exact rows is another; a history names a cluster twice or isn't the one that its
    key says; a cluster is out of range, proposed twice or one of the history; a value is no finite
    number.
    """
    about, words, exact, rows, popular = contents
    if (exact > 1).any() or exact.sum() != about.num_histories:
        return f"of its rows {exact.sum():,} are exact, not {about.num_histories:,}"
    histories, clusters = rows.histories, rows.clusters
    known = (histories >= -1) & (histories < about.num_clusters)
    known[:, 1:] &= (histories[:, 1:] >= 0) | (histories[:, :-1] < 0)
    known[:, -1] &= histories[:, -1] >= 0
    told = (clusters >= -1) & (clusters < about.num_clusters)
    told[:, 1:] &= (clusters[:, 1:] < 0) | (clusters[:, :-1] >= 0)
    packed = about.keys.pack_all(histories)
    own = ((clusters[:, :, None] == histories[:, None, :]) & (clusters >= 0)[:, :, None]).any(2)
    numbers = np.isfinite(rows.scores) & np.isfinite(rows.log_probabilities)
    numbers &= np.isfinite(rows.propensities)
    problems = {
        f"the history's clusters must be in 0..{about.num_clusters - 1}": ~known.all(axis=1),
        "the history names a cluster twice": _repeats(histories),
        "the key isn't the history's": np.any(
            [word != should for word, should in zip(words, packed, strict=True)], axis=0
        ),
        f"clusters must be in 0..{about.num_clusters - 1}": ~told.all(axis=1),
        "a cluster is proposed twice": _repeats(clusters),
        "a cluster of the history is proposed": own.any(axis=1),
        "scores, log_probabilities and propensities must be finite": ~numbers.all(axis=1),
    }
    for problem, where in problems.items():
        if where.any():
            row = int(np.argmax(where))
            history = [cluster for cluster in histories[row].tolist() if cluster != -1]
            answered = [cluster for cluster in clusters[row].tolist() if cluster != -1]
            return f"row {row}, history {history}, clusters {answered}: {problem}"
    ranked = np.sort(popular.clusters)
    in_range = (ranked >= 0).all() and (ranked < about.num_clusters).all()
    if not in_range or (ranked[1:] == ranked[:-1]).any():
        return f"the popular clusters must be distinct, in 0..{about.num_clusters - 1}"
    if not (np.isfinite(popular.scores).all() and np.isfinite(popular.log_probabilities).all()):
        return "the popular clusters' scores and log_probabilities must be finite"
    return ""


def _repeats(lists: Int[np.ndarray, "R width"]) -> np.ndarray:
    """Where a cluster stands twice in a row; -1 may."""
    ordered = np.sort(lists, axis=1)
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
