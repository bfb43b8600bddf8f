"""Transitions and collective feedback → training examples in words."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recexplore.errors import InputError
from recexplore.feedback.transitions import recency_weights
from recexplore.tasks.prompts import alignment_prompt, novelty_prompt
from recexplore.tasks.vocabulary import Vocabulary

_PROMPTS_FOR_VOCABULARY = 20_000


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example in words.

    Attributes:
      inputs: the prompt.
      targets: the description of the cluster in question.
      seen: clusters that are no candidates, because the user knew them.
      label: what the alignment model is to say, 0..1; 0 where there is none.
      weight: how much the example counts.
    """

    inputs: str
    targets: str
    seen: Sequence[int] = ()
    label: float = 0.0
    weight: float = 1.0


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
    """
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
    collective: pa.Table, split: str, descriptions: Sequence[str]
) -> list[Example]:
    """History and cluster → collective feedback, weighted by the number of users behind it.

    Args:
      collective: COLLECTIVE.
      split: train or validation.
      descriptions: of all clusters.
    """
    rows = collective.filter(pc.equal(collective["split"], split))
    columns = (rows[name].to_pylist() for name in ("history", "next_cluster", "label", "count"))
    return [
        Example(
            alignment_prompt([descriptions[c] for c in history]),
            descriptions[target],
            label=label,
            weight=float(count),
        )
        for history, target, label, count in zip(*columns, strict=True)
    ]


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
