"""The server's answers, its refusals, and what it tells of itself."""

import re
import threading
import time
from typing import NamedTuple

import pytest
from small_work import DESCRIPTIONS, add_table, make_work
from starlette.testclient import TestClient

from recexplore import serve
from recexplore.errors import InputError
from recexplore.interests.cluster_table import ClusterTable
from recexplore.serving import server
from recexplore.serving.exploration_table import TableReader
from recexplore.serving.guard import Limits
from recexplore.serving.planner_queue import PlannerQueue

TOKEN = "a token of no importance".replace(" ", "-")


class Planned(NamedTuple):
    """As the planner's."""

    item_id: str
    cluster: int
    propensity: float
    score: float
    log_probability: float
    level: str


class Fake:
    """A planner that shows the last item met, and does as its user's name says."""

    def __init__(self):
        self.asked, self.go_on = threading.Event(), threading.Event()

    def plan(self, user_id, events, now):
        if user_id == "refused":
            raise InputError("Item i99 isn't known. Send known ones.")
        if user_id == "broken":
            raise ZeroDivisionError
        if user_id == "slow":
            self.asked.set()
            self.go_on.wait(30)
        return [Planned(item, 2, 0.5, float(now), -1.0, "history") for item, *_ in events[-1:]]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_work(folder)
    return folder


@pytest.fixture
def reader(work):
    return TableReader(work / "exploration", ClusterTable.read(work / "clusters").fingerprint)


def client_of(work, reader, planner=None, **options):
    names = serve.read_names(work, ClusterTable.read(work / "clusters"))
    app = server.create_app(reader, names, planner or PlannerQueue(None), **options)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(work, reader):
    with client_of(work, reader) as made:
        yield made


def test_an_answer_is_the_tables(client, reader):
    found = reader.look_up([0, 1])
    answer = client.post("/v1/explore", json={"history": [0, 1]})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert (told["version"], told["level"]) == (reader.table.version, "history")
    assert [row["cluster"] for row in told["clusters"]] == found.clusters == [2, 3]
    assert told["clusters"][0] == {
        "cluster": 2,
        "description": DESCRIPTIONS[2],
        "score": found.scores[0],
        "log_probability": found.log_probabilities[0],
        "propensity": found.propensities[0],
    }


@pytest.mark.parametrize(
    "asked",
    [
        {"history": [DESCRIPTIONS[0], DESCRIPTIONS[1]]},
        {"history": [0, " COOKING, noodles "]},
        {"histories": [[0, 1]]},
        "?history=0,1",
        "?history=0&history=1",
        "?history=cooking, bread&history=1",
    ],
)
def test_a_history_may_be_named_in_several_ways(client, asked):
    expected = client.post("/v1/explore", json={"history": [0, 1]}).json()
    if isinstance(asked, str):
        told = client.get("/v1/explore" + asked).json()
    else:
        told = client.post("/v1/explore", json=asked).json()
    assert told.get("explorations", [told])[0]["clusters"] == expected["clusters"]


def test_several_histories_count_and_what_is_banned(client):
    asked = {"histories": [[0, 1], [5, 1], []], "banned": [2], "count": 1}
    told = client.post("/v1/explore", json=asked).json()
    found = [(each["level"], each["clusters"][0]["cluster"]) for each in told["explorations"]]
    assert found == [("history", 3), ("shorter", 3), ("popular", 3)]
    assert all(len(each["clusters"]) == 1 for each in told["explorations"])


