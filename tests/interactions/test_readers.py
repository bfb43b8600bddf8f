"""Any log → one schema, and what is wrong with it said in words."""

from pathlib import Path

import ibis
import pytest

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.interactions import movielens, readers, schema

ITEMS = "item_id,title,text\nv1,One,drama\nv2,Two,comedy\n"
HEAD = "user_id,item_id,timestamp,watch_fraction,liked\n"
GOOD = HEAD + "u1,v1,1700000000,0.5,true\nu1,v2,1700000060,1.0,false\n"
MOVIELENS = Path(__file__).parents[3] / "shared" / "data" / "ml-latest-small"


def write(folder, interactions=GOOD, items=ITEMS):
    (folder / "log.csv").write_bytes(
        interactions if isinstance(interactions, bytes) else interactions.encode()
    )
    (folder / "items.csv").write_text(items)
    return str(folder / "log.csv"), str(folder / "items.csv")


def checked(folder, *texts, **options):
    return schema.check_log(readers.read_csv(*write(folder, *texts)), **options)


def test_a_log_comes_out_in_exactly_the_schema(tmp_path):
    log = checked(tmp_path)
    interactions = log.interactions.order_by("timestamp").to_pyarrow()
    artifacts.write_table(tmp_path / "i.parquet", interactions, artifacts.INTERACTIONS)
    artifacts.write_table(tmp_path / "t.parquet", log.items.to_pyarrow(), artifacts.ITEMS)
    row = artifacts.read_table(tmp_path / "i.parquet", artifacts.INTERACTIONS).to_pylist()[0]
    assert row == {
        "user_id": "u1",
        "item_id": "v1",
        "timestamp": 1700000000,
        "watch_fraction": 0.5,
        "liked": True,
        "shared": False,
        "skipped": False,
        "propensity": None,
        "policy": None,
    }
    assert log.dropped == {}


def test_columns_are_mapped_and_parquet_reads_like_csv(tmp_path):
    text = GOOD.replace("user_id", "viewer").replace("watch_fraction", "share")
    paths = write(tmp_path, text)
    mapping = {"user_id": "viewer", "watch_fraction": "share"}
    from_csv = schema.check_log(readers.read_csv(*paths, interaction_columns=mapping))
    for path in paths:
        ibis.duckdb.connect().read_csv(path).to_parquet(path.replace(".csv", ".parquet"))
    parquet = (path.replace(".csv", ".parquet") for path in paths)
    from_parquet = schema.check_log(readers.read_parquet(*parquet, interaction_columns=mapping))
    rows = [log.interactions.order_by("timestamp").to_pyarrow() for log in (from_csv, from_parquet)]
    assert rows[0].equals(rows[1])


def test_few_bad_rows_are_dropped_and_counted_by_reason(tmp_path):
    rows = "".join(f"u{i},v1,{1700000000 + i},0.5,true\n" for i in range(400))
    bad = "u1,v1,1,nan,true\nu2,v1,2,1.5,true\nu3,v9,3,0.5,true\nu4,v1,,0.5,true\nu4,v1,4,0.5,\n"
    bad += "u5,v1,0,0.5,true\n"
    again = "u0,v1,1700000000,0.5,true\n"
    log = checked(tmp_path, HEAD + rows + bad + again, max_dropped_share=0.05)
    assert log.dropped == {
        "watch_fraction missing or outside 0..1": 2,
        "item not among the items": 1,
        "no user_id, item_id or timestamp": 1,
        "liked, shared or skipped missing or not 0 or 1": 1,
        "timestamp not in seconds since 1970 (milliseconds?)": 1,
        "row repeated": 1,
    }
    assert log.interactions.count().to_pyarrow().as_py() == 400


BAD_LOGS = {
    "missing column": (GOOD.replace("liked", "loved"), ITEMS, "have no column liked. There is:"),
    "mistyped column": (GOOD.replace("0.5", "half"), ITEMS, "watch_fraction is of type string"),
    "empty file": ("", ITEMS, "log.csv is empty"),
    "header only": (HEAD, ITEMS, "there are no interactions"),
    "ragged row": (
        GOOD + "u1,v1,1,0.5,true,7,8\n",
        ITEMS,
        "line 4: 7 fields, but the header has 5",
    ),
    "column twice": (GOOD.replace("liked", "user_id"), ITEMS, "no column liked"),
    "open quote": (GOOD + 'u1,"v1,1,0.5,true\n', ITEMS, "line 4: .*quote not closed"),
    "stars for liked": (GOOD.replace("true", "5").replace("false", "3"), ITEMS, "not 0 or 1"),
    "milliseconds": (GOOD.replace("1700000", "1700000000"), ITEMS, "not in seconds since 1970"),
    "item twice": (GOOD, ITEMS + "v1,Again,drama\n", "'v1' stands in 2 rows"),
    "not UTF-8": (GOOD.encode() + b"u\xff,v1,1,0.5,true\n", ITEMS, "log.csv line 4.*not UTF-8"),
    "all bad": (HEAD + "u1,v1,1,2.5,true\n", ITEMS, "1 of 1 interactions are bad.*user_id=u1"),
}


