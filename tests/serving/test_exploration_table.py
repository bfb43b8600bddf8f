"""The exploration table: what was computed is what is looked up, and nothing else is served."""

import contextlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import CLUSTERS, FINGERPRINTS, build, plain_answer, small, tables

from recexplore.errors import InputError
from recexplore.evaluation.offline import exploration_metrics
from recexplore.serving import table_files
from recexplore.serving.exploration import Popular
from recexplore.serving.exploration_table import ExplorationTable
from recexplore.serving.history_keys import HistoryKeys, is_ascending

SHARED = {"deadline": None, "max_examples": 60}


def test_a_written_table_answers_as_before(tmp_path):
    small().write(tmp_path)
    table = ExplorationTable.open(tmp_path, CLUSTERS)
    table.check()
    own = table.look_up([0, 1])
    assert own == ([2, 3], [0.5, 0.25], [-3.5, -3.75], [0.5, 0.5], "history")
    assert table.look_up(np.array([1, 0], np.int32).tolist()).clusters == [4]
    assert len(table) == 4 and table.version == 1
    assert table.about.fingerprints == FINGERPRINTS
    assert dict(table) == dict(small())
    assert dict(table)[1, 0] == ([4], [1.5], [-2.5], [0.5], "history")


def test_each_level_answers_where_those_before_it_cannot():
    table = small()
    assert table.look_up([0, 1]).level == "history"
    assert table.look_up([5, 0, 1]).level == "history"  # the last K
    # After 1 users of [0, 1] (3 of them) and [2, 1] (1) stand: 3 is chosen for both.
    shorter = table.look_up([5, 1])
    assert shorter.level == "shorter" and shorter.clusters == [3, 2]
    assert shorter.scores == [(3 * 0.25 + 0.75) / 4, 0.5] and shorter.propensities == [1.0, 1.0]
    assert table.look_up([1]) == shorter
    assert table.look_up([3, 1]).clusters == [2, 0]  # 3 is the user's own; another moves up
    popular = table.look_up([0, 5])
    assert popular == ([3, 1], [0.375, 0.125], [-4.0, -2.0], [1.0, 1.0], "popular")
    assert table.look_up([]).clusters == [3, 0]


def test_banned_clusters_are_left_out_at_every_level():
    table = small()
    assert table.look_up([0, 1], banned=[2]).clusters == [3]
    assert table.look_up([5, 1], banned=[3]).clusters == [2, 0]
    backed_off = table.look_up([0, 1], banned={2, 3})  # 0, the other after 1, is the user's own
    assert backed_off.clusters == [5, 4] and backed_off.level == "popular"
    assert table.look_up([0, 1], banned=range(2, 6)) == ([], [], [], [], "popular")


@settings(**SHARED)
@given(tables(), st.data())
def test_any_look_up_is_what_going_through_all_rows_gives(arguments, data):
    table = build(**arguments)
    ids = st.integers(0, arguments["num_clusters"] - 1)
    likely = st.sampled_from([list(history) for history in arguments["rows"]])
    for _ in range(8):
        history = data.draw(likely | st.lists(ids, max_size=5))
        banned = data.draw(st.lists(ids, max_size=2))
        found = table.look_up(history, banned)
        level, expected = plain_answer(history=history, banned=banned, **arguments)
        assert found.level == level
        assert found.clusters == [cluster for cluster, _ in expected]
        np.testing.assert_allclose(found.scores, [score for _, score in expected], atol=1e-5)
        if level != "popular":
            np.testing.assert_allclose(np.array(found.scores) - 4, found.log_probabilities)
        lists = (found.scores, found.log_probabilities, found.propensities)
        assert {len(values) for values in lists} == {len(expected)}
        assert not {*found.clusters} & {*history, *banned}


@settings(**SHARED)
@given(tables(), st.data())
def test_keys_of_several_words_find_the_same(arguments, data):
    shift = 2_000_000_000  # three clusters don't fit in 64 bits

    def shifted(clusters):
        return [cluster + shift for cluster in clusters]

    rows = {
        tuple(shifted(history)): (count, shifted(chosen), scores)
        for history, (count, chosen, scores) in arguments["rows"].items()
    }
    size = arguments["num_clusters"] + shift
    moved = {"rows": rows, "num_clusters": size, "popular": shifted(arguments["popular"])}
    small_ids, large_ids = build(**arguments), build(**{**arguments, **moved})
    ids = st.integers(0, arguments["num_clusters"] - 1)
    likely = st.sampled_from([list(history) for history in arguments["rows"]])
    for _ in range(8):
        history, banned = data.draw(likely | st.lists(ids, max_size=5)), data.draw(st.lists(ids))
        found = large_ids.look_up(shifted(history), shifted(banned))
        expected = small_ids.look_up(history, banned)
        assert (found.level, found.clusters) == (expected.level, shifted(expected.clusters))


