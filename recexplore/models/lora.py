"""Low-rank adapters (LoRA, Hu et al. 2022): what is trained, and how to be rid of them.

A network whose configuration has lora_rank keeps them in a collection of their own, under the paths
of the kernels they belong to:

    params  layers/self_attention/query    [L, D, H, head_dim]   frozen
    lora    layers/self_attention/query_a  [L, D, r]             trained
            layers/self_attention/query_b  [L, r, H, head_dim]   trained, zero at the start

so that one frozen "params" serves several models, each with a "lora" of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from recexplore.errors import InputError
from recexplore.models.networks import Config
from recexplore.models.transformer import TransformerConfig

_FROZEN = {"token_embedder", "logits_dense", "decoder_norm", "layers"}


def is_trained(path: tuple[str, ...], config: Config) -> bool:
    """Whether the variable at `path` is trained.

    With LoRA: the adapters, and what a network has beside its transformer, as a reward model's
    head; without: everything.

    >>> is_trained(("params", "layers", "mlp", "wo"), config_with_lora)
    False
    """
    return not config.lora_rank or path[0] == "lora" or not _FROZEN & set(path)


def split(variables: dict[str, Any], config: Config) -> tuple[dict, dict]:
    """Variables → those that are trained, and the frozen rest; each keeps its path.

    Args:
      variables: of a network, boxed or not.
      config: its configuration.
    """

    def part(tree: Any, trained: bool, path: tuple[str, ...] = ()) -> Any:
        kept = {}
        for name, branch in tree.items():
            here = (*path, name)
            if isinstance(branch, dict):
                if inside := part(branch, trained, here):
                    kept[name] = inside
            elif is_trained(here, config) == trained:
                kept[name] = branch
        return kept

    return part(variables, True), part(variables, False)


def join(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """What `split` took apart; it may be called on what gradients are taken of."""
    both = {name: join(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return trained | frozen | both


def merge(
    variables: dict[str, Any], config: TransformerConfig
) -> tuple[dict[str, Any], TransformerConfig]:
    """Adds the adapters to their kernels, for networks that are done with training.

    Args:
      variables: "params" and "lora" of a Transformer or RewardModel, unboxed.
      config: of its transformer.

    Returns:
      The variables without "lora", and the configuration without LoRA. The sums W + scale · A B are
      computed in float32 and kept in W's dtype; if that is bfloat16, small adapters are rounded.

    Raises:
      InputError: there are no adapters.
    """
    if not config.lora_rank or "lora" not in variables:
        raise InputError(
            f"There are no adapters to merge: lora_rank is {config.lora_rank} and the variables "
            f"are {', '.join(variables)}. Only a model that was trained with transformer."
            "TransformerConfig.lora_rank above 0 has some."
        )
    rest = {name: tree for name, tree in variables.items() if name != "lora"}
    merged = _merged(rest["params"], variables["lora"], config.lora_scale)
    return rest | {"params": merged}, dataclasses.replace(config, lora_rank=0)


def _merged(params: dict[str, Any], adapters: dict[str, Any], scale: float) -> dict[str, Any]:
    found = dict(params)
    for name, adapter in adapters.items():
        if isinstance(adapter, dict):
            found[name] = _merged(params[name], adapter, scale)
        elif name.endswith("_a"):
            target = name.removesuffix("_a")
            kernel = params[target]
            added = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(adapter, adapters[f"{target}_b"])
            found[target] = (kernel.astype(jnp.float32) + scale * added).astype(kernel.dtype)
    return found
