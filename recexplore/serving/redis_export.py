"""An exploration table in Redis, for platforms that look up over the network.

    PREFIX:current          the version that is current: 16 hexadecimal digits of its digest
    PREFIX:versions         a list of the versions there are, oldest first
    PREFIX:table:VERSION    a hash
        about               JSON: sizes, fingerprints and format, as in a table's table.json
        popular             P clusters by popularity: P int32 ids, P float32 scores, P float32
                            log-probabilities
        3,17                the history [3, 17], oldest first: a byte, 1 if the models were asked
                            about it and 0 if it stands for the histories that end so, and n
                            clusters, best first: n int32 ids, n float32 scores, n float32
                            log-probabilities, n float32 propensities
        whole               written last

All numbers are little-endian. A version is complete before `current` names it. A look-up is one
HMGET with the history and its shorter ends; `RedisTable` is a reader that answers as
`ExplorationTable` does, and others need nothing but this page.
"""

import dataclasses
import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import redis

from recexplore.errors import InputError
from recexplore.serving import versions
from recexplore.serving.exploration import (
    Exploration,
    PopularValues,
    Row,
    answer,
    checked,
)
from recexplore.serving.exploration_table import ExplorationTable
from recexplore.serving.table_files import FORMAT, About, check_clusters

PREFIX = "recexplore"
_ABOUT, _POPULAR, _WHOLE = "about", "popular", "whole"
_ROWS_AT_ONCE = 2_000  # in one trip over the network
_DIGITS = 16  # of the digest


def export(client: redis.Redis, table: ExplorationTable, prefix: str = PREFIX) -> str:
    """Writes a table as a new version and makes it the current one.

    A version that is there already is made current only. What a killed export has left is never
    read; exporting the same table again replaces it.

    Args:
      client: a connection.
      table: what to write.
      prefix: of the names of all keys.

    Returns:
      The version's name.
    """
    version = table.digest[:_DIGITS]
    key = _key(prefix, version)
    if not client.hexists(key, _WHOLE):
        client.delete(key)
        rows = iter(table.rows())
        while some := dict(_packed_rows(itertools.islice(rows, _ROWS_AT_ONCE))):
            client.hset(key, mapping=some)
        clusters, *values = table.popular()
        packed = b"".join([clusters.astype("<i4"), *(each.astype("<f4") for each in values)])
        said = {**dataclasses.asdict(table.about), "format": FORMAT}
        about = json.dumps(said, sort_keys=True)
        client.hset(key, mapping={_ABOUT: about, _POPULAR: packed})
        client.hset(key, _WHOLE, 1)
    _make_current(client, version, prefix)
    return version


def all_versions(client: redis.Redis, prefix: str = PREFIX) -> list[str]:
    """The names of all versions, oldest first."""
    return [version.decode() for version in client.lrange(f"{prefix}:versions", 0, -1)]


def current_version(client: redis.Redis, prefix: str = PREFIX) -> str:
    """The name of the current version.

    Raises:
      InputError: there is none, or the client decodes what it reads.
    """
    version = client.get(f"{prefix}:current")
    if version is None:
        raise InputError(
            f"Redis has no exploration table under the prefix {prefix!r}: {prefix}:current is "
            "missing. Export one with scripts/export_to_redis.py."
        )
    if isinstance(version, str):
        raise InputError(
            "The Redis client decodes what it reads, but tables are binary. Make it with "
            "decode_responses=False."
        )
    return version.decode()


def switch(client: redis.Redis, version: str, prefix: str = PREFIX) -> None:
    """Makes a version the current one that is there already, such as the one before.

    Raises:
      InputError: there is no such version.
    """
    if not client.hexists(_key(prefix, version), _WHOLE):
        names = ", ".join(all_versions(client, prefix)) or "none"
        raise InputError(f"Redis has no whole {_key(prefix, version)}; versions are {names}.")
    _make_current(client, version, prefix)


def remove_old(client: redis.Redis, keep: int, prefix: str = PREFIX) -> list[str]:
    """Removes all versions but the current one and the newest of the others.

    Args:
      client: a connection.
      keep: versions that are left, at least 1.
      prefix: of the names of all keys.

    Returns:
      The names of those that were removed.

    Raises:
      InputError: `keep` below 1, or nothing is current.
    """
    versions.check_keep(keep)
    current = current_version(client, prefix)
    removed = versions.superfluous(all_versions(client, prefix), current, keep)
    for version in removed:
        client.lrem(f"{prefix}:versions", 0, version)
        client.unlink(_key(prefix, version))
    return removed


