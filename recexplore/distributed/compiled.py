"""What a compiled program costs, by the compiler's own account."""

import collections
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
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_LIMIT = re.compile(r"= [su]\d+\[\][^=]*constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
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

    What stands in a loop counts as often as the loop runs: up to the limit that its condition
    compares with.

    Args:
      text: the compiled program (HLO), as `jax.stages.Compiled.as_text` gives it.
    """
    entry, computations = _computations(text)
    counts: dict[str, int] = collections.Counter()
    sizes: dict[str, int] = collections.Counter()
    cycles = 0

    def visit(name: str, times: int, fused: bool = False) -> None:
        nonlocal cycles
        for line in computations.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                counts[match[2]] += times
                sizes[match[2]] += times * _bytes(match[1], started=bool(match[3]))
            if not fused:  # a fusion's own figure has those of its parts in it
                cycles += times * sum(map(int, _CYCLES.findall(line)))
            loop = _LOOP.search(line)
            if loop:
                visit(loop[2], times * _trips(computations.get(loop[1], [])))
            else:
                for called in _called(line):
                    visit(called, times, fused or " fusion(" in line)

    visit(entry, 1)
    found = {kind: Collective(counts[kind], sizes[kind]) for kind in _COLLECTIVES if counts[kind]}
    return Talk(found, cycles)


def _trips(condition: list[str]) -> int:
    """How often a loop runs that counts from 0 up to a constant."""
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


def _called(line: str) -> list[str]:
    names = _CALLED.findall(line)
    for group in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def _bytes(shape: str, started: bool) -> int:
    """Bytes of a shape as HLO writes it; of one that is only started, the result's alone."""
    arrays = []
    for kind, sizes in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        arrays.append(count * bits // 8)
    if started and len(arrays) > 1:  # (operands, results, contexts)
        return max(arrays)
    return sum(arrays)
