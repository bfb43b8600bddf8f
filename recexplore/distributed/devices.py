"""What the devices can do: published peaks, measured where nothing is published."""

import functools
import time
from typing import NamedTuple

import jax
import numpy as np

_GIB = 1 << 30


class Peak(NamedTuple):
    """What one device can do at best, as its maker has published it.

    Attributes:
      flops: bfloat16 operations a second.
      memory: bytes.
      bandwidth: bytes a second between its memory and its cores.
      interconnect: bytes a second to its neighbours, all links together; 0 where unknown.
      clock: cycles a second; 0 where unknown.
    """

    flops: float
    memory: int
    bandwidth: float
    interconnect: float = 0.0
    clock: float = 0.0


# By JAX's device_kind. TPUs: the system architecture pages of Cloud TPU, clocks from their matrix
# units' sizes; GPUs: dense bfloat16.
PUBLISHED = {
    "TPU v4": Peak(275e12, 32 * _GIB, 1.2e12, 300e9, 1.05e9),
    "TPU v5 lite": Peak(197e12, 16 * _GIB, 819e9, 200e9, 1.5e9),
    "TPU v5": Peak(459e12, 95 * _GIB, 2.765e12, 600e9, 1.75e9),
    "TPU v6 lite": Peak(918e12, 32 * _GIB, 1.64e12, 448e9, 1.75e9),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 40 * _GIB, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 80 * _GIB, 2.039e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 80 * _GIB, 3.35e12),
    "NVIDIA H200": Peak(989e12, 141 * 10**9, 4.8e12),
}


def peak_flops(devices: list[jax.Device]) -> float:
    """Operations a second of all devices together: published, or else measured.

    Devices of the CPU share its cores, so their rate is measured once for all of them, with
    products of float32 matrices.
    """
    kinds = [device.device_kind for device in devices]
    if all(kind in PUBLISHED for kind in kinds):
        return sum(PUBLISHED[kind].flops for kind in kinds)
    measured = _measured_flops()
    return measured if devices[0].platform == "cpu" else measured * len(devices)


@functools.cache
def _measured_flops(size: int = 1536, repeats: int = 4) -> float:
    """Operations a second of square float32 products on the first local device, at best."""
    matrix = jax.device_put(np.ones((size, size), np.float32), jax.local_devices()[0])
    product = jax.jit(lambda a: a @ a).lower(matrix).compile()
    jax.block_until_ready(product(matrix))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