class _Served(NamedTuple):
    """The version that a reader looks histories up in."""

    version: str
    about: About
    popular: PopularValues


class RedisTable:
    """Looks histories up in Redis; answers as `ExplorationTable` does.

    A look-up is one trip over the network. The version is the one that was current at the last
    `reload`; when it was removed meanwhile, the next look-up goes on with the one that is current.

    Args:
      client: a connection; threads may share it, and this object.
      clusters: fingerprint of the clusters that the table is served with.
      prefix: of the names of all keys.

    Raises:
      InputError: there is no table, it isn't whole, or it was made with other clusters.
    """

    def __init__(self, client: redis.Redis, clusters: str, prefix: str = PREFIX):
        self._client = client
        self._clusters = clusters
        self._prefix = prefix
        self._served = self._load()

    @property
    def version(self) -> str:
        """The version that answers now."""
        return self._served.version

    @property
    def about(self) -> About:
        """Its sizes, and the fingerprints of what it was made from."""
        return self._served.about

    def look_up(self, history: Sequence[int], banned: Iterable[int] = ()) -> Exploration:
        """See `ExplorationTable.look_up`.

        Raises:
          InputError: the history names a cluster that the table doesn't know; or the version was
            removed, and the one that is current can't be served.
        """
        banned = list(banned)
        while True:
            served = self._served
            about = served.about
            known = checked(history, about.num_clusters)
            longest = min(len(known), about.history_length)
            ends = [tuple(known[-length:]) for length in range(longest, 0, -1)]
            fields = [_WHOLE, *map(_field, ends)]
            whole, *values = self._client.hmget(_key(self._prefix, served.version), fields)
            if whole is not None:
                break
            self._served = self._load()
        stored = {end: value for end, value in zip(ends, values, strict=True) if value is not None}
        return answer(
            lambda end: _unpacked(stored[end]) if end in stored else None,
            served.popular,
            known,
            banned,
            history_length=about.history_length,
            num_chosen=about.num_chosen,
            num_clusters=about.num_clusters,
        )

    def reload(self) -> bool:
        """Goes on with the current version; returns whether it is another one.

        Raises:
          InputError: the current version can't be served. The one before goes on answering.
        """
        if current_version(self._client, self._prefix) == self._served.version:
            return False
        self._served = self._load()
        return True

    def _load(self) -> _Served:
        while True:
            version = current_version(self._client, self._prefix)
            key = _key(self._prefix, version)
            whole, said, packed = self._client.hmget(key, [_WHOLE, _ABOUT, _POPULAR])
            if whole is not None:
                break
            if current_version(self._client, self._prefix) == version:
                raise InputError(
                    f"Redis: {self._prefix}:current names {version}, but {key} is gone or not "
                    "whole. Export the table again, and see that Redis doesn't evict it."
                )
        fields = json.loads(said)
        if (found := fields.pop("format", None)) != FORMAT:
            raise InputError(
                f"Redis: {key} is of format {found!r}; this version of recexplore reads {FORMAT}. "
                "Export the table again."
            )
        about = About(**fields)
        check_clusters(about, self._clusters, f"Redis, {key}")
        count = len(packed) // 12
        values = struct.unpack(f"<{count}i{2 * count}f", packed)
        popular = tuple(values[start : start + count] for start in range(0, 3 * count, count or 1))
        return _Served(version, about, popular or ((), (), ()))


def _packed_rows(
    rows: Iterator[tuple[tuple[int, ...], Row]],
) -> Iterator[tuple[str, bytes]]:
    for history, (answers, exact) in rows:
        count = len(answers[0])
        yield _field(history), struct.pack(f"<B{count}i{3 * count}f", exact, *sum(answers, []))


def _unpacked(packed: bytes) -> Row:
    count = len(packed) // 16
    exact, *values = struct.unpack(f"<B{count}i{3 * count}f", packed)
    answers = tuple(values[place * count : (place + 1) * count] for place in range(4))
    return Row(answers, exact == 1)


def _field(history: Sequence[int]) -> str:
    return ",".join(map(str, history))


def _key(prefix: str, version: str) -> str:
    return f"{prefix}:table:{version}"


def _make_current(client: redis.Redis, version: str, prefix: str) -> None:
    with client.pipeline(transaction=True) as together:
        together.lrem(f"{prefix}:versions", 0, version)
        together.rpush(f"{prefix}:versions", version)
        together.set(f"{prefix}:current", version)
        together.execute()
