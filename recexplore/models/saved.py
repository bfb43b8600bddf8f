"""A trained model from its folder: which network, of which size, with which parameters."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from recexplore.distributed.checkpoints import load_best
from recexplore.distributed.partitioning import placed
from recexplore.errors import InputError
from recexplore.models.lora import join, split
from recexplore.models.networks import CONFIGS, LANGUAGE_MODELS
from recexplore.models.pretrained import load as load_transformer
from recexplore.models.reward_model import RewardModel
from recexplore.models.sequential_recommender import SequentialRecommender

CHECKPOINTS = "checkpoints"
NETWORK = "network.json"  # what `describe` says, beside the checkpoints
_NETWORKS = {
    network.__name__: network for network in (*LANGUAGE_MODELS, RewardModel, SequentialRecommender)
}
_CONFIGS = {config.__name__: config for config in CONFIGS}


def describe(
    model: nn.Module, pretrained: Path | str | None = None, history_length: int | None = None
) -> dict[str, Any]:
    """What `rebuild` and `load_parameters` need to know, as JSON values.

    Args:
      model: the network.
      pretrained: folder of the transformer that it started from; None: from nothing.
      history_length: how much its longest prompts name; None where that is not known.
    """
    settings = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("config", "parent", "name")  # the last two are flax's
    }
    return {
        "network": type(model).__name__,
        "config": dataclasses.asdict(model.config),
        "sizes": type(model.config).__name__,
        "settings": settings,
        "pretrained": None if pretrained is None else str(Path(pretrained).resolve()),
        "history_length": history_length,
    }


def rebuild(description: dict[str, Any]) -> nn.Module:
    """The network that `describe` described.

    Raises:
      InputError: it was described by another version of recexplore.
    """
    try:
        network = _NETWORKS[description["network"]]
        settings = description.get("settings", {})  # older descriptions have none: all defaults
        sizes = _CONFIGS[description.get("sizes", "TransformerConfig")]  # likewise
        return network(sizes(**description["config"]), **settings)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"The model's description doesn't fit this version of recexplore ({error}). Train it "
            "again."
        ) from error


def fingerprint(model: nn.Module, params: Any) -> str:
    """SHA-256 of a network and its parameters, adapters and what they add to alike.

    Args:
      model: the network.
      params: its variables, all of them on devices of this process.
    """
    described = describe(model)
    kept = {name: described[name] for name in ("network", "config", "settings")}
    found = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        values = np.ascontiguousarray(jax.device_get(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        found.update(values.view(np.uint8))
    return found.hexdigest()


def fresh_variables(model: nn.Module, key: Key[Array, ""]) -> Any:
    """A network's variables as they are drawn, boxed with their logical axes."""
    return model.init(key, jnp.ones((1, 2), jnp.int32), method="prefill")


def abstract_parameters(model: nn.Module) -> Any:
    """Shapes and dtypes of a network's variables."""
    # Unboxed inside: outside there is nothing that rules in force could place.
    return jax.eval_shape(lambda: nn.unbox(fresh_variables(model, jax.random.key(0))))


def load_parameters(
    folder: Path,
    model: nn.Module,
    pretrained: str | None = None,
    shared: dict[Any, Any] | None = None,
) -> Any:
    """The best checkpoint's averaged parameters, on the default device.

    Where only adapters were trained, the transformer they add to is read from its own folder.

    Args:
      folder: of the model; has checkpoints/.
      model: the network.
      pretrained: of its description.
      shared: transformers that were read before; models loaded with the same dictionary have the
        same one in memory.

    Raises:
      InputError: there is no checkpoint, or it holds other shapes; the pretrained transformer isn't
        where it was.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    trained, frozen = split(placed(abstract_parameters(model), device), model.config)
    found = load_best(folder / CHECKPOINTS, trained)
    if not frozen:
        return found
    shared, key = {} if shared is None else shared, (pretrained, model.config.param_dtype)
    if key not in shared:
        if pretrained is None:
            raise InputError(
                f"{folder} holds adapters, but not what transformer they add to. Train it again."
            )
        if not Path(pretrained).is_dir():
            raise InputError(
                f"{folder} holds adapters for the pretrained transformer in {pretrained}, which "
                "isn't there any more. Put that folder back, or leave a link to it in its place."
            )
        shared[key] = load_transformer(pretrained, model.config)["params"]
    nested = "transformer" in frozen["params"]
    return join(found, {"params": {"transformer": shared[key]} if nested else shared[key]})
