"""Which of a network's variables are trained, and which stay as they are."""

from typing import Any

from recexplore.models.transformer import TransformerConfig


def split(variables: dict[str, Any], config: TransformerConfig) -> tuple[dict, dict]:
    """Variables → (trained, frozen), two trees that `join` makes one again.

    With LoRA the transformer itself is frozen; its low-rank additions and the reward model's head
    are trained. Without, everything is.

    Args:
      variables: of a Transformer or a RewardModel: arrays, or anything else in their place.
      config: of the network.
    """
    if not config.lora_rank:
        return variables, {}
    params = variables["params"]
    rest = {name: value for name, value in variables.items() if name != "params"}
    if "transformer" not in params:  # the Transformer itself
        return rest, {"params": params}
    heads = {name: value for name, value in params.items() if name != "transformer"}
    return rest | {"params": heads}, {"params": {"transformer": params["transformer"]}}


def join(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The variables that `split` has split; nothing is copied."""
    joined = dict(trained)
    for name, value in frozen.items():
        joined[name] = join(joined[name], value) if name in joined else value
    return joined
