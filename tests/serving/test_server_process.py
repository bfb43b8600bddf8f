"""The server as a process, on real connections: load, floods, slow clients, the end."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from serving_process import serving
from small_work import add_table, make_work

from recexplore import cli
from recexplore.serving import versions

HISTORY = json.dumps({"history": [0, 1]}).encode()
QUESTION = (
    b"POST /v1/explore HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(HISTORY)
    + HISTORY
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_work(folder)
    return folder


@pytest.fixture(scope="module")
def served(work):
    with serving(work) as started:
        yield started


@pytest.fixture(scope="module")
def impatient(work):
    with serving(work, options={"header_seconds": 1.0}) as started:
        yield started


def ask(served, path, body=None, headers=None):
    """Returns (status, JSON)."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    with contextlib.closing(connection):
        method, told = "GET" if body is None else "POST", headers or {}
        connection.request(method, path, body, told, encode_chunked="Transfer-Encoding" in told)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def answered(connection):
    """Reads one answer from a socket: (status, JSON); None where it was closed without one."""
    reader = connection.makefile("rb")
    with reader:
        try:
            status = reader.readline()
            length = 0
            while (line := reader.readline().lower()) not in (b"\r\n", b""):
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            return (int(status.split()[1]), json.loads(reader.read(length))) if status else None
        except ConnectionError:
            return None


def still_answers(served):
    assert ask(served, "/v1/explore", HISTORY)[1]["level"] == "history"


