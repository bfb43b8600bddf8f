"""What a compiled program costs, by the compiler's own account."""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_LIMIT = re.compile(r"= [su]\d+\[\][^=]*constant\((\d+)\)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CYCLES_KEY = "cycles"
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      arguments: what the program is given.
      results: what it gives, without what takes the place of an argument.
      temporaries: what it needs in between.
      code: the program itself.
    """

    arguments: int
    results: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of it together."""
        return sum(self)


class Collective(NamedTuple):
    """One kind of talk between devices: how often in a run, and the bytes a device ends up with."""

    count: int
    bytes: int


def memory_of(compiled: Any) -> Memory:
    """The compiler's memory plan.

    Args:
      compiled: jax.stages.Compiled.
    """
    plan = compiled.memory_analysis()
    return Memory(
        plan.argument_size_in_bytes,
        plan.output_size_in_bytes - plan.alias_size_in_bytes,
        plan.temp_size_in_bytes,
        plan.generated_code_size_in_bytes,
    )


class Talk(NamedTuple):
    """What a program's text says of one run on one device.

    Attributes:
      collectives: by kind, what devices tell each other.
      cycles: the compiler's estimate for the matrix units' and vector units' work; 0 if it gives
        none. Waiting for other devices is not in it.
    """

    collectives: dict[str, Collective]
    cycles: int


def read_text(text: str) -> Talk:
    """Adds up a compiled program.

    What stands in a loop counts as often as the loop runs, where the compiler says so or the loop's
    condition compares with a constant; once where neither is. Of several branches the one that
    moves most counts.

    Args:
      text: the compiled program (HLO), as `jax.stages.Compiled.as_text` gives it.
    """
    entry, computations = _computations(text)

    @functools.cache
    def total(name: str, fused: bool = False) -> collections.Counter:
        found: collections.Counter = collections.Counter()
        for line in computations.get(name, ()):
            if not fused:  # a fusion's own figure has those of its parts in it
                found[_CYCLES_KEY] += sum(map(int, _CYCLES.findall(line)))
            match = _COLLECTIVE.search(line)
            loop = _LOOP.search(line)
            branches = _branches(line)
            if match:
                kind, shape = match[2], match[1]
                found[kind, "count"] += 1
                found[kind, "bytes"] += _bytes(_result(shape, kind) if match[3] else shape)
            elif loop:
                times = _trips(line, computations.get(loop[1], []))
                found.update({key: times * value for key, value in total(loop[2]).items()})
            elif branches:
                found.update(max(map(total, branches), key=_dearness))
            else:
                for called in _CALLED.findall(line):
                    found.update(total(called, fused or " fusion(" in line))
        return found

    whole = total(entry)
    kinds = {
        kind: Collective(whole[kind, "count"], whole[kind, "bytes"])
        for kind in _COLLECTIVES
        if whole[kind, "count"]
    }
    return Talk(kinds, whole[_CYCLES_KEY])


def _dearness(found: collections.Counter) -> tuple[int, int]:
    moved = sum(value for key, value in found.items() if key != _CYCLES_KEY and key[1] == "bytes")
    return moved, found[_CYCLES_KEY]


def _trips(loop: str, condition: list[str]) -> int:
    """How often a loop runs: by the compiler's word, or from 0 up to a constant."""
    known = _KNOWN_TRIPS.search(loop)
    if known:
        return int(known[1])
    limits = [int(limit) for line in condition for limit in _LIMIT.findall(line)]
    return max(limits, default=1)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry, and the lines of every computation."""
    entry, name = "", ""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name = match[1]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            found[name].append(line)
    return entry, found


def _branches(line: str) -> list[str]:
    """The computations of which a conditional runs one."""
    listed = _BRANCHES.search(line)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return _TRUE_FALSE.findall(line)


def _result(shape: str, kind: str) -> str:
    """The part of a started collective's shape that is its result.

    That of an all-reduce is nothing else; the others have (operands, results, contexts …).
    """
    if kind == "all-reduce" or not shape.startswith("("):
        return shape
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[1] if len(parts) > 1 else parts[0]


def _bytes(shape: str) -> int:
    """Bytes of a shape as HLO writes it: an array's, or all of a tuple's together."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total