@pytest.mark.parametrize("name", BAD_LOGS)
def test_a_bad_log_is_refused_in_words(tmp_path, name):
    interactions, items, message = BAD_LOGS[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        checked(tmp_path, interactions, items)


def test_columns_may_be_swapped(tmp_path):
    head, *rows = GOOD.splitlines()
    swapped = "\n".join([head.replace("user_id,item_id", "item_id,user_id"), *rows, ""])
    paths = write(tmp_path, swapped)
    mapping = {"user_id": "item_id", "item_id": "user_id"}
    log = schema.check_log(readers.read_csv(*paths, interaction_columns=mapping))
    (tmp_path / "plain").mkdir()
    plain = schema.check_log(readers.read_csv(*write(tmp_path / "plain", GOOD)))
    rows = [part.interactions.order_by("timestamp").to_pyarrow() for part in (log, plain)]
    assert rows[0].equals(rows[1])


def test_parts_of_a_log_may_order_their_columns_differently(tmp_path):
    paths = write(tmp_path)
    (tmp_path / "part-1.csv").write_text(HEAD + "u7,v1,1700000007,0.5,true\n")
    (tmp_path / "part-2.csv").write_text(
        "liked,watch_fraction,timestamp,item_id,user_id\nfalse,0.25,1700000008,v1,u8\n"
    )
    log = schema.check_log(readers.read_csv(str(tmp_path / "part-*.csv"), paths[1]))
    found = log.interactions.order_by("timestamp").to_pyarrow().to_pydict()
    assert found["user_id"] == ["u7", "u8"] and found["watch_fraction"] == [0.5, 0.25]


def test_the_wrong_kind_of_file_or_setting_is_named(tmp_path):
    paths = write(tmp_path)
    ibis.duckdb.connect().read_csv(paths[0]).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(InputError, match="is Parquet. Use data/parquet.gin"):
        readers.read_csv(str(tmp_path / "log.parquet"), paths[1])
    with pytest.raises(InputError, match="is not Parquet. Use data/csv.gin"):
        readers.read_parquet(*paths)


def test_missing_files_columns_and_databases_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.csv: there is no such file"):
        readers.read_csv(str(tmp_path / "nowhere.csv"), "x")
    with pytest.raises(InputError, match="is a folder"):
        readers.read_csv(str(tmp_path), "x")
    with pytest.raises(InputError, match="no column 'who' to use as user_id"):
        readers.read_csv(*write(tmp_path), interaction_columns={"user_id": "who"})
    with pytest.raises(InputError, match="can't be read"):
        readers.read_tables("duckdb://", "no_such_table", "items")


def test_tables_of_a_database_are_a_log(tmp_path):
    paths = write(tmp_path)
    url = f"duckdb://{tmp_path}/log.db"
    connection = ibis.connect(url)
    for path, name in zip(paths, ("views", "videos"), strict=True):
        connection.create_table(name, connection.read_csv(path).to_pyarrow())
    connection.disconnect()
    log = schema.check_log(readers.read_tables(url, "views", "videos"))
    assert log.interactions.count().to_pyarrow().as_py() == 2


def test_ratings_become_feedback():
    ratings = ibis.memtable({"rating": [5.0, 4.0, 3.0, 2.0, 0.5]})
    feedback = movielens.rating_to_feedback(ratings).to_pyarrow().to_pydict()
    assert feedback["watch_fraction"] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.1])
    assert feedback["liked"] == [True, True, False, False, False]
    assert feedback["skipped"] == [False, False, False, True, True]


def test_a_movielens_folder_is_a_log(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n7,1,4.0,10\n7,2,4.0,20\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n1,"Alien, The (1979)",Horror|Sci-Fi\n2,Other,(no genres listed)\n'
    )
    (tmp_path / "tags.csv").write_text(
        "userId,movieId,tag,timestamp\n7,1,space,2\n8,1,monster ship,1\n9,2,late,18\n"
    )
    log = schema.check_log(movielens.read_movielens(str(tmp_path)))
    items = log.items.order_by("item_id").to_pyarrow().to_pylist()
    assert [item["title"] for item in items] == ["Alien, The", "Other"]
    assert [item["text"] for item in items] == ["Horror scifi space monster ship", ""]
    assert log.interactions.to_pyarrow()["user_id"].to_pylist() == ["7", "7"]
    assert log.dropped == {"tags of the held-out period": 1}  # 70 % of the ratings end at 17


def test_a_folder_that_is_not_movielens_is_refused(tmp_path):
    with pytest.raises(InputError, match="Set MOVIELENS_DIR"):
        movielens.read_movielens(str(tmp_path / "nowhere"))
    (tmp_path / "ratings.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column userId, movieId, rating, timestamp"):
        movielens.read_movielens(str(tmp_path))


@pytest.mark.skipif(not MOVIELENS.is_dir(), reason=f"no MovieLens at {MOVIELENS}")
def test_the_real_movielens_passes_the_checks_whole():
    log = schema.check_log(movielens.read_movielens(str(MOVIELENS)))
    assert log.interactions.count().to_pyarrow().as_py() == 100_836
    assert log.items.count().to_pyarrow().as_py() == 9_742
    assert log.dropped == {"tags of the held-out period": 1_727}
