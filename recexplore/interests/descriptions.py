"""A few words for each cluster: what sets its items apart from the others'."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

from recexplore.errors import InputError

_WORD = r"(?u)\b[a-z][a-z0-9]{2,}\b"
_MOST_WORDS = 6


def describe_clusters(
    texts: Sequence[str],
    labels: Int[np.ndarray, "I"],
    *,
    words: int = 2,
    extra_stop_words: Sequence[str] = (),
) -> list[str]:
    """Describes each cluster by its words of highest class-based TF-IDF (Grootendorst 2022).

    For a word w that occurs in the share p(w, c) of the items of cluster c, and in the share p(w)
    of all items, the weight is p(w, c) · log(1 + p(w, c) / p(w)): frequent in the cluster, rare
    outside. A word of one or two items (a name, say) counts only where
    nothing else is left. Descriptions get
    further words until no two are alike.

    Args:
      texts: title and text of each item.
      labels: its cluster, 0 .. M - 1.
      words: number of words to begin with, 2 to 6.
      extra_stop_words: words never to use, besides English stop words.

    Returns:
      M unique descriptions of 2 to 6 lower-case words.

    Raises:
      InputError: `words` out of range, or two clusters whose items have the very same words.
    """
    if not 2 <= words <= _MOST_WORDS:
        raise InputError(
            f"descriptions.describe_clusters.words is {words}; it must lie between 2 and "
            f"{_MOST_WORDS}."
        )
    ranked = _ranked_words(texts, labels, extra_stop_words)
    taken: dict[frozenset[str], int] = {}
    chosen = []
    for cluster, ranking in enumerate(ranked):
        for candidate in _candidates(ranking, words):
            if frozenset(candidate) not in taken:
                break
        else:
            raise InputError(
                f"Clusters {taken[frozenset(candidate)]} and {cluster} can't be told apart in "
                "words: their items share all of them. Give items more text, or bind fewer "
                "clustering.cluster_items.num_clusters."
            )
        taken[frozenset(candidate)] = cluster
        chosen.append(" ".join(candidate))
    return chosen


def _candidates(ranking: list[str], words: int) -> Iterator[list[str]]:
    """Descriptions from best to worst: the best words; with another last word; with more words."""
    for size in range(words, _MOST_WORDS + 1):
        for last in ranking[size - 1 : size + 2]:
            yield [*ranking[: size - 1], last]
    for last in ranking[_MOST_WORDS:]:
        yield [*ranking[: _MOST_WORDS - 1], last]


def _ranked_words(texts, labels, extra_stop_words) -> list[list[str]]:
    """For each cluster its words, best first; ties in alphabetical order."""
    stop_words = sorted(ENGLISH_STOP_WORDS | set(extra_stop_words))
    vectorizer = CountVectorizer(
        lowercase=True, token_pattern=_WORD, stop_words=stop_words, binary=True
    )
    try:
        counts = vectorizer.fit_transform(texts).tocsr()
    except ValueError as error:
        raise InputError(
            "The items' titles and texts hold no words to describe clusters with. Give items.text "
            "words such as genres or tags."
        ) from error
    vocabulary = vectorizer.get_feature_names_out()
    everywhere = np.asarray(counts.sum(axis=0)).ravel()
    ranked = []
    for cluster in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == cluster)
        here = np.asarray(counts[members].sum(axis=0)).ravel()
        share = here / len(members)
        lift = share * len(texts) / np.maximum(everywhere, 1)
        weight = share * np.log1p(lift)
        weight[here < np.minimum(3, len(members))] *= 1e-3
        order = np.lexsort((vocabulary, -weight))
        ranking = [str(vocabulary[i]) for i in order if here[i] > 0]
        ranked.append(_without_repeats(ranking) + _fill(vocabulary, everywhere, ranking))
    return ranked


def _without_repeats(ranking: list[str]) -> list[str]:
    """Leaves out a word whose singular or plural stands before it."""
    kept, stems = [], set()
    for word in ranking:
        stem = word[:-1] if word.endswith("s") else word
        if stem not in stems:
            kept.append(word)
            stems.add(stem)
    return kept


def _fill(vocabulary, everywhere, ranking: list[str]) -> list[str]:
    """The commonest words of all, for a cluster with fewer than two words of its own."""
    if len(ranking) >= 2:
        return []
    order = np.lexsort((vocabulary, -everywhere))[:_MOST_WORDS]
    return [str(vocabulary[i]) for i in order if str(vocabulary[i]) not in ranking]
