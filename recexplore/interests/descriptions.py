"""A few words for each cluster: what sets its items apart from the others'."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

from recexplore.errors import InputError

_WORD = r"(?u)\b[a-z][a-z0-9]{2,}\b"  # lower-case letters and digits, no number alone
_FEWEST_WORDS, _MOST_WORDS = 2, 6
_SEVERAL = 3  # items that must share a word before it says something about their cluster
_DOUBT = 1.0  # items' worth of belief that a word is no commoner here than elsewhere
_FILLERS = {"didn", "does", "doesn", "don", "got", "isn", "just", "like", "said", "say", "says"}


class _Words(NamedTuple):
    """In how many items of each cluster [M] each word [V] stands."""

    counts: sp.csr_matrix  # [M, V]
    sizes: np.ndarray  # [M], items
    vocabulary: np.ndarray  # [V], in alphabetical order
    shares: np.ndarray  # [V], of all items


def describe_clusters(
    texts: Sequence[str],
    labels: Int[np.ndarray, "I"],
    *,
    words: int = 2,
    extra_stop_words: Sequence[str] = (),
) -> list[str]:
    """Describes each cluster by its words of highest class-based TF-IDF (Grootendorst 2022).

    A word w in n of the N items of cluster c, where e = N · p(w) would be expected if clusters
    didn't matter, has the weight

        n / N · log((n + 1) / (e + 1))

    frequent in the cluster, rare outside. The ones keep names out that a few items happen to share.
    Of 60 items, 50 with a word that half of all items have: 50/60 · log(51/31) = 0.41; 3 with a
    word that nobody else has (e ≈ 0): 3/60 · log(4/1) = 0.07. Words in fewer than three items are
    taken only where there is nothing better.

    Clusters whose first `words` words are the same each get one word more, which must set them
    apart both from one another and from all others: the e of its weight is the larger of the two.
    This is repeated until no two are alike.

    Args:
      texts: title and text of each item.
      labels: its cluster, 0 .. M - 1.
      words: number of words to begin with, 2 to 6.
      extra_stop_words: words never to use, besides English stop words.

    Returns:
      M unique descriptions of 2 to 6 words of lower-case letters and digits.

    Raises:
      InputError: `words` out of range, a cluster without items, or two clusters whose items have
        the very same words.
    """
    if not _FEWEST_WORDS <= words <= _MOST_WORDS:
        raise InputError(
            f"descriptions.describe_clusters.words is {words}; it must lie between "
            f"{_FEWEST_WORDS} and {_MOST_WORDS}."
        )
    found = _count_words(texts, labels, extra_stop_words)
    chosen = [_ranked(found, cluster, found.shares)[:words] for cluster in range(len(found.sizes))]
    for description in chosen:
        description += _commonest(found, description)
    while alike := _alike(chosen):
        grown = [_tell_apart(found, chosen, group) for group in alike]
        if not all(grown):
            first, second = alike[grown.index(False)][:2]
            raise InputError(
                f"Clusters {first} and {second} can't be told apart in words: both would be called "
                f"{' '.join(chosen[first])!r}. Give items more text (titles, genres, tags), or "
                "bind fewer clustering.cluster_items.num_clusters."
            )
    return [" ".join(description) for description in chosen]


def _count_words(texts, labels, extra_stop_words) -> _Words:
    stop_words = sorted(ENGLISH_STOP_WORDS | _FILLERS | set(extra_stop_words))
    vectorizer = CountVectorizer(
        strip_accents="unicode", token_pattern=_WORD, stop_words=stop_words, binary=True
    )
    try:
        occurs = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise InputError(_NO_WORDS.format(0)) from error
    vocabulary = vectorizer.get_feature_names_out()
    if len(vocabulary) < _FEWEST_WORDS:
        raise InputError(_NO_WORDS.format(len(vocabulary)))
    sizes = np.bincount(labels)
    if not sizes.all():
        raise InputError(
            f"Cluster {int(np.argmin(sizes))} has no items, so that there is nothing to describe. "
            "Run `recexplore cluster` again."
        )
    members = sp.csr_matrix((np.ones(len(labels), np.int64), (labels, np.arange(len(labels)))))
    shares = np.asarray(occurs.sum(axis=0)).ravel() / len(labels)
    return _Words((members @ occurs).tocsr(), sizes, vocabulary, shares)


_NO_WORDS = (
    "The items' titles and texts hold {} words that could describe clusters; at least 2 are "
    "needed. Give items.text words such as genres or tags."
)


def _ranked(found: _Words, cluster: int, others: np.ndarray) -> list[str]:
    """The cluster's words, best first, compared with the shares [V] that others have of them.

    Words that several items share come first, then those of fewer items, then words that are no
    commoner here than elsewhere; ties in alphabetical order.
    """
    row, size = found.counts[cluster], found.sizes[cluster]
    here, places = row.data.astype(np.float64), row.indices
    expected = size * np.maximum(others, found.shares)[places]
    weight = here / size * np.log((here + _DOUBT) / (expected + _DOUBT))
    tier = np.where(weight <= 0, 2, here < min(_SEVERAL, size))
    order = np.lexsort((places, -weight.round(12), tier))  # rounded: equal shares are ties
    words, stems = [], set()
    for word in found.vocabulary[places[order]]:
        stem = _stem(word)
        if stem not in stems:
            words.append(str(word))
            stems.add(stem)
    return words


def _tell_apart(found: _Words, chosen: list[list[str]], group: list[int]) -> bool:
    """Gives clusters of the same description one word more each; False if none is left."""
    grew = False
    taken = {_stem(word) for word in chosen[group[0]]}
    shares = np.asarray(found.counts[group].sum(axis=0)).ravel() / found.sizes[group].sum()
    for cluster in group:
        if len(chosen[cluster]) < _MOST_WORDS:
            words = _ranked(found, cluster, shares)
            fresh = [word for word in words if _stem(word) not in taken][:1]
            chosen[cluster] += fresh
            grew = grew or bool(fresh)
    return grew


def _alike(chosen: list[list[str]]) -> list[list[int]]:
    groups = defaultdict(list)
    for cluster, words in enumerate(chosen):
        groups[frozenset(words)].append(cluster)
    return [group for group in groups.values() if len(group) > 1]


def _commonest(found: _Words, description: list[str]) -> list[str]:
    """The commonest words of all, as many as a cluster with too few of its own needs."""
    order = np.lexsort((found.vocabulary, -found.shares))[: 2 * _FEWEST_WORDS]
    others = [str(word) for word in found.vocabulary[order] if word not in description]
    return others[: max(0, _FEWEST_WORDS - len(description))]


def _stem(word: str) -> str:
    """A word without its plural, so that "boy boys" is not a description."""
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
