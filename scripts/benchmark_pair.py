"""What the benchmark runs: a pair of models with random weights, clusters, prompts, the step.

All that touches recexplore's step is in `explorer`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np

from recexplore.inference.best_of_n import (
    Batch,
    BestOfN,
    Exploration,
    Prefixes,
    explore_step,
)
from recexplore.inference.context import Prompts, prefix_cache
from recexplore.inference.exhaustive import build_tree
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import fresh_variables
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.models.trie import Trie, build_trie

EOS_ID = 1
HISTORY_CLUSTERS = 2
_GIN_FOLDER = Path(__file__).parent.parent / "gin_configs" / "models"
_OWN_VOCABULARY = ("small",)  # presets that say nothing of it


class Pair(NamedTuple):
    """Both models and their weights."""

    config: TransformerConfig
    novelty_model: Transformer
    novelty_params: dict
    alignment_model: RewardModel
    alignment_params: dict


class Inputs(NamedTuple):
    """What a batch of decisions starts from, in numpy.

    Attributes:
      prefix: [P] tokens that all prompts begin with.
      histories: [B, S] tokens of the histories, all of one length.
      clusters: [B, K] the histories' clusters.
    """

    prefix: np.ndarray
    histories: np.ndarray
    clusters: np.ndarray


def preset(name: str, vocab_size: int, max_length: int, dtype: str) -> TransformerConfig:
    """The sizes of a preset; the gin file is the one that training reads."""
    gin.clear_config()
    gin.parse_config_file(str(_GIN_FOLDER / f"{name}.gin"))
    configured = gin.get_configurable(TransformerConfig)
    own = {"vocab_size": vocab_size} if name in _OWN_VOCABULARY else {}
    return configured(max_length=max_length, dtype=dtype, **own)


def smallest(config: TransformerConfig) -> TransformerConfig:
    """A network that costs next to nothing: what is left of a step is masking and selection."""
    return dataclasses.replace(
        config, num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
    )


def random_pair(config: TransformerConfig, seed: int) -> Pair:
    """Random weights, made on the device, in the dtype of the computation."""
    novelty_key, alignment_key, head_key = jax.random.split(jax.random.key(seed), 3)
    novelty, alignment = Transformer(config), RewardModel(config)
    alignment_params = _random_params(alignment, alignment_key)
    head = jax.random.normal(head_key, (config.model_dim,), config.dtype)
    alignment_params["params"]["head"] = head * config.model_dim**-0.5  # it starts at zero
    return Pair(config, novelty, _random_params(novelty, novelty_key), alignment, alignment_params)


def _random_params(model: nn.Module, key: jax.Array) -> dict:
    def make(key):
        params = nn.unbox(fresh_variables(model, key))
        return jax.tree.map(lambda x: x.astype(model.config.dtype), params)

    return jax.jit(make)(key)


def random_inputs(
    batch: int, prefix_length: int, history_length: int, num_clusters: int, vocab_size: int
) -> Inputs:
    """Random prompts; the same for everyone."""
    random = np.random.default_rng(batch)
    words = [(prefix_length,), (batch, history_length)]
    prefix, histories = (random.integers(EOS_ID + 1, vocab_size, s, np.int32) for s in words)
    clusters = random.integers(0, num_clusters, (batch, HISTORY_CLUSTERS), np.int32)
    return Inputs(prefix, histories, clusters)


def cluster_descriptions(
    shape: str, num_clusters: int, length: int, vocab_size: int
) -> list[list[int]]:
    """M different descriptions of T tokens, EOS included.

    Args:
      shape: "hierarchy": an area, a topic in it and a subtopic of that, as many of each as are
        needed (ten for 1,000 clusters), then random words: after three words a cluster is known.
        "deep": few choices at every word, the last included, so that some part only there.
      num_clusters: M.
      length: T, at least 4.
      vocab_size: V.
    """
    random = np.random.default_rng(num_clusters)
    words = length - 1
    depth = {"hierarchy": 3, "deep": words}[shape]
    spare = {"hierarchy": 1.0, "deep": 1.5}[shape]
    branches = _smallest_root(spare * num_clusters, depth)
    choices: dict[tuple[int, ...], np.ndarray] = {}
    picked = random.choice(branches**depth, num_clusters, replace=False)
    descriptions = []
    for number in picked.tolist():
        description = random.integers(EOS_ID + 1, vocab_size, words).tolist()
        for level in range(depth):
            above = tuple(description[:level])
            if above not in choices:
                choices[above] = random.choice(vocab_size - 2, branches, replace=False) + 2
            number, branch = divmod(number, branches)
            description[level] = int(choices[above][branch])
        descriptions.append([*description, EOS_ID])
    return descriptions


def _smallest_root(count: float, depth: int) -> int:
    """The smallest number of branches that gives `count` leaves after `depth` levels."""
    branches = 1
    while branches**depth < count:
        branches += 1
    return branches


def device_trie(descriptions: Sequence[Sequence[int]], vocab_size: int) -> Trie:
    """The trie, on the device."""
    return jax.device_put(build_trie(descriptions, EOS_ID, vocab_size))


def branching_nodes(descriptions: Sequence[Sequence[int]]) -> list[int]:
    """How many beginnings of each length 1, 2, … still leave a choice of the next token.

    [a b EOS], [a c EOS] and [d e EOS] give [1]: only after a single token, a, is there a choice.
    """
    counts = []
    for length in range(1, max(map(len, descriptions))):
        following: dict[tuple[int, ...], set[int]] = {}
        for description in descriptions:
            if len(description) > length:
                begun = following.setdefault(tuple(description[:length]), set())
                begun.add(description[length])
        counts.append(sum(len(tokens) > 1 for tokens in following.values()))
    return counts[: max((i + 1 for i, count in enumerate(counts) if count), default=0)]


def explorer(
    pair: Pair,
    trie: Trie,
    inputs: Inputs,
    sampler: str,
    num_samples: int,
    num_chosen: int,
) -> Callable[[int], Exploration]:
    """recexplore's step as a function of a round's number, which it finishes before it returns."""
    prefix = jnp.asarray(inputs.prefix)
    prefixes = Prefixes(
        prefix_cache(pair.novelty_model, pair.novelty_params, prefix),
        prefix_cache(pair.alignment_model, pair.alignment_params, prefix),
    )
    size, length = inputs.histories.shape
    prompts = Prompts(inputs.histories, np.full(size, length, np.int32))
    batch = Batch(
        novelty=prompts,
        alignment=prompts,
        history=inputs.clusters,
        banned=np.full((size, 1), -1, np.int32),
    )
    settings = BestOfN(
        num_samples=num_samples, num_chosen=num_chosen, sampler=sampler, temperature=1.0
    )
    tree = jax.device_put(build_tree(trie)) if sampler == "exhaustive" else None
    key = jax.random.key(0)

    def explore(round_number: int) -> Exploration:
        exploration = explore_step(
            pair.novelty_params,
            pair.alignment_params,
            prefixes,
            trie,
            jax.device_put(batch),
            jax.random.fold_in(key, round_number),
            settings=settings,
            novelty_model=pair.novelty_model,
            alignment_model=pair.alignment_model,
            tree=tree,
        )
        return jax.block_until_ready(exploration)

    return explore
