"""Transitions and collective feedback → training examples in words."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recexplore.errors import InputError
from recexplore.feedback.transitions import recency_weights
from recexplore.tasks.prompts import alignment_prompt, novelty_prompt
from recexplore.tasks.vocabulary import Vocabulary

_PROMPTS_FOR_VOCABULARY = 20_000
_SAME_LABEL = 1e-6  # labels are float32
COUNT_WEIGHTINGS: Mapping[str, Callable[[float], float]] = {
    "count": float,
    "sqrt": math.sqrt,
    "none": lambda count: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example in words.

    Attributes:
      inputs: the prompt.
      targets: the description of the cluster in question.
      seen: clusters that are no candidates, because the user knew them.
      label: what the alignment model is to say, 0..1; 0 where there is none.
      weight: how much the example counts.
      rejected: of a pair, the description of the worse cluster for the same prompt; `targets` and
        `label` are the better one's. Otherwise empty.
    """

    inputs: str
    targets: str
    seen: Sequence[int] = ()
    label: float = 0.0
    weight: float = 1.0
    rejected: str = ""


def engaged(transitions: pa.Table, split: str) -> pa.Table:
    """The transitions of a split whose next cluster the user didn't skip."""
    wanted = pc.and_(pc.equal(transitions["split"], split), pc.invert(transitions["skipped"]))
    return transitions.filter(wanted)


def diversify(
    transitions: pa.Table, *, max_share_per_cluster: float = 0.05, seed: int = 0
) -> pa.Table:
    """Caps how many transitions lead to any one cluster, so that popular ones don't swamp the rest.

    Args:
      transitions: TRANSITIONS.
      max_share_per_cluster: no next cluster keeps more than this share of the rows given; which
        ones it keeps is drawn at random.
      seed: of the draw.

    Returns:
      The rows kept, in their order.

    Raises:
      InputError: a share out of range.
    """
    if not 0 < max_share_per_cluster <= 1:
        raise InputError(
            f"examples.diversify.max_share_per_cluster is {max_share_per_cluster}; it must lie "
            "between 0 and 1."
        )
    targets = transitions["next_cluster"].to_numpy()
    most = max(1, int(max_share_per_cluster * len(targets)))
    order = np.random.default_rng(seed).permutation(len(targets))
    by_target = order[np.argsort(targets[order], kind="stable")]
    grouped = targets[by_target]
    first = np.searchsorted(grouped, grouped)
    kept = by_target[np.arange(len(grouped)) - first < most]
    return transitions.take(np.sort(kept))


