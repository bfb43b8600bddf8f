"""A table in a real Redis answers as the table does, whatever happens to exports."""

import os
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tables import CLUSTERS, FINGERPRINTS, build, small, tables

from recexplore.errors import InputError
from recexplore.interests.cluster_table import ClusterTable
from recexplore.serving import redis_export
from recexplore.serving.redis_export import RedisTable

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_to_redis.py"

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None,
    reason="redis-server is not installed (Debian package redis-server)",
)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Of a server that keeps nothing."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number = free.getsockname()[1]
    command = ["redis-server", "--port", str(number), "--bind", "127.0.0.1", "--save", ""]
    command += ["--appendonly", "no", "--dir", str(tmp_path_factory.mktemp("redis"))]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with redis.Redis(port=number) as client:
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
    yield number
    server.terminate()
    server.wait()


@pytest.fixture
def client(port):
    with redis.Redis(port=port) as connected:
        connected.flushall()
        yield connected


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tables(), st.data())
def test_any_look_up_is_the_tables(client, arguments, data):
    client.flushall()
    table = build(**arguments)
    redis_export.export(client, table)
    there = RedisTable(client, CLUSTERS)
    assert there.about == table.about
    ids = st.integers(0, arguments["num_clusters"] - 1)
    likely = st.sampled_from([list(history) for history in arguments["rows"]])
    for _ in range(8):
        history, banned = data.draw(likely | st.lists(ids, max_size=5)), data.draw(st.lists(ids))
        assert there.look_up(history, banned) == table.look_up(history, banned)


def test_what_lies_there_is_as_described(client):
    version = redis_export.export(client, small(), "videos")
    assert version == small().digest[:16]
    assert client.get("videos:current").decode() == version
    packed = client.hget(f"videos:table:{version}", "0,1")
    expected = (1, 2, 3, 0.5, 0.25, -3.5, -3.75, 0.5, 0.5)
    assert struct.unpack("<B2i6f", packed) == expected
    assert client.hget(f"videos:table:{version}", "1")[0] == 0
    popular = client.hget(f"videos:table:{version}", "popular")
    assert struct.unpack("<6i12f", popular)[:7] == (3, 0, 5, 1, 2, 4, 3 / 8)


def test_tables_of_more_than_one_trip_arrive_whole(client, monkeypatch):
    monkeypatch.setattr(redis_export, "_ROWS_AT_ONCE", 3)
    rows = {(a, b): (1, [(b + 1) % 7], [a / 8]) for a in range(5) for b in (5, 6)}
    rows[6,] = (1, [], [])  # nothing to propose
    table = build({h: row for h, row in rows.items() if row[1][:1] != [h[0]]}, num_clusters=7)
    redis_export.export(client, table)
    there = RedisTable(client, CLUSTERS)
    for history, row in table.rows():
        assert there.look_up(history) == table.look_up(history)
        assert client.hexists(f"recexplore:table:{there.version}", ",".join(map(str, history)))
        assert not row.answer[0] or there.look_up(history).clusters == row.answer[0][:2]


@pytest.mark.parametrize("history", [[0, 1], [5, 1], [5, 5, 0], []])
def test_a_look_up_is_one_command_whichever_level_answers(client, history):
    redis_export.export(client, small())
    there = RedisTable(client, CLUSTERS)
    client.config_resetstat()
    assert there.look_up(history) == small().look_up(history)
    calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert {name: n for name, n in calls.items() if "config" not in name} == {"cmdstat_hmget": 1}


