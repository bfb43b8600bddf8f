"""MovieLens (Harper & Konstan 2015) as a log: ratings stand for watching."""

from pathlib import Path

import ibis
import ibis.expr.types as ir

from recexplore.errors import InputError
from recexplore.interactions.readers import read_table_file
from recexplore.interactions.schema import InteractionLog

_GENRES_IN_WORDS = {"(no genres listed)": "", "Sci-Fi": "scifi", "Film-Noir": "noir", "|": " "}


def rating_to_feedback(ratings: ir.Table) -> ir.Table:
    """Stars → feedback.

    A rating of r stars (0.5 to 5) becomes watch_fraction = r / 5, liked if r ≥ 4, skipped if r ≤ 2,
    never shared. So 4.5 stars are a film watched to 90 % and liked; 2 stars one skipped after 40 %.

    Args:
      ratings: has a column `rating`.

    Returns:
      The table with the feedback columns in its place.
    """
    stars = ratings.rating.cast("float64")
    return ratings.mutate(
        watch_fraction=stars / 5, liked=stars >= 4, skipped=stars <= 2, shared=ibis.literal(False)
    ).drop("rating")


def read_movielens(folder: str, *, tags_share: float = 0.7) -> InteractionLog:
    """A MovieLens folder with ratings.csv and movies.csv, and tags.csv if it is there.

    An item's title is the film's without the year; its text are its genres and users' tags.

    Args:
      folder: such as ml-latest-small or ml-25m.
      tags_share: tags are taken only from the time in which the first so many of the ratings were
        made. It should be the share of the log that is trained on: what clusters are made of must
        not know of the held-out period.

    Raises:
      InputError: the folder or a file is missing, a column isn't there, or `tags_share` is not
        within 0 to 1.
    """
    if not 0 <= tags_share <= 1:
        raise InputError(
            f"movielens.read_movielens.tags_share is {tags_share}; it must lie between 0 and 1."
        )
    path = Path(folder)
    if not path.is_dir():
        raise InputError(
            f"{folder} is not a folder. Set MOVIELENS_DIR to an unpacked MovieLens data set."
        )
    read = ibis.duckdb.connect().read_csv
    ratings = _with_columns(
        read,
        path / "ratings.csv",
        {"userId": "int64", "movieId": "int64", "rating": "float64", "timestamp": "int64"},
    )
    movies = _with_columns(
        read, path / "movies.csv", {"movieId": "int64", "title": "string", "genres": "string"}
    )
    genres = movies.genres
    for written, word in _GENRES_IN_WORDS.items():
        genres = genres.replace(written, word)
    items = movies.select(
        item_id=movies.movieId,
        title=movies.title.re_replace(r"\s*\(\d{4}\)\s*$", ""),
        text=genres,
    )
    dropped = {}
    if (path / "tags.csv").exists():
        tags = _with_columns(
            read,
            path / "tags.csv",
            {"userId": "int64", "movieId": "int64", "tag": "string", "timestamp": "int64"},
        )
        last = ratings.timestamp.quantile(tags_share).to_pyarrow().as_py()
        late = tags.timestamp >= (last or 0)
        items = _with_tags(items, tags.filter(~late))
        dropped["tags of the held-out period"] = late.sum().fill_null(0).to_pyarrow().as_py()
    renamed = ratings.rename(user_id="userId", item_id="movieId")
    return InteractionLog(rating_to_feedback(renamed), items, str(path), dropped)


def read_movielens_tfds(name: str = "movielens/latest-small") -> InteractionLog:
    """MovieLens from TensorFlow Datasets, which downloads it on first use.

    Args:
      name: the data set without "-ratings" and "-movies".

    Raises:
      InputError: it can be neither found nor downloaded.
    """
    import tensorflow_datasets as tfds

    try:
        ratings = tfds.as_dataframe(tfds.load(f"{name}-ratings", split="train"))
        movies = tfds.as_dataframe(tfds.load(f"{name}-movies", split="train"))
        labels = tfds.builder(f"{name}-movies").info.features["movie_genres"].feature
    except Exception as error:  # a download fails in many ways, none of them declared
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"TFDS can't load {name} ({type(error).__name__}: {reason}). Where it can't download, "
            "unpack MovieLens by hand and use data/movielens.gin with MOVIELENS_DIR."
        ) from error
    interactions = ibis.memtable(
        {
            "user_id": ratings["user_id"].str.decode("utf-8"),
            "item_id": ratings["movie_id"].str.decode("utf-8"),
            "timestamp": ratings["timestamp"].astype("int64"),
            "rating": ratings["user_rating"].astype("float64"),
        }
    )
    items = ibis.memtable(
        {
            "item_id": movies["movie_id"].str.decode("utf-8"),
            "title": movies["movie_title"]
            .str.decode("utf-8")
            .str.replace(r" \(\d{4}\)$", "", regex=True),
            "text": [" ".join(map(labels.int2str, row)) for row in movies["movie_genres"]],
        }
    )
    return InteractionLog(rating_to_feedback(interactions), items, source=f"TFDS {name}")


def _with_tags(items: ir.Table, tags: ir.Table) -> ir.Table:
    words = tags.tag.collect(order_by=[tags.userId, tags.timestamp, tags.tag]).join(" ")
    joined = tags.group_by("movieId").aggregate(tags=words)
    both = items.left_join(joined, items.item_id == joined.movieId)
    return both.select("item_id", "title", text=(both.text + " " + both.tags.fill_null("")).strip())


def _with_columns(read, path: Path, columns: dict[str, str]) -> ir.Table:
    table = read_table_file(read, str(path))
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{path}: there is no column {', '.join(missing)}. There is: "
            f"{', '.join(table.columns)}. Is it MovieLens?"
        )
    for name, kind in columns.items():
        found = table[name].type()
        fits = found.is_string() if kind == "string" else found.is_numeric()
        if not fits:
            raise InputError(f"{path}: column {name} is of type {found}, expected {kind}.")
    return table
