"""Item embeddings from what items say and from who consumes them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from jaxtyping import Float
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
    there. Where every item brings an `embedding` of its own, that is used instead of the text.

    Args:
      items: ITEMS, I rows.
      interactions: INTERACTIONS of the training period only.
      text_dimensions: of the text part.
      consumption_dimensions: of the co-consumption part; 0 leaves it out.
      consumption_weight: how much co-consumption counts beside text.
      seed: of the randomised SVD.

    Raises:
      InputError: embeddings of different lengths, or no word is left of all texts.
    """
    given = items["embedding"]
    if given.null_count == 0 and len(given):
        content = _given_embeddings(given)
    else:
        content = _text_factors(items, text_dimensions, seed)
    if consumption_dimensions == 0:
        return content
    factors = _consumption_factors(items, interactions, consumption_dimensions, seed)
    return normalize(np.hstack([content, consumption_weight * factors])).astype(np.float32)


def _given_embeddings(given: pa.ChunkedArray) -> np.ndarray:
    lengths = set(pc.list_value_length(given).to_pylist())
    if len(lengths) != 1:
        raise InputError(
            f"items.embedding has vectors of different lengths ({sorted(lengths)[:4]}). All items "
            "need one of the same length, or none at all."
        )
    flat = pc.list_flatten(given).to_numpy()
    return normalize(flat.reshape(len(given), -1)).astype(np.float32)


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
    rows = pc.index_in(interactions["item_id"], items["item_id"].combine_chunks()).to_numpy()
    users = pc.dictionary_encode(interactions["user_id"].combine_chunks()).indices.to_numpy()
    shape = (items.num_rows, int(users.max(initial=-1)) + 1)
    if shape[1] == 0:
        return np.zeros((items.num_rows, dimensions), np.float32)
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
