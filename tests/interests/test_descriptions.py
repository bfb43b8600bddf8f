"""Clusters in words."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recexplore.errors import InputError
from recexplore.interests.descriptions import describe_clusters

TOPICS = ("space rocket star", "cook oven bread", "sport goal ball")
LETTERS = [f"word{letter}" for letter in "abcdefghij"]


def test_descriptions_name_what_sets_a_cluster_apart():
    labels = np.repeat(np.arange(3), 20)
    texts = [f"common {TOPICS[label]}" for label in labels]
    for description, words in zip(describe_clusters(texts, labels), TOPICS, strict=True):
        assert set(description.split()) <= set(words.split())


def test_the_weight_of_the_docstring_decides():
    """A word of 50 of 60 items that half of all have, 0.41, against one of three items, 0.07."""
    texts = ["wide"] * 50 + ["rare"] * 3 + [""] * 7 + ["wide plain"] * 70 + ["plain"] * 110
    labels = np.repeat([0, 1], [60, 180])
    assert 50 / 60 * np.log(51 / 31) == pytest.approx(0.41, abs=0.005)
    assert describe_clusters(texts, labels)[0] == "wide rare"


def test_a_name_in_few_items_yields_to_a_word_of_many():
    """Though the name weighs more: 2/32 · log(3/1.7) against 3/32 · log(4/3.1)."""
    texts = ["comedy school"] * 3 + ["comedy beverly"] * 2 + ["comedy"] * 27
    texts += ["drama school"] * 3 + ["drama night"] * 57
    assert describe_clusters(texts, np.repeat([0, 1], [32, 60]))[0] == "comedy school"


def test_a_word_commoner_elsewhere_says_nothing():
    texts = ["comedy"] * 15 + ["comedy drama"] * 3 + ["comedy ninja"] * 2 + ["drama crime"] * 40
    assert describe_clusters(texts, np.repeat([0, 1], [20, 40]))[0] == "comedy ninja"


def test_clusters_of_the_same_words_get_what_tells_them_apart():
    texts = ["comedy drama wedding"] * 9 + ["comedy drama"] * 11
    texts += ["comedy drama football"] * 9 + ["comedy drama"] * 11 + ["horror blood"] * 40
    found = describe_clusters(texts, np.repeat([0, 1, 2], [20, 20, 40]))
    assert found == ["comedy drama wedding", "comedy drama football", "blood horror"]


def test_a_word_that_clusters_share_does_not_tell_them_apart():
    """Weddings set both apart from the rest, but not from one another; horror only the reverse."""
    both = ["comedy drama wedding"] * 13
    texts = [*both, *["comedy drama football"] * 3, *["comedy drama horror"] * 4]
    texts += [*both, *["comedy drama sailing"] * 3, *["comedy drama"] * 4] + ["horror blood"] * 40
    found = describe_clusters(texts, np.repeat([0, 1, 2], [20, 20, 40]))
    assert found == ["comedy drama football", "comedy drama sailing", "blood horror"]


def test_names_do_not_depend_on_the_numbers_of_clusters():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(LETTERS, 4, replace=False)) for _ in range(300)]
    labels = np.arange(300) % 20
    shuffled = random.permutation(20)
    found = describe_clusters(texts, labels)
    again = describe_clusters(texts, shuffled[labels])
    assert [set(found[c].split()) for c in range(20)] == [
        set(again[shuffled[c]].split()) for c in range(20)
    ]


def test_only_readable_words_are_used():
    texts = ["Café 1984 the of just said Straße boys boy x2 wok-wok", "Opera 007 and über arias"]
    found = describe_clusters(texts * 5, np.arange(10) % 2, words=6, extra_stop_words=["uber"])
    assert found == ["boy cafe wok", "arias opera"]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.sets(st.sampled_from(LETTERS), max_size=5), min_size=6, max_size=40),
    clusters=st.integers(2, 6),
)
def test_descriptions_are_unique_or_refused(words, clusters):
    texts = [" ".join(sorted(some)) for some in words]
    labels = np.arange(len(texts)) % clusters
    try:
        found = describe_clusters(texts, labels)
    except InputError as error:
        assert re.search("can't be told apart in words|could describe clusters", str(error))
        return
    assert len({frozenset(text.split()) for text in found}) == clusters
    for text in found:
        assert 2 <= len(text.split()) <= 6 and len(set(text.split())) == len(text.split())
        assert re.fullmatch(r"[a-z][a-z0-9]*( [a-z][a-z0-9]*)*", text)


@pytest.mark.parametrize(
    ("texts", "labels", "arguments", "message"),
    [
        (["apple pear"] * 6, [0, 0, 0, 1, 1, 1], {}, "Clusters 0 and 1 can't be told apart"),
        (["apple pear"] * 2, [0, 0], {"words": 7}, "describe_clusters.words is 7"),
        (["apple pear"] * 2, [0, 2], {}, "Cluster 1 has no items"),
        (["", "12"], [0, 1], {}, "hold 0 words"),
        (["apple", "apple"], [0, 1], {}, "hold 1 words"),
    ],
)
def test_what_cannot_be_described_is_refused(texts, labels, arguments, message):
    with pytest.raises(InputError, match=message):
        describe_clusters(texts, np.array(labels), **arguments)