def test_the_command_serves_a_work_directory_and_needs_neither_jax_nor_tensorflow(served, work):
    assert ask(served, "/healthz")[1]["version"] == 1
    still_answers(served)
    code = (
        "import sys, recexplore.cli, recexplore.serve; from pathlib import Path\n"
        "from recexplore.serving import server, connections\n"
        "from recexplore.interests.cluster_table import ClusterTable\n"
        f"recexplore.serve.read_names(Path({str(work)!r}), ClusterTable.read("
        f"Path({str(work)!r}) / 'clusters'))\n"
        "print(sorted({'jax', 'tensorflow', 'sklearn', 'ibis'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_table_is_switched_under_load_and_no_request_fails(tmp_path):
    make_work(tmp_path)
    done, problems, seen = threading.Event(), [], set()

    def load(port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            while not done.is_set():
                try:
                    connection.request("POST", "/v1/explore", HISTORY)
                    answer = connection.getresponse()
                    told = json.loads(answer.read())
                    seen.add((answer.status, told["version"], told["clusters"][0]["score"]))
                except Exception as error:
                    problems.append(error)

    with serving(tmp_path, "--reload_every", "0.05") as served:
        threads = [threading.Thread(target=load, args=(served.port,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for version in range(2, 12):
            assert add_table(tmp_path, version - 1.0) == version
            versions.remove_old(tmp_path / "exploration", keep=1)
            for _ in range(600):
                if ask(served, "/healthz")[1]["version"] == version:
                    break
                time.sleep(0.02)
        done.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert {told[1] for told in seen} >= {1, 11} and len(seen) > 5
    assert all(told == (200, told[1], told[1] - 0.5) for told in seen)  # one version an answer


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes_is_refused_and_the_refusal_arrives(served, chunked):
    body = b" " * (10 << 20)
    if chunked:
        sent = (body[start : start + 65_536] for start in range(0, len(body), 65_536))
        status, told = ask(served, "/v1/explore", sent, {"Transfer-Encoding": "chunked"})
    else:
        status, told = ask(served, "/v1/explore", body)
    assert (status, told["error"]["code"]) == (413, "body_too_large")
    still_answers(served)


def test_a_body_that_says_it_is_large_is_refused_before_it_is_sent(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/explore HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n"
            b"content-length: 10000000000\r\n\r\n"
        )
        assert answered(connection)[0] == 413


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /healthz HTT", 408, "headers_too_slow"),
        (b"", 408, "headers_too_slow"),
        (b"\r\n", 408, "headers_too_slow"),  # after an answer
        (b"\x16\x03\x01 is TLS", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000, 431, "headers_too_large"),
        (b"GET /?x=" + b"y" * 66_000 + b" HTTP/1.1\r\n\r\n", 431, "headers_too_large"),
    ],
)
def test_what_never_becomes_a_request_is_told_so_and_closed(impatient, sent, status, code):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as connection:
        if sent == b"\r\n":
            connection.sendall(QUESTION)
            assert answered(connection)[0] == 200
        connection.sendall(sent)
        found = answered(connection)
        assert (found[0], found[1]["error"]["code"]) == (status, code)
        assert connection.recv(100) == b""
    still_answers(impatient)


@pytest.mark.parametrize("stray", [b"X", b"\x00" * 70_000])
def test_a_whole_request_is_answered_whatever_comes_after_it(impatient, stray):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as connection:
        connection.sendall(QUESTION + stray)
        status, told = answered(connection)
        assert status == 200 and told["level"] == "history"
    still_answers(impatient)


def test_slow_headers_are_cut_off_however_steadily_they_come(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(3_000):
                connection.sendall(b"x: y\r\n")
                time.sleep(0.02)
            raise AssertionError("it was never closed")
    still_answers(impatient)


def test_ten_thousand_connections_are_answered_or_as_many_as_there_may_be(served):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(10_000, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections = []
    try:
        for _ in range(wanted):
            connections.append(socket.create_connection(("127.0.0.1", served.port), timeout=120))
            connections[-1].sendall(QUESTION)
        found = [answered(connection) for connection in connections]
    finally:
        for connection in connections:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {(status, told.get("level")) for status, told in found} == {(200, "history")}
    still_answers(served)
    if wanted < 10_000:
        pytest.skip(f"only {wanted:,} connections were tried: this process may open {hard:,} files")


def test_more_connections_than_allowed_are_told_so_and_the_others_go_on(work):
    with serving(work, options={"connections": 20}) as served:
        connections = [
            socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(60)
        ]
        for connection in connections:
            with contextlib.suppress(ConnectionError):  # refused ones may be closed by now
                connection.sendall(QUESTION)
        found = [answered(connection) for connection in connections]
        for connection in connections:
            connection.close()
        statuses = [status for status, _ in filter(None, found)]
        assert statuses.count(200) == 20 and set(statuses) == {200, 503}
        refused = next(told for status, told in filter(None, found) if status == 503)
        assert "has 20 connections open" in refused["error"]["message"]
        for _ in range(200):
            with contextlib.suppress(AssertionError, KeyError, OSError):
                still_answers(served)
                break
            time.sleep(0.05)
        still_answers(served)


def test_more_connections_than_there_are_files_leave_it_serving(work):
    code = (
        "import resource, sys; from recexplore import cli\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))\n"
        f"sys.exit(cli.main(['serve', '--port', '0', '--workdir', {str(work)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    with process:
        said = process.stderr.readline()
        assert "up to 60 connections" in said
        port = int(said.split("//")[1].split("/")[0].split(":")[1])
        connections = [
            socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(400)
        ]
        for connection in connections:
            connection.close()
        for _ in range(200):
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
                    assert answer.status == 200
                    break
            time.sleep(0.05)
        else:
            raise AssertionError("it doesn't answer any more")
        process.terminate()


def test_a_request_in_flight_is_answered_before_the_server_ends(work):
    with serving(work, options={}) as served:
        for _ in range(600):
            if ask(served, "/healthz")[1]["items"]["status"] == "ready":
                break
            time.sleep(0.05)
        events = [{"item_id": "i1", "timestamp": 1}]
        body = json.dumps({"user_id": "slow", "events": events}).encode()
        found = []
        asking = threading.Thread(target=lambda: found.append(ask(served, "/v1/recommend", body)))
        asking.start()
        assert served.process.stderr.readline() == "asked\n"
        served.process.send_signal(signal.SIGTERM)
        asking.join()
        assert found[0][0] == 200 and found[0][1]["items"][0]["title"] == "Title <1>"
        served.process.wait(60)
        with pytest.raises(OSError):
            ask(served, "/healthz")


def refused(capsys, *arguments):
    assert cli.main(["serve", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_served_is_said_before_it_starts(served, work, tmp_path, capsys):
    flags = ["--workdir", str(work), "--port"]
    said = refused(capsys, *flags, str(served.port))
    assert f"port {served.port} (" in said and "another --port" in said
    said = refused(capsys, *flags, "0", "--host", "0.0.0.0")
    assert "no token is set. Set RECEXPLORE_TOKEN or --token_file, or say --allow_anyone" in said
    said = refused(capsys, *flags, "0", "--host", "no.such.host.invalid", "--allow_anyone")
    assert "Can't listen on no.such.host.invalid" in said
    said = refused(capsys, "--workdir", str(tmp_path), "--port", "0")
    assert "clusters.parquet is missing. Run the stage that writes it" in said
    with pytest.raises(SystemExit):
        cli.main(["serve", "--workdir", str(work), "--port", "http"])
    assert "'http' is no number in 0..65535" in capsys.readouterr().err


def test_the_environments_token_is_asked_for_and_a_signal_looks_for_a_version(tmp_path):
    make_work(tmp_path)
    environment = {**os.environ, "RECEXPLORE_TOKEN": "0123456789abcdef"}
    flags = ("--host", "0.0.0.0", "--reload_every", "600")
    with serving(tmp_path, *flags, environment=environment) as served:
        assert ask(served, "/v1/explore", HISTORY)[0] == 401
        right = {"Authorization": "Bearer 0123456789abcdef"}
        assert ask(served, "/v1/explore", HISTORY, right)[0] == 200
        add_table(tmp_path, 1.0)
        for _ in range(600):
            served.process.send_signal(signal.SIGHUP)
            if ask(served, "/healthz")[1]["version"] == 2:
                break
            time.sleep(0.05)
        assert ask(served, "/healthz")[1]["version"] == 2


def test_without_the_extra_it_says_how_to_install_it(work):
    code = (
        "import sys; sys.modules['fastapi'] = None; from recexplore import cli\n"
        f"sys.exit(cli.main(['serve', '--workdir', {str(work)!r}]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = " ".join(found.stderr.split())
    assert found.returncode == 2 and "needs fastapi, which isn't installed" in said
    assert "pip install 'recexplore[serve]'" in said