@settings(**SHARED)
@given(tables())
def test_every_history_of_a_table_is_found_in_it(arguments):
    table = build(**arguments)
    found = {history: answer.clusters for history, answer in table}
    assert found == {history: list(row[1]) for history, row in arguments["rows"].items()}


@settings(**SHARED)
@given(st.integers(1, 10**9), st.integers(1, 12), st.data())
def test_keys_are_in_the_order_of_histories_read_backwards(num_clusters, longest, data):
    ids = st.integers(max(0, num_clusters - 3), num_clusters - 1)
    lists = st.lists(ids, min_size=1, max_size=longest).map(tuple)
    histories = sorted(data.draw(st.sets(lists, min_size=1)), key=lambda history: history[::-1])
    keys = HistoryKeys(num_clusters, longest)
    packed = [keys.pack(history) for history in histories]
    assert packed == sorted(packed) and len(set(map(tuple, packed))) == len(histories)
    padded = np.array([[-1] * (longest - len(h)) + list(h) for h in histories], np.int32)
    words = keys.pack_all(padded)
    assert [list(key) for key in zip(*map(np.ndarray.tolist, words), strict=True)] == packed
    assert is_ascending(words)
    assert len(histories) == 1 or not is_ascending([word[::-1] for word in words])


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path):
    rows = {
        (a, b): (a + 1, [(b + 1) % 9], [a / 8]) for a in range(9) for b in (a - 1, a - 2) if b > 0
    }
    rows = {h: row for h, row in rows.items() if row[1][0] not in h}
    for name, order in (("a", list(rows)), ("b", list(rows)[::-1])):
        table = build({history: rows[history] for history in order}, num_clusters=9, popular=[1])
        table.write(tmp_path / name)
    ExplorationTable.open(tmp_path / "a", CLUSTERS).write(tmp_path / "c")
    files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert len(files) == 5
    for name in files:
        written = (tmp_path / "a" / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == written
        assert (tmp_path / "c" / name).read_bytes() == written


def test_a_table_without_histories_answers_what_is_popular(tmp_path):
    build({}, num_clusters=3, popular=[2, 0, 1]).write(tmp_path)
    table = ExplorationTable.open(tmp_path, CLUSTERS)
    table.check()
    assert len(table) == 0 and table.look_up([2]).clusters == [0, 1]


def test_its_metrics_count_what_it_shows():
    found = exploration_metrics(small(), 6)
    assert found["explore/valid_fraction"] == found["explore/novel_fraction"] == 1.0
    assert found["explore/histories"] == 4.0
    assert found["explore/distinct_clusters"] == 6.0
    assert found["explore/mean_chosen"] == 7 / 4


@pytest.mark.parametrize("history", [[0, 6], [-1]])
def test_clusters_that_the_table_does_not_know_are_refused(history):
    with pytest.raises(InputError, match=r"knows the whole numbers 0\.\.5"):
        small().look_up(history)


@pytest.mark.parametrize(
    ("history", "clusters", "scores", "message"),
    [
        ([0, 1], [[2, 0]], [[0.5, 0.5]], r"history \[0, 1\].*a cluster of the history is proposed"),
        ([0, 1], [[2, 2]], [[0.5, 0.5]], "a cluster is proposed twice"),
        ([0, 1], [[2, 3]], [[0.5, np.nan]], "must be finite"),
        ([0, 1], [[2, 6]], [[0.5, 0.5]], r"clusters must be in 0\.\.5"),
        ([0, 1], [[-1, 2]], [[0.5, 0.5]], r"clusters must be in 0\.\.5"),
        ([0, 6], [[2, 3]], [[0.5, 0.5]], r"history's clusters must be in 0\.\.5"),
        ([1, 1], [[2, 3]], [[0.5, 0.5]], "names a cluster twice"),
    ],
)
def test_answers_that_cannot_be_served_are_not_built(history, clusters, scores, message):
    nothing = np.zeros(0, np.float32)
    with pytest.raises(InputError, match=message):
        ExplorationTable.build(
            [history],
            np.array(clusters),
            *[np.array(scores)] * 3,
            counts=np.ones(1, int),
            popular=Popular(nothing.astype(int), nothing, nothing),
            num_clusters=6,
            fingerprints=FINGERPRINTS,
        )


def test_a_history_that_stands_there_twice_is_refused():
    nothing = np.zeros(0, np.float32)
    with pytest.raises(InputError, match=r"history \[0, 1\] stands there twice"):
        ExplorationTable.build(
            [[0, 1], [2, 1], [0, 1]],
            np.array([[3]] * 3),
            *[np.ones((3, 1))] * 3,
            counts=np.ones(3, int),
            popular=Popular(nothing.astype(int), nothing, nothing),
            num_clusters=6,
            fingerprints=FINGERPRINTS,
        )


def test_a_table_is_not_served_with_other_clusters(tmp_path):
    small().write(tmp_path)
    with pytest.raises(InputError, match="made with other clusters.*cccccccccccc.*dddddddddddd"):
        ExplorationTable.open(tmp_path, "d" * 64)


def truncated(folder):
    content = (folder / table_files.TABLE).read_bytes()
    (folder / table_files.TABLE).write_bytes(content[: len(content) // 2])


def bad_magic(folder):
    content = (folder / table_files.POPULAR).read_bytes()
    (folder / table_files.POPULAR).write_bytes(b"XXXXXX" + content[6:-6] + b"XXXXXX")


def rewritten(change):
    """Writes the rows again, changed, and the size and digest that they should have."""

    def damage(folder):
        with pa.OSFile(str(folder / table_files.TABLE)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        batch = change(batch)
        with pa.OSFile(str(folder / table_files.TABLE), "wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
        said = json.loads((folder / table_files.ABOUT).read_text())
        said["bytes"][table_files.TABLE] = (folder / table_files.TABLE).stat().st_size
        (folder / table_files.ABOUT).write_text(json.dumps(said))
        with contextlib.suppress(InputError):
            said["sha256"] = table_files.digest(table_files.read(folder, CLUSTERS)[0])
        (folder / table_files.ABOUT).write_text(json.dumps(said))

    return damage


def replaced(name, change):
    """With one column's values changed."""

    def damage(batch):
        column = batch[name]
        flat = column.values if pa.types.is_fixed_size_list(column.type) else column
        changed = pa.array(change(np.array(flat.to_pylist())), flat.type)
        if flat is not column:
            changed = pa.FixedSizeListArray.from_arrays(changed, type=column.type)
        return batch.set_column(batch.schema.names.index(name), batch.schema.field(name), changed)

    return rewritten(damage)


def said(**changes):
    def damage(folder):
        about = json.loads((folder / table_files.ABOUT).read_text())
        (folder / table_files.ABOUT).write_text(json.dumps({**about, **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"table\.arrow has .* bytes; table\.json says"),
        (lambda folder: (folder / table_files.POPULAR).unlink(), r"popular\.arrow is missing"),
        (lambda folder: (folder / table_files.ABOUT).unlink(), r"table\.json is missing"),
        (lambda folder: (folder / table_files.ABOUT).write_text("{"), "not valid JSON"),
        (bad_magic, r"popular\.arrow can't be read as Arrow"),
        (said(format=2), "is of format 2; this version of recexplore reads 1"),
        (said(rows="8"), "is not what recexplore writes"),
        (said(fingerprints={}), "is not what recexplore writes"),
        (said(num_chosen=7), "doesn't have the columns"),
        (rewritten(lambda batch: batch.slice(0, 2)), "has 2 rows, not the 7"),
        (rewritten(lambda batch: batch.drop_columns(["scores"])), "doesn't have the columns"),
        (replaced("key_0", lambda keys: keys[::-1]), "not in ascending order"),
    ],
)
def test_damage_that_shows_is_refused_at_opening(tmp_path, damage, message):
    small().write(tmp_path)
    damage(tmp_path / "000001")
    with pytest.raises(InputError, match=message):
        ExplorationTable.open(tmp_path, CLUSTERS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (said(sha256="0" * 64), "isn't what was written"),
        (replaced("scores", lambda scores: scores * np.nan), "must be finite"),
        (replaced("clusters", lambda clusters: clusters + 5), r"must be in 0\.\.5"),
        (replaced("key_0", lambda keys: keys + 1), "the key isn't the history's"),
        (replaced("history", lambda history: history * 0), "names a cluster twice"),
        (replaced("exact", lambda exact: exact * 0), "of its rows 0 are exact, not 4"),
    ],
)
def test_damage_inside_is_found_by_a_full_check(tmp_path, damage, message):
    small().write(tmp_path)
    damage(tmp_path / "000001")
    table = ExplorationTable.open(tmp_path, CLUSTERS)
    with pytest.raises(InputError, match=message):
        table.check()


def test_a_table_that_is_open_outlives_its_files(tmp_path):
    small().write(tmp_path)
    table = ExplorationTable.open(tmp_path, CLUSTERS)
    shutil.rmtree(tmp_path)
    assert dict(table) == dict(small())
