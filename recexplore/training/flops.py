"""How many operations a function needs, read off its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiplications and additions of the matrix products in a function.

    Other operations are few in a transformer. A loop counts as often as it runs where that is
    known (scan), once where it isn't (while); of several branches the dearest counts.

    >>> a = jax.ShapeDtypeStruct((2, 3), "float32")
    >>> b = jax.ShapeDtypeStruct((3, 5), "float32")
    >>> count_flops(lambda a, b: a @ b, a, b)
    60

    Args:
      function: of arrays.
      *arguments: arrays or their shapes, wherever they lie.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return _count(jax.make_jaxpr(function)(*shapes).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            total += 2 * summed * equation.outvars[0].aval.size
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in parameters["branches"])
        else:
            times = parameters["length"] if name == "scan" else 1
            total += times * sum(_count(inner) for inner in _inner(parameters.values()))
    return total


def _inner(values: Any) -> Any:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inner(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
