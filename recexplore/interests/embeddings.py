"""Item embeddings from what items say and from who consumes them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from jaxtyping import Float, Int
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from recexplore.errors import InputError


def embed_items(
    items: pa.Table,
    interactions: pa.Table,
    *,
    text_dimensions: int = 64,
    consumption_dimensions: int = 64,
    consumption_weight: float = 1.0,
    seed: int = 0,
) -> Float[np.ndarray, "I E"]:
    """One unit vector for each item.

    The item's title and text as TF-IDF reduced by SVD, beside the co-consumption factors of the
    item × user matrix, scaled by `consumption_weight`. An item without interactions has zeros
    there. Where the items bring an `embedding` of their own, that is used instead of the text.

    Args:
      items: ITEMS, I rows.
      interactions: INTERACTIONS of the training period only.
      text_dimensions: of the text part.
      consumption_dimensions: of the co-consumption part; 0 leaves it out.
      consumption_weight: how much co-consumption counts beside text.
      seed: of the randomised SVD.

    Raises:
      InputError: an argument out of range; an embedding missing, not finite or of another length;
        no word that three items share; no interactions, or some with unknown items.
    """
    _check_arguments(text_dimensions, consumption_dimensions, consumption_weight)
    given = items["embedding"]
    if given.null_count < len(given):
        content = _given_embeddings(items)
    else:
        content = _text_factors(items, text_dimensions, seed)
    if consumption_dimensions == 0:
        return content
    factors = _consumption_factors(items, interactions, consumption_dimensions, seed)
    return normalize(np.hstack([content, consumption_weight * factors])).astype(np.float32)


def places_of_items(items: pa.Table, interactions: pa.Table) -> Int[np.ndarray, "N"]:
    """For each of N interactions the row of its item.

    Args:
      items: ITEMS.
      interactions: INTERACTIONS.

    Raises:
      InputError: an item that isn't among the items.
    """
    places = pc.index_in(interactions["item_id"], items["item_id"].combine_chunks())
    if places.null_count:
        unknown = interactions["item_id"].filter(pc.is_null(places))[0].as_py()
        raise InputError(
            f"{places.null_count} interactions are with items that aren't in items.parquet, for "
            f"instance {unknown!r}. The two files don't belong together; run `recexplore ingest`."
        )
    return places.to_numpy().astype(np.int64)


def _check_arguments(text_dimensions, consumption_dimensions, consumption_weight) -> None:
    rules = {
        "text_dimensions": (text_dimensions, text_dimensions >= 1, "at least 1"),
        "consumption_dimensions": (
            consumption_dimensions,
            consumption_dimensions >= 0,
            "at least 1, or 0 to leave co-consumption out",
        ),
        "consumption_weight": (
            consumption_weight,
            0 < consumption_weight < float("inf"),
            "positive; co-consumption is left out by consumption_dimensions = 0",
        ),
    }
    for name, (value, ok, rule) in rules.items():
        if not ok:
            raise InputError(f"embeddings.embed_items.{name} is {value}; it must be {rule}.")


def _given_embeddings(items: pa.Table) -> np.ndarray:
    given = items["embedding"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(given), 0).to_numpy()
    longest = int(lengths.max())
    wrong = lengths != longest
    if wrong.any() or longest == 0:
        place = int(np.argmax(wrong))
        raise InputError(
            f"items.embedding: the vector of item {items['item_id'][place].as_py()!r} has "
            f"{lengths[place]} numbers, the longest has {longest}. All items need one of the same "
            "length, or none at all."
        )
    flat = pc.list_flatten(given).cast(pa.float32()).to_numpy(zero_copy_only=False)
    vectors = flat.reshape(len(given), -1)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        place = int(np.argmin(finite))
        raise InputError(
            f"items.embedding: the vector of item {items['item_id'][place].as_py()!r} holds a "
            "missing or infinite number. Mend it, or leave the column out."
        )
    return normalize(vectors).astype(np.float32)


def _text_factors(items: pa.Table, dimensions: int, seed: int) -> np.ndarray:
    texts = [f"{item['title']} {item['text']}" for item in items.to_pylist()]
    vectorizer = TfidfVectorizer(stop_words="english", min_df=3, sublinear_tf=True)
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise InputError(
            "The items' titles and texts share no words, so that nothing can be said of their "
            "topics. Give items.text words (genres, tags, a summary), or items.embedding vectors."
        ) from error
    return _factors(counts, dimensions, seed)


def _consumption_factors(
    items: pa.Table, interactions: pa.Table, dimensions: int, seed: int
) -> np.ndarray:
    if interactions.num_rows == 0:
        raise InputError(
            "There are no interactions in the training period, so that nothing is known of who "
            "consumes what. Check transitions.split_times, or bind "
            "embeddings.embed_items.consumption_dimensions = 0."
        )
    rows = places_of_items(items, interactions)
    users = pc.dictionary_encode(interactions["user_id"].combine_chunks()).indices.to_numpy()
    shape = (items.num_rows, int(users.max()) + 1)
    counts = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, users)), shape=shape)
    counts.data[:] = 1.0
    return _factors(normalize(counts, axis=1), dimensions, seed)


def _factors(matrix: sp.spmatrix, dimensions: int, seed: int) -> np.ndarray:
    """Unit rows of the leading factors, padded with zeros where there are fewer."""
    rank = min(dimensions, min(matrix.shape) - 1)
    if rank < 1:
        return np.zeros((matrix.shape[0], dimensions), np.float32)
    factors = normalize(TruncatedSVD(rank, random_state=seed).fit_transform(matrix))
    return np.pad(factors, ((0, 0), (0, dimensions - rank))).astype(np.float32)
