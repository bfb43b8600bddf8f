"""A trained model from its folder: which network, of which size, with which parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from recexplore.distributed.checkpoints import load_best
from recexplore.errors import InputError
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig

CHECKPOINTS = "checkpoints"
_NETWORKS = {"Transformer": Transformer, "RewardModel": RewardModel}


def describe(model: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs to know, as JSON values."""
    return {"network": type(model).__name__, "config": dataclasses.asdict(model.config)}


def rebuild(description: dict[str, Any]) -> nn.Module:
    """The network that `describe` described.

    Raises:
      InputError: it was described by another version of recexplore.
    """
    try:
        network = _NETWORKS[description["network"]]
        return network(TransformerConfig(**description["config"]))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"The model's description doesn't fit this version of recexplore ({error}). Train it "
            "again."
        ) from error


def abstract_parameters(model: nn.Module) -> Any:
    """Shapes and dtypes of a network's variables."""

    def initialize():
        # Unboxed inside: outside there is nothing that rules in force could place.
        return nn.unbox(
            model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32), method="prefill")
        )

    return jax.eval_shape(initialize)


def load_parameters(folder: Path, model: nn.Module) -> Any:
    """The best checkpoint's averaged parameters, on the default device.

    Args:
      folder: of the model; has checkpoints/.
      model: the network.

    Raises:
      InputError: there is no checkpoint, or it holds other shapes.
    """

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        abstract_parameters(model),
    )
    return load_best(folder / CHECKPOINTS, "average", placed)
