"""The compiled programs, by name, without data: functions with the shapes and shardings of all they
take, so that they can be lowered and compiled for devices that aren't there.

    training_step    of one model, as the trainer runs it
    explore_pair     best of n with both models, on a mesh; `recexplore explore` has one device
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from recexplore.distributed import partitioning
from recexplore.errors import InputError
from recexplore.inference.best_of_n import Batch, BestOfN, Prefixes, explore_step
from recexplore.inference.context import Prompts, prefix_cache
from recexplore.models.lora import join, split
from recexplore.models.networks import Config, language_model
from recexplore.models.reward_model import RewardModel
from recexplore.models.saved import fresh_variables
from recexplore.models.trie import Trie, build_trie
from recexplore.training.flops import count_flops
from recexplore.training.optimization import Optimization
from recexplore.training.program import Program


class Ahead(NamedTuple):
    """A program that can be compiled.

    Attributes:
      name: what it is.
      sizes: what it was lowered for, to be printed.
      lowered: by JAX.
      flops: operations that its matrix products need, on all devices together.
      mesh: the devices.
    """

    name: str
    sizes: dict[str, Any]
    lowered: Any
    flops: int
    mesh: jax.sharding.Mesh


def training_step(
    devices: Sequence[Any],
    found: Callable[[Ahead], None],
    *,
    make_network: Callable[[Any], Any],
    make_config: Callable[..., Config],
    objective: Callable[..., Any],
    optimization: Optimization,
    make_mesh: Callable[..., jax.sharding.Mesh],
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    batch_size: int = 64,
    max_length: int = 256,
    num_clusters: int = 1000,
    description_length: int = 8,
) -> None:
    """One step of training.

    Args:
      devices: to compile for.
      found: called with the program.
      make_network: Transformer, EncoderDecoder or RewardModel.
      make_config: TransformerConfig or EncoderDecoderConfig, with everything but max_length bound.
      objective: of recexplore.training.objectives.
      optimization: as in training.
      make_mesh: of the devices given.
      rules: logical axis → mesh axis.
      batch_size: B, on all devices together.
      max_length: T, tokens of a row.
      num_clusters: M.
      description_length: tokens of a description, EOS included.
    """
    config = make_config(max_length=max_length)
    mesh = make_mesh(devices=devices)
    partitioning.check_batch_size(
        batch_size, mesh, optimization.microbatches, "aot.training_step.batch_size"
    )
    program = Program(make_network(config), objective, optimization, mesh, rules)
    trie = some_trie(num_clusters, description_length, config.vocab_size)
    sizes, rows = (batch_size,), np.int32
    batch = {
        "tokens": jax.ShapeDtypeStruct((batch_size, max_length), rows),
        "prompt_lengths": jax.ShapeDtypeStruct(sizes, rows),
        "lengths": jax.ShapeDtypeStruct(sizes, rows),
        "seen": jax.ShapeDtypeStruct((batch_size, num_clusters), bool),
        "label": jax.ShapeDtypeStruct(sizes, np.float32),
        "weight": jax.ShapeDtypeStruct(sizes, np.float32),
    }
    placed = partitioning.placed(batch, program.on_batch)
    on_devices = partitioning.placed(trie, program.everywhere)
    lowered = program.step.lower(program.state, program.frozen, placed, on_devices)
    told = {
        "parameters": _count(program.state.params) + _count(program.frozen),
        "trained": _count(program.state.params),
        "B": batch_size,
        "T": max_length,
        "M": num_clusters,
    }
    found(Ahead("training step", told, lowered, program.flops(batch, trie), mesh))


def explore_pair(
    devices: Sequence[Any],
    found: Callable[[Ahead], None],
    *,
    make_config: Callable[..., Config],
    settings: BestOfN,
    make_mesh: Callable[..., jax.sharding.Mesh],
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    batch_size: int = 64,
    prefix_length: int = 4,
    prompt_length: int = 64,
    num_clusters: int = 1000,
    description_length: int = 8,
) -> None:
    """Best of n with a pair of models of one size; with LoRA they share the frozen transformer.

    Args:
      devices: to compile for.
      found: called with the program.
      make_config: TransformerConfig or EncoderDecoderConfig, with everything but max_length bound.
      settings: n, k and how to draw and choose.
      make_mesh: of the devices given.
      rules: logical axis → mesh axis.
      batch_size: B, on all devices together.
      prefix_length: tokens that all prompts begin with.
      prompt_length: S, tokens of a prompt besides.
      num_clusters: M.
      description_length: tokens of a description, EOS included.
    """
    config = make_config(max_length=prefix_length + prompt_length + description_length)
    mesh = make_mesh(devices=devices)
    partitioning.check_batch_size(batch_size, mesh, name="aot.explore_pair.batch_size")
    everywhere, on_batch = jax.NamedSharding(mesh, jax.P()), partitioning.batch_sharding(mesh)
    networks = (language_model(config), RewardModel(config))
    (novelty, base), (alignment, _) = (
        split(_abstract(network, mesh, rules), config) for network in networks
    )
    shared = base.get("params", {})
    whole = _whole(novelty, alignment, shared)
    prefix = jax.ShapeDtypeStruct((prefix_length,), np.int32)
    prefixes = Prefixes(
        *(
            jax.eval_shape(functools.partial(prefix_cache, network), variables, prefix)
            for network, variables in zip(networks, whole, strict=True)
        )
    )
    trie = some_trie(num_clusters, description_length, config.vocab_size)
    prompts = Prompts(
        jax.ShapeDtypeStruct((batch_size, prompt_length), np.int32),
        jax.ShapeDtypeStruct((batch_size,), np.int32),
    )
    clusters = jax.ShapeDtypeStruct((batch_size, 2), np.int32)
    batch = Batch(prompts, prompts, clusters, clusters)

    def explore(novelty, alignment, shared, prefixes, trie, batch, key):
        novelty_params, alignment_params = _whole(novelty, alignment, shared)
        return explore_step(
            novelty_params,
            alignment_params,
            prefixes,
            trie,
            batch,
            jax.random.wrap_key_data(key),
            settings=settings,
            novelty_model=networks[0],
            alignment_model=networks[1],
        )

    key = jax.ShapeDtypeStruct((2,), np.uint32)
    arguments = (
        novelty,
        alignment,
        shared,
        *partitioning.placed((prefixes, trie), everywhere),
        partitioning.placed(batch, on_batch),
        partitioning.placed(key, everywhere),
    )
    told = {
        "parameters": sum(map(_count, (novelty, alignment, shared))),
        "shared": _count(shared),
        "B": batch_size,
        "n": settings.num_samples,
        "S": prefix_length + prompt_length,
        "M": num_clusters,
    }
    lowered, flops = jax.jit(explore).lower(*arguments), count_flops(explore, *arguments)
    found(Ahead("best-of-n step", told, lowered, flops, mesh))


def some_trie(num_clusters: int, length: int, vocab_size: int) -> Trie:
    """Descriptions of so many tokens, told apart by their first three, as an area, a topic and a
    subtopic would."""
    width = max(2, int(np.ceil(num_clusters ** (1 / 3))))
    if width**3 < num_clusters or length < 4 or vocab_size < width + 3:
        raise InputError(
            f"{num_clusters} clusters can't be told apart in {length} tokens of {vocab_size}: "
            "description_length must be at least 4 (EOS is one of them)."
        )
    numbers = np.arange(num_clusters)
    words = np.stack([numbers // width**2, numbers // width % width, numbers % width], axis=1) + 2
    rest = np.repeat(words[:, -1:], length - 4, axis=1)
    end = np.ones((num_clusters, 1), int)
    return build_trie(np.concatenate([words, rest, end], axis=1).tolist(), 1, vocab_size)


def _whole(novelty: Any, alignment: Any, shared: Any) -> tuple[Any, Any]:
    """The variables of both models, around the transformer they share."""
    if not shared:
        return novelty, alignment
    return (
        join(novelty, {"params": shared}),
        join(alignment, {"params": {"transformer": shared}}),
    )


def _abstract(network: Any, mesh: jax.sharding.Mesh, rules: partitioning.Rules) -> Any:
    boxed = jax.eval_shape(lambda: fresh_variables(network, jax.random.key(0)))
    shardings = partitioning.shardings_of(boxed, mesh, rules)
    partitioning.check_shapes(nn.unbox(boxed), shardings)
    return partitioning.placed(nn.unbox(boxed), shardings)


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
