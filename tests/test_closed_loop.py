"""The stage that closes the loop: what is learned from what, and what comes of it."""

import numpy as np
import pytest

from recexplore import artifacts, closed_loop
from recexplore.errors import InputError
from recexplore.evaluation import loop_page, rounds
from recexplore.progress import Progress
from recexplore.serving.exploration import Exploration
from recexplore.serving.item_recommender import Ranked
from recexplore.serving.planner import Budget, Planner
from recexplore.simulation.world import Settings, make_world

SETTINGS = Settings(num_users=300, num_items=400)
TOPICS = make_world(SETTINGS).item_topics
FIRST = np.searchsorted(TOPICS, np.arange(TOPICS.max() + 1))  # an item there from the start


class FirstItem:
    item_ids = [f"v{item}" for item in range(SETTINGS.num_items)]

    def number(self, item_id):
        return int(item_id[1:])

    def recommend(self, sequences, clusters, count, excluded):
        items = np.where(clusters >= 0, FIRST[clusters], -1)[..., None]
        for row, left_out in enumerate(excluded):
            items[row][np.isin(items[row], [*left_out, *sequences[row]])] = -1
        return Ranked(items, np.where(items >= 0, 0.0, -np.inf).astype(np.float32))


def always(cluster):
    """A planner that knows one cluster."""

    def look_up(history, banned):
        left_out = cluster in history or cluster in banned
        return Exploration(*([] if left_out else [x] for x in (cluster, 0.5, -1.0, 1.0)), "history")

    clusters = {f"v{item}": int(topic) for item, topic in enumerate(TOPICS)}
    return Planner(look_up, FirstItem(), clusters, Budget())


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Where every table's planner knows the cluster that its folder's number says."""
    artifacts.write_json(tmp_path / "clusters" / "kept.json", "clusters")
    rows = sum(len(day.users) for day in rounds.LivingPlatform(SETTINGS, 2).days)
    artifacts.write_json(tmp_path / "interactions" / "counts.json", {"interactions": rows})
    number = {tmp_path.name: 1, "round_2": 2, "round_3": 3}

    def planner(work, folder, _):
        assert work == tmp_path
        return always(number[folder.name])

    monkeypatch.setattr(closed_loop, "_table_planner", planner)
    monkeypatch.setattr(closed_loop, "_random_planner", lambda *_: always(9))
    return tmp_path


def test_every_round_learns_from_the_log_so_far(work, capsys):
    learned = []

    def ingest(folder, progress, *, read_log):
        learned.append((folder.name, "ingest", read_log().interactions.to_pyarrow()))
        assert artifacts.read_json(folder / "clusters" / "kept.json") == "clusters"

    def explore(folder, progress):
        learned.append((folder.name, "explore", None))

    def train(folder, progress, name):
        learned.append((folder.name, name, None))

    closed_loop.closed_loop(
        work,
        Progress(terminal=False),
        platform=SETTINGS,
        log_days=2,
        learn={"ingest": ingest, "novelty": train, "alignment": train, "explore": explore},
        budget=Budget(),
        days_per_round=2,
        bootstrap_samples=100,
    )
    steps = ["ingest", "novelty", "alignment", "explore"]
    assert [step[:2] for step in learned] == [
        (folder, step) for folder in ("round_2", "round_3") for step in steps
    ]
    before, after = learned[0][2], learned[4][2]
    assert before.num_rows < after.num_rows
    days = [len(set(np.array(log["timestamp"]) // 86_400)) for log in (before, after)]
    assert days[1] > days[0] >= 4
    explored = after.filter(np.array(after["policy"].to_pylist()) == "exploration")
    assert explored["propensity"].null_count == 0
    shown = {int(TOPICS[int(item[1:])]) for item in explored["item_id"].to_pylist()}
    assert shown == {1, 2, 9}
    metrics = artifacts.read_json(work / "closed_loop" / "metrics.json")
    assert loop_page.num_rounds(metrics) == 3
    assert "closed_loop/round_1/latest/satisfaction_against_first_low" in metrics
    assert "closed_loop/round_3/random/satisfaction" not in metrics  # its only cluster rests
    assert "<td>–</td>" in loop_page.sections(metrics)[loop_page.HEADING]
    assert {name.split("/")[2] for name in metrics} == {"random", "first", "latest"}
    assert "round 3: satisfaction random" in capsys.readouterr().err


def test_the_page_says_what_came_of_it():
    metrics = {
        f"closed_loop/round_{number}/{arm}/{metric}{end}": 0.1 * number + place
        for number in (1, 2)
        for arm in closed_loop.ARMS
        for metric in ("satisfaction", "positive_playback_rate", "satisfaction_against_first")
        for end, place in (("", 0.0), ("_low", -0.01), ("_high", 0.01))
    }
    ((heading, body),) = loop_page.sections(metrics).items()
    assert heading == "Closing the loop" and "<svg" in body
    assert "In round 2 explorations by its table" in body and "<b>+20.0%</b>" in body
    assert "0.200 <small>0.190–0.210</small>" in body
    assert loop_page.sections({"experiment/x": 1.0}) == {}


def test_a_platform_that_did_not_make_the_log_is_refused(work):
    with pytest.raises(InputError, match="The log has .* must be those of the log"):
        closed_loop.closed_loop(
            work, Progress(silent=True), platform=SETTINGS, log_days=3, learn={}, budget=Budget()
        )


@pytest.mark.parametrize("changes", [{"num_rounds": 0}, {"days_per_round": 0}])
def test_there_must_be_something_to_do(work, changes):
    (name,) = changes
    with pytest.raises(InputError, match=f"closed_loop.closed_loop.{name} is 0; it must be at"):
        closed_loop.closed_loop(
            work,
            Progress(silent=True),
            platform=SETTINGS,
            log_days=1,
            learn={},
            budget=Budget(),
            **changes,
        )