@pytest.mark.parametrize(
    ("asked", "status", "code", "message"),
    [
        (b'{"history": [0, 6]}', 422, "unknown_cluster", r"no cluster 6: .* 0\.\.5.*/v1/clusters"),
        (b'{"history": [-1]}', 422, "unknown_cluster", "no cluster -1"),
        (b'{"history": [1' + b"0" * 4000 + b"]}", 422, "unknown_cluster", "no cluster 10000"),
        (b'{"history": [0], "banned": [77]}', 422, "unknown_cluster", "no cluster 77"),
        (b'{"history": ["polka"]}', 422, "unknown_cluster", "described as 'polka'.*/v1/clusters"),
        (b'{"history": [0,', 400, "malformed_json", "isn't valid JSON.*history, histories, ban"),
        (b"", 400, "malformed_json", "isn't valid JSON"),
        (b'\xff{"history": []}', 400, "malformed_json", "isn't valid JSON"),
        (b'{"history": ["\\ud800"]}', 400, "malformed_json", "isn't valid JSON"),
        (b"[" * 20_000, 400, "malformed_json", "isn't valid JSON"),
        (b"[1]", 422, "invalid_request", "The body: input should be an object"),
        (b"{}", 422, "invalid_request", "Send either `history` or `histories`"),
        (b'{"history": [], "histories": []}', 422, "invalid_request", "either"),
        (b'{"history": [1.5]}', 422, "invalid_request", r"history\[0\]: .*valid integer"),
        (b'{"history": [true]}', 422, "invalid_request", r"history\[0\]: .*valid integer"),
        (b'{"history": [], "bannd": []}', 422, "invalid_request", "bannd: there is no such field"),
        (b'{"history": [], "count": 0}', 422, "invalid_request", "count: .*greater than or equal"),
        (b'{"history": [], "count": 3}', 422, "invalid_request", r"at most 2 .* Ask for 1\.\.2"),
        (b'{"histories": [%s[]]}' % (b"[]," * 64), 422, "invalid_request", "at most 64 items"),
        (b'{"history": [%s0]}' % (b"0," * 256), 422, "invalid_request", "at most 256 items"),
        (b" " * 70_000, 413, "body_too_large", "larger than 65,536 bytes. Send fewer"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_what_to_do(client, asked, status, code, message):
    answer = client.post("/v1/explore", content=asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert re.search(message, error["message"]) and len(error["message"]) < 500
    assert client.post("/v1/explore", json={"history": []}).status_code == 200


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(client):
    missing, wrong = client.get("/v1/explroe"), client.put("/v1/recommend")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "/v1/explore" in missing.json()["error"]["message"]
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "/v1/recommend is asked with POST, not with PUT."
    assert client.delete("/v1/explore").headers["allow"] == "GET, POST"
    answer = client.get("/v1/explore?history=0&history=polka&x=1")
    assert answer.status_code == 422 and "x: there is no" in answer.json()["error"]["message"]


def test_the_token_opens_all_but_the_page_and_the_health_need_none(work, reader):
    with client_of(work, reader, token=TOKEN) as client:
        assert client.get("/").status_code == client.get("/healthz").status_code == 200
        for path in ("/v1/clusters", "/metrics", "/openapi.json", "/v1/explore?history=0", "/x"):
            for told in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
                answer = client.get(path, headers=told)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "Authorization: Bearer TOKEN" in answer.json()["error"]["message"]
        right = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/explore?history=0", headers=right).status_code == 200
        right = {"authorization": f"bearer {TOKEN}"}  # the scheme may be written in any case
        assert client.get("/v1/explore?history=0", headers=right).status_code == 200
        assert client.post("/v1/explore", content=b" " * 10**6).status_code == 401


def test_tokens_come_from_a_file_or_the_environment(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "short").write_text("secret")
    assert serve.read_token(None, {}) is None
    assert serve.read_token(None, {"RECEXPLORE_TOKEN": TOKEN}) == TOKEN
    assert serve.read_token(str(tmp_path / "token"), {"RECEXPLORE_TOKEN": "x"}) == TOKEN
    with pytest.raises(InputError, match="short holds no token: it must be at least 16"):
        serve.read_token(str(tmp_path / "short"), {})
    with pytest.raises(InputError, match="RECEXPLORE_TOKEN holds no token.*openssl rand"):
        serve.read_token(None, {"RECEXPLORE_TOKEN": ""})
    with pytest.raises(InputError, match="--token_file .*missing can't be read"):
        serve.read_token(str(tmp_path / "missing"), {})


def test_it_says_what_it_serves_and_counts_what_it_does(client, reader):
    health = client.get("/healthz").json()
    assert health["status"] == "ok" and health["version"] == reader.table.version
    assert health["fingerprints"] == reader.table.about.fingerprints
    assert health["items"] == {"status": "absent", "problem": None}
    client.post("/v1/explore", json={"histories": [[0, 1], [], [5, 1]]})
    client.post("/v1/explore", content="{")
    client.get("/no/such/path")
    text = client.get("/metrics").text
    for line in (
        'recexplore_requests_total{route="/v1/explore",status="200"} 1.0',
        'recexplore_requests_total{route="/v1/explore",status="400"} 1.0',
        'recexplore_requests_total{route="other",status="404"} 1.0',
        'recexplore_explorations_total{level="history"} 1.0',
        'recexplore_explorations_total{level="shorter"} 1.0',
        'recexplore_explorations_total{level="popular"} 1.0',
        'recexplore_request_seconds_count{route="/v1/explore"} 2.0',
        f"recexplore_table_version {float(reader.table.version)}",
    ):
        assert line in text


def test_openapi_knows_every_route_and_what_is_asked(client):
    told = client.get("/openapi.json").json()
    assert set(told["paths"]) == {
        "/v1/explore",
        "/v1/recommend",
        "/v1/clusters",
        "/v1/histories/random",
        "/healthz",
        "/metrics",
    }
    body = told["paths"]["/v1/recommend"]["post"]["requestBody"]["content"]["application/json"]
    events = body["schema"]["properties"]["events"]
    assert set(events["items"]["properties"]) == {"item_id", "timestamp", "skipped", "explored"}
    assert "$ref" not in str(body)


def test_clusters_and_a_random_history_for_the_page(client):
    clusters = client.get("/v1/clusters").json()["clusters"]
    assert [each["description"] for each in clusters] == DESCRIPTIONS
    assert clusters[4]["examples"][1] == {"item_id": "i10", "title": "Title <10>"}
    seen = set()
    for _ in range(60):
        drawn = client.get("/v1/histories/random").json()["history"]
        assert all(each["description"] == DESCRIPTIONS[each["cluster"]] for each in drawn)
        seen.add(tuple(each["cluster"] for each in drawn))
    assert seen <= {(0, 1), (1, 0), (2, 1), (4, 3)} and len(seen) > 1


def test_a_new_version_answers_and_one_that_cannot_be_served_does_not(tmp_path, caplog):
    make_work(tmp_path)
    clusters = ClusterTable.read(tmp_path / "clusters").fingerprint
    reader = TableReader(tmp_path / "exploration", clusters)
    with client_of(tmp_path, reader, reload_seconds=0.05) as client:

        def until(condition):
            for _ in range(600):
                if condition(client.get("/healthz").json()):
                    return
                time.sleep(0.05)
            raise AssertionError(client.get("/healthz").json())

        add_table(tmp_path, 1.0)
        until(lambda health: health["version"] == 2)
        assert client.get("/v1/explore?history=0,1").json()["clusters"][0]["score"] == 1.5
        add_table(tmp_path, 2.0, clusters="d")
        until(lambda health: "made with other clusters" in (health["reload_problem"] or ""))
        assert client.get("/v1/explore?history=0,1").json()["version"] == 2
        bad = tmp_path / "exploration" / f"{add_table(tmp_path, 3.0):06d}" / "table.arrow"
        until(lambda health: health["version"] == 4 and health["reload_problem"] is None)
        assert bad.exists()
        text = client.get("/metrics").text
        assert "recexplore_reloads_total 2.0" in text and "recexplore_table_version 4.0" in text
        assert "recexplore_failed_reloads_total 0.0" not in text
    assert len([r for r in caplog.records if "made with other clusters" in r.message]) == 1


def test_a_version_with_damaged_values_is_not_served(tmp_path, reader):
    clusters = make_work(tmp_path).fingerprint
    reader = TableReader(tmp_path / "exploration", clusters)
    add_table(tmp_path, 1.0)
    path = tmp_path / "exploration" / "000002" / "table.arrow"
    content = path.read_bytes()
    place = content.index(b"\x00\x00\xc0\x3f")  # a score, 1.5
    path.write_bytes(content[:place] + b"\x00\x00\xd0\x3f" + content[place + 4 :])
    with pytest.raises(InputError, match="isn't what was written"):
        reader.reload(check=True)
    assert reader.look_up([0, 1]).scores[0] == 0.5


EVENTS = [{"item_id": "i3", "timestamp": 5}, {"item_id": "i7", "timestamp": 9, "skipped": True}]


def ready(client):
    for _ in range(200):
        if client.get("/healthz").json()["items"]["status"] != "loading":
            return
        time.sleep(0.05)


def test_items_are_planned_and_shown_with_what_they_are_called(work, reader):
    with client_of(work, reader, PlannerQueue(lambda: Fake().plan)) as client:
        ready(client)
        asked = {"user_id": "u", "events": EVENTS, "now": 12}
        assert client.post("/v1/recommend", json=asked).json() == {
            "version": reader.table.version,
            "items": [
                {
                    "item_id": "i7",
                    "title": "Title <7>",
                    "cluster": 2,
                    "description": DESCRIPTIONS[2],
                    "score": 12.0,
                    "log_probability": -1.0,
                    "propensity": 0.5,
                    "level": "history",
                }
            ],
        }
        del asked["now"]
        assert client.post("/v1/recommend", json=asked).json()["items"][0]["score"] > 1.7e9
        for changed, status, code, message in (
            ({"user_id": "refused"}, 422, "invalid_request", "Item i99 isn't known"),
            ({"user_id": "broken"}, 500, "internal", "Its log says what"),
            ({"user_id": 3}, 422, "invalid_request", "user_id: .*valid string"),
            ({"events": [{"item_id": "i"}]}, 422, "invalid_request", r"events\[0\].timestamp: fi"),
            ({"events": [{**EVENTS[0], "x": 1}]}, 422, "invalid_request", "x: there is no such"),
            ({"events": EVENTS * 501}, 422, "invalid_request", "at most 1000 items"),
        ):
            answer = client.post("/v1/recommend", json={**asked, **changed})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code)
            assert re.search(message, error["message"])


def test_planning_that_takes_too_long_or_waits_too_long_is_refused(work, reader):
    fake = Fake()
    queue = PlannerQueue(lambda: fake.plan, threads=1, waiting=1, seconds=0.2)
    with client_of(work, reader, queue) as client:
        ready(client)
        asked = {"user_id": "slow", "events": EVENTS}
        first = client.post("/v1/recommend", json=asked)  # goes on in its thread
        assert (first.status_code, first.json()["error"]["code"]) == (504, "timeout")
        second = client.post("/v1/recommend", json=asked)  # waited, and was taken out again
        assert second.status_code == 504
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(client.post("/v1/recommend", json=asked))
        )
        waiting.start()
        statuses = set()
        while waiting.is_alive():
            answer = client.post("/v1/recommend", json=asked)
            statuses.add(answer.status_code)
            if answer.status_code == 503:
                assert answer.headers["retry-after"] == "1"
        waiting.join()
        assert statuses | {answers[0].status_code} == {503, 504}
        assert client.get("/v1/explore?history=0").status_code == 200
        fake.go_on.set()
        for _ in range(200):
            if client.post("/v1/recommend", json=asked).status_code == 200:
                break
        else:
            raise AssertionError("the planner's places weren't given back")


def test_without_an_item_model_it_says_what_to_do(work, reader, client):
    asked = {"user_id": "u", "events": EVENTS}

    def fails():
        raise InputError("W/models/items is damaged. Train it again.")

    def waits():
        time.sleep(1)
        return Fake().plan

    answer = client.post("/v1/recommend", json=asked)
    assert answer.status_code == 503 and "has no item model" in answer.json()["error"]["message"]
    with client_of(work, reader, PlannerQueue(fails)) as broken:
        ready(broken)
        answer = broken.post("/v1/recommend", json=asked)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].endswith("is damaged. Train it again.")
        assert broken.get("/healthz").json()["items"]["status"] == "failed"
    with client_of(work, reader, PlannerQueue(waits)) as loading:
        answer = loading.post("/v1/recommend", json=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert answer.headers["retry-after"]
        ready(loading)
        assert loading.post("/v1/recommend", json=asked).status_code == 200


def test_more_requests_at_once_than_allowed_are_told_to_come_again(work, reader):
    fake = Fake()
    queue = PlannerQueue(lambda: fake.plan)
    with client_of(work, reader, queue, limits=Limits(requests=1)) as client:
        ready(client)
        asked = {"user_id": "slow", "events": EVENTS}
        slow = threading.Thread(target=client.post, args=("/v1/recommend",), kwargs={"json": asked})
        slow.start()
        assert fake.asked.wait(30)
        answer = client.get("/v1/clusters")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        fake.go_on.set()
        slow.join()
        assert client.get("/v1/clusters").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
    ],
)
def test_without_a_token_only_names_of_this_computer_are_answered(work, reader, host, status):
    with client_of(work, reader, local_names=True) as client:
        answer = client.get("/healthz", headers={"host": host})
        assert answer.status_code == status
        if status != 200:
            assert answer.json()["error"]["code"] == "misdirected"