def test_unknown_clusters_other_clusters_and_empty_servers_are_refused(client):
    with pytest.raises(InputError, match="Redis has no exploration table under the prefix"):
        RedisTable(client, CLUSTERS)
    redis_export.export(client, small())
    with pytest.raises(InputError, match="made with other clusters"):
        RedisTable(client, "d" * 64)
    with pytest.raises(InputError, match=r"knows the whole numbers 0\.\.5"):
        RedisTable(client, CLUSTERS).look_up([0, 6])
    key = f"recexplore:table:{redis_export.current_version(client)}"
    client.hset(key, "about", client.hget(key, "about").replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(InputError, match="is of format 2; this version of recexplore reads 1"):
        RedisTable(client, CLUSTERS)
    with redis.Redis(port=client.get_connection_kwargs()["port"], decode_responses=True) as other:
        with pytest.raises(InputError, match="decode_responses=False"):
            RedisTable(other, CLUSTERS)


def test_versions_are_switched_and_removed(client):
    first, second, third = (redis_export.export(client, small(float(i))) for i in range(3))
    assert redis_export.all_versions(client) == [first, second, third]
    reader = RedisTable(client, CLUSTERS)
    redis_export.switch(client, first)
    assert reader.look_up([0, 1]).scores[0] == 2.5
    assert reader.reload() and not reader.reload()
    assert reader.look_up([0, 1]).scores[0] == 0.5
    redis_export.export(client, small(1.0))  # there already
    assert redis_export.remove_old(client, keep=2) == [third]
    assert redis_export.current_version(client) == second
    assert redis_export.remove_old(client, keep=1) == [first]
    assert reader.look_up([0, 1]).scores[0] == 1.5  # its version is gone
    assert set(client.keys()) == {
        b"recexplore:current",
        b"recexplore:versions",
        f"recexplore:table:{second}".encode(),
    }
    with pytest.raises(InputError, match=f"no whole recexplore:table:{first}; versions are"):
        redis_export.switch(client, first)
    with pytest.raises(InputError, match="must be at least 1"):
        redis_export.remove_old(client, keep=0)
    client.delete(f"recexplore:table:{second}")
    with pytest.raises(InputError, match="is gone or not whole.*evict"):
        reader.look_up([0, 1])


def test_a_reload_that_fails_leaves_the_old_version_answering(client):
    redis_export.export(client, small())
    reader = RedisTable(client, CLUSTERS)
    other = build({}, num_clusters=3, fingerprints={**FINGERPRINTS, "clusters": "d"})
    redis_export.export(client, other)
    with pytest.raises(InputError, match="made with other clusters"):
        reader.reload()
    assert reader.look_up([0, 1]).scores[0] == 0.5


def test_no_look_up_fails_while_versions_come_and_go(client):
    redis_export.export(client, small())
    shared = RedisTable(client, CLUSTERS)
    done, problems, seen = threading.Event(), [], set()

    def look(reloads):
        while not done.is_set():
            try:
                seen.add(shared.look_up([0, 1]).scores[0])
                if reloads:
                    shared.reload()
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=look, args=(bool(i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for offset in range(1, 60):
        redis_export.export(client, small(float(offset)))
        redis_export.remove_old(client, keep=1)
    done.set()
    for thread in threads:
        thread.join()
    assert not problems and len(seen) > 3
    assert len(redis_export.all_versions(client)) == 1


def test_a_killed_export_leaves_the_old_version_current(client, port):
    redis_export.export(client, small())
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import redis
        from recexplore.serving import redis_export
        from small_tables import small

        def hang(table):
            print("there", flush=True)
            time.sleep(600)

        redis_export.ExplorationTable.popular = hang
        redis_export.export(redis.Redis(port={port}), small(1.0))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    reader = RedisTable(client, CLUSTERS)
    assert reader.look_up([0, 1]).scores[0] == 0.5
    half = f"recexplore:table:{small(1.0).digest[:16]}"
    assert client.hlen(half) == 7  # the rows, and nothing else
    client.hset(half, "5,5", b"left by the killed one")
    redis_export.export(client, small(1.0))
    assert reader.reload() and reader.look_up([0, 1]) == small(1.0).look_up([0, 1])
    assert not client.hexists(half, "5,5")


def test_the_script_exports_what_a_work_directory_holds(client, port, tmp_path, capsys):
    export = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--workdir", str(tmp_path), "--url", f"redis://localhost:{port}/0"]
    assert export(arguments) == 2
    assert "clusters.parquet is missing" in " ".join(capsys.readouterr().err.split())
    clusters = ClusterTable(
        pa.table(
            {
                "cluster_id": range(6),
                "description": list("abcdef"),
                "path": [[0]] * 6,
                "num_items": [0] * 6,
                "num_interactions": [0] * 6,
                "centroid": [[0.0]] * 6,
            }
        ),
        pa.table({"item_id": ["x"], "cluster_id": [0]}),
    )
    clusters.write(tmp_path / "clusters")
    fingerprint = ClusterTable.read(tmp_path / "clusters").fingerprint
    rows = {(0, 1): (1, [2], [0.5])}
    for offset in (0.0, 1.0):
        rows = {(0, 1): (1, [2], [0.5 + offset])}
        table = build(rows, num_clusters=6, fingerprints={"clusters": fingerprint})
        table.write(tmp_path / "exploration")
        assert export([*arguments, "--prefix", "videos", "--keep", "1"]) == 0
    said = capsys.readouterr().out
    assert "videos: version" in said and said.endswith("1 older versions removed\n")
    reader = RedisTable(client, fingerprint, "videos")
    assert reader.look_up([0, 1]).scores == [1.5]
    assert export([*arguments[:2], "--url", "redis://localhost:1"]) == 2
    assert export([*arguments[:2], "--url", "localhost"]) == 2
    assert "is not a Redis URL" in capsys.readouterr().err
