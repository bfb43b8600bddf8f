"""How fast parameters move: schedule, clipping, optimizer."""

import dataclasses
import math
from typing import Any

import jax
import optax

from recexplore.errors import InputError

_OPTIMIZERS = ("adamw", "adafactor")
_OFFSETS = {"scale", "thresholds"}  # beside biases: parameters that have no matrix to keep small


@dataclasses.dataclass(frozen=True)
class Optimization:
    """AdamW or Adafactor with linear warm-up and cosine decay.

    Attributes:
      steps: of training.
      learning_rate: at its peak.
      optimizer: "adamw"; or "adafactor" (Shazeer & Stern 2018), which keeps sums over rows and
        columns instead of two numbers for every parameter.
      warmup_share: part of the steps in which the learning rate rises from 0.
      weight_decay: on matrices; norms, biases and an ordinal head's thresholds have none.
      clip_norm: gradients are scaled down to this global norm.
      average_decay: of the moving average of the parameters, which is evaluated and used, and kept
        in float32, whatever they are; with 0 it is the parameters themselves.
      microbatches: a step's batch is read in so many parts, one after the other, and their
        gradients are added up; for batches that don't fit into memory.
    """

    steps: int
    learning_rate: float
    optimizer: str = "adamw"
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    average_decay: float = 0.995
    microbatches: int = 1

    def __post_init__(self):
        counts = ("steps", "microbatches")
        rules = {
            **{name: _is_count(getattr(self, name)) for name in counts},
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup_share": 0 <= self.warmup_share < 1,
            "weight_decay": self.weight_decay >= 0,
            "clip_norm": self.clip_norm > 0,
            "average_decay": 0 <= self.average_decay < 1,
        }
        for name, ok in rules.items():
            if not ok:
                raise InputError(
                    f"optimization.Optimization.{name} is {getattr(self, name)!r}, which is out of "
                    f"range{' (a whole number from 1 on)' if name in counts else ''}."
                )
        if self.optimizer not in _OPTIMIZERS:
            raise InputError(
                f"optimization.Optimization.optimizer is {self.optimizer!r}; it must be one of "
                f"{', '.join(_OPTIMIZERS)}."
            )

    def schedule(self) -> optax.Schedule:
        """Learning rate by step."""
        warmup = int(self.steps * self.warmup_share)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, max(self.steps, warmup + 1)
        )

    def transformation(self) -> optax.GradientTransformation:
        """The optax chain."""
        schedule = self.schedule()
        if self.optimizer == "adamw":
            rule = optax.adamw(schedule, weight_decay=self.weight_decay, mask=_decays)
        else:
            # An array's update has a root mean square of 1 at most, as in the paper. It is not
            # scaled by the parameters' size: the learning rate means what it means for AdamW.
            rule = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(self.weight_decay, mask=_decays),
                optax.scale_by_learning_rate(schedule),
            )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _decays(params: Any) -> Any:
    """Which parameters weight decay acts on: all but norms' scales, biases and thresholds."""

    def decays(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        return not any(name in _OFFSETS or name.endswith("bias") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)