def novelty_examples(
    transitions: pa.Table,
    descriptions: Sequence[str],
    history_length: int,
    *,
    exclude_seen: bool,
    half_life: float | None = None,
    longer: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """History → description of the next cluster.

    Args:
      transitions: TRANSITIONS, oldest first.
      descriptions: of all clusters.
      history_length: the prompt names the last so many clusters.
      exclude_seen: when the model is asked, all clusters that the user has seen will be excluded;
        otherwise only those that the prompt names.
      half_life: older examples weigh less, see `transitions.recency_weights`.
      longer: every transition gives a second example, whose prompt names more clusters, up to this
        many, drawn at random. What follows from a long history tells something about each cluster
        in it, also to a model that will be asked about short ones.
      seed: of the draw.

    Raises:
      InputError: `longer` names no more clusters than the first example.
    """
    if longer is not None and longer <= history_length:
        raise InputError(
            f"examples.novelty_examples.longer is {longer}, but histories have {history_length} "
            "clusters already: pipeline.tokenize.longer_histories must name more than "
            "pipeline.tokenize.novelty_histories does."
        )
    count = transitions.num_rows
    lengths = [np.full(count, history_length)]
    if longer is not None:
        random = np.random.default_rng(seed)
        lengths.append(random.integers(history_length + 1, longer + 1, count))
    weights = recency_weights(count, half_life).tolist()
    columns = [transitions[name].to_pylist() for name in ("history", "next_cluster", "seen")]
    made = []
    for kept in lengths:
        for length, history, target, seen, weight in zip(kept, *columns, weights, strict=True):
            named = history[-length:]
            made.append(
                Example(
                    novelty_prompt([descriptions[cluster] for cluster in named]),
                    descriptions[target],
                    seen if exclude_seen else named,
                    weight=weight,
                )
            )
    return made


def alignment_examples(
    collective: pa.Table,
    split: str,
    descriptions: Sequence[str],
    *,
    count_weighting: str = "count",
) -> list[Example]:
    """History and cluster → collective feedback, weighted by the number of users behind it.

    Args:
      collective: COLLECTIVE.
      split: train or validation.
      descriptions: of all clusters.
      count_weighting: an example weighs as much as the number of users (COLLECTIVE's weight), as
        its square root, or 1: 'count', 'sqrt' or 'none'.

    Raises:
      InputError: another weighting.
    """
    weigh = _weighting("alignment_examples", count_weighting)
    rows = collective.filter(pc.equal(collective["split"], split))
    columns = (rows[name].to_pylist() for name in ("history", "next_cluster", "label", "weight"))
    return [
        Example(
            alignment_prompt([descriptions[c] for c in history]),
            descriptions[target],
            label=label,
            weight=weigh(weight),
        )
        for history, target, label, weight in zip(*columns, strict=True)
    ]


def pairwise_examples(
    collective: pa.Table,
    split: str,
    descriptions: Sequence[str],
    *,
    min_gap: float = 0.05,
    max_pairs_per_history: int = 64,
    count_weighting: str = "count",
    seed: int = 0,
) -> list[Example]:
    """Pairs of next clusters after one history, of which one was liked better (Bradley–Terry).

    For moves into clusters a and b of weight n_a and n_b, numbers of users where all count alike, a
    pair weighs as the harmonic mean 2 n_a n_b / (n_a + n_b): the variance of the difference of two
    means is in proportion to 1 / n_a + 1 / n_b. With 1 and 99 users that is 1.98, not 50.

    Args:
      collective: COLLECTIVE.
      split: train or validation.
      descriptions: of all clusters.
      min_gap: labels that differ by less than this make no pair; those that are equal never do.
      max_pairs_per_history: m clusters make up to m (m − 1) / 2 pairs, so that a busy history would
        swamp the rest; of more than this, so many are drawn.
      count_weighting: a pair weighs as much as the harmonic mean, as its square root, or 1:
        'count', 'sqrt' or 'none'.
      seed: of the draw; a history's pairs don't depend on which other histories there are.

    Returns:
      Pairs, those of a history together, in the order of histories.

    Raises:
      InputError: an argument out of range, or there are no pairs.
    """
    weigh = _weighting("pairwise_examples", count_weighting)
    _check_pairs(min_gap, max_pairs_per_history)
    rows = collective.filter(pc.equal(collective["split"], split))
    labels, weights = rows["label"].to_numpy(), rows["weight"].to_numpy()
    targets = rows["next_cluster"].to_pylist()
    by_history = collections.defaultdict(list)
    for row, history in enumerate(rows["history"].to_pylist()):
        by_history[tuple(history)].append(row)
    made = []
    for history, members in sorted(by_history.items()):
        best_first = np.array(sorted(members, key=lambda row: (-labels[row], targets[row])))
        better, worse = (best_first[side] for side in np.triu_indices(len(members), 1))
        gaps = labels[better] - labels[worse]
        kept = np.flatnonzero(gaps >= max(min_gap - _SAME_LABEL, _SAME_LABEL))
        if len(kept) > max_pairs_per_history:
            random = np.random.default_rng([seed, *history])
            kept = np.sort(random.choice(kept, max_pairs_per_history, replace=False))
        prompt = alignment_prompt([descriptions[cluster] for cluster in history])
        for a, b in zip(better[kept], worse[kept], strict=True):
            made.append(
                Example(
                    prompt,
                    descriptions[targets[a]],
                    label=float(labels[a]),
                    weight=weigh(2 / (1 / weights[a] + 1 / weights[b])),
                    rejected=descriptions[targets[b]],
                )
            )
    if not made:
        raise InputError(
            f"No history of the {split} split has two next clusters whose labels differ by "
            f"examples.pairwise_examples.min_gap = {min_gap}, so there are no pairs to learn from. "
            "Lower it, or bind pipeline.tokenize.make_alignment_examples = "
            "@examples.alignment_examples."
        )
    return made


def _weighting(function: str, count_weighting: str) -> Callable[[float], float]:
    if count_weighting not in COUNT_WEIGHTINGS:
        raise InputError(
            f"examples.{function}.count_weighting is {count_weighting!r}; there is: "
            f"{', '.join(map(repr, COUNT_WEIGHTINGS))}."
        )
    return COUNT_WEIGHTINGS[count_weighting]


def _check_pairs(min_gap: float, max_pairs_per_history: int) -> None:
    rules = {
        "min_gap": (min_gap, 0 <= min_gap <= 1, "between 0 and 1"),
        "max_pairs_per_history": (
            max_pairs_per_history,
            isinstance(max_pairs_per_history, int) and max_pairs_per_history >= 1,
            "a whole number from 1 on",
        ),
    }
    for name, (value, ok, rule) in rules.items():
        if not ok:
            raise InputError(f"examples.pairwise_examples.{name} is {value!r}; it must be {rule}.")


def longest_example(
    vocabulary: Vocabulary,
    prompt: Callable[[Sequence[str]], str],
    descriptions: Sequence[str],
    history_length: int,
) -> int:
    """Tokens of the longest prompt and description that there can be, EOS included.

    Args:
      vocabulary: tokenizes them.
      prompt: `novelty_prompt` or `alignment_prompt`.
      descriptions: of all clusters.
      history_length: clusters a prompt names.
    """
    # A description may have more tokens as an answer than as an entry of a history.
    entry = max(descriptions, key=lambda text: len(vocabulary.encode_prompt(prompt([text]))))
    answer = max(len(vocabulary.encode_description(text)) for text in descriptions)
    return len(vocabulary.encode_prompt(prompt([entry] * history_length))) + answer


def some_prompts(
    transitions: pa.Table, descriptions: Sequence[str], history_length: int
) -> list[str]:
    """Prompts of both models over training transitions, to train the vocabulary on."""
    rows = engaged(transitions, "train")
    every = max(1, rows.num_rows // _PROMPTS_FOR_VOCABULARY)
    histories = [
        [descriptions[c] for c in history[-history_length:]]
        for history in rows["history"].to_pylist()[::every]
    ]
    return [make(history) for history in histories for make in (novelty_prompt, alignment_prompt)]
