"""Compiles the training and the best-of-n step for TPUs that aren't there, and says what they cost.

    pip install -e '.[tpu]'
    python scripts/compile_for_tpu.py --gin_file models/gemma2_2b.gin --gin_file models/lora.gin \
        --topology v5e:2x4

Nothing is run, so it works on any computer: the compiler is the real one, of the `libtpu` wheel.
What it says of memory is a plan that the chips keep to; what it says of time is an estimate.
"""

import argparse
import math
import os
import re
import sys
import time

_NEEDED = {  # for libtpu to come up without chips, and beside other programs
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}
_ACCELERATORS = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_CORES = {"v4": 2, "v5p": 2}  # that an accelerator's name counts, for each chip
_PROGRAMS = {"train": "training_step", "explore": "explore_pair"}
_GIB, _MB = 2**30, 1e6


def main() -> int:
    """Runs the command line; returns the exit status."""
    flags = _parse()
    kind, shape = flags.topology.split(":")
    chips = math.prod(map(int, shape.split("x")))
    name = f"{_ACCELERATORS[kind]}-{chips * _CORES.get(kind, 1)}"
    os.environ.update(_NEEDED | {"TPU_ACCELERATOR_TYPE": name})

    from recexplore import aot
    from recexplore.configuration import Configuration, call_configured
    from recexplore.errors import InputError

    try:
        devices = _devices(flags.topology)
        configuration = Configuration(["ahead.gin", *flags.gin_file], flags.overrides)
        for program in flags.program:
            function = getattr(aot, _PROGRAMS[program])
            selector = f"{aot.__name__}.{function.__name__}"
            bindings = configuration.reachable_from(selector, program)
            call_configured(function, program, bindings, devices, _report)
    except InputError as error:
        print(f"compile_for_tpu: {error}", file=sys.stderr)
        return 2
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gin_file", action="append", required=True, help="of gin_configs/models")
    parser.add_argument("--topology", required=True, help="such as v5e:2x4 or v5p:2x2x2")
    parser.add_argument(
        "--program", action="append", choices=_PROGRAMS, help="one of them only; default: both"
    )
    parser.add_argument_group("gin").add_argument("--gin.NAME=VALUE", help="bind NAME")
    found = [re.fullmatch(r"--gin\.([^=\s]+)=(.*)", a, re.DOTALL) for a in sys.argv[1:]]
    rest = [a for a, match in zip(sys.argv[1:], found, strict=True) if not match]
    flags = parser.parse_args(rest)
    flags.overrides = [f"{match[1]} = {match[2]}" for match in found if match]
    flags.program = flags.program or list(_PROGRAMS)
    if not re.fullmatch(r"\w+:\d+(x\d+)*", flags.topology) or (
        flags.topology.split(":")[0] not in _ACCELERATORS
    ):
        parser.error(
            f"--topology {flags.topology}: it must be one of {', '.join(_ACCELERATORS)}, a colon "
            "and the chips' arrangement, such as v5e:2x4"
        )
    return flags


def _devices(topology: str) -> list:
    from jax.experimental import topologies

    from recexplore.errors import InputError

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of libtpu's own kinds
        reason = str(error).splitlines()[0][:300]
        raise InputError(
            f"The TPU compiler can't be used for {topology} ({reason}). It comes with "
            "`pip install -e '.[tpu]'`; not every arrangement of chips exists."
        ) from error


def _report(program) -> None:
    """Compiles a program and prints what it costs."""
    from recexplore.distributed.compiled import memory_of, read_text
    from recexplore.distributed.devices import PUBLISHED

    devices = program.mesh.devices.flatten()
    peak = PUBLISHED[devices[0].device_kind]
    sizes = ", ".join(f"{name} {value:,}" for name, value in program.sizes.items())
    mesh = " × ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    print(f"\n{program.name} on {len(devices)} {devices[0].device_kind} ({mesh}): {sizes}")
    start = time.monotonic()
    try:
        compiled = program.lowered.compile()
    except Exception as error:  # of XLA's own kinds
        _refused(error)
        return
    _row("compiled in", f"{time.monotonic() - start:.0f} s")
    memory, talk = memory_of(compiled), read_text(compiled.as_text())
    for name in ("arguments", "results", "temporaries", "code"):
        _row(f"{name} a chip", f"{getattr(memory, name) / _GIB:.2f} GiB")
    _row(
        "peak a chip",
        f"{memory.peak / _GIB:.2f} GiB of {peak.memory / _GIB:.0f}"
        f"{'' if memory.peak <= peak.memory else ': DOES NOT FIT'}",
    )
    flops = program.flops / len(devices)
    costs = compiled.cost_analysis()
    accessed = max(costs["bytes accessed"], memory.arguments + memory.results)
    _row("operations a chip", f"{flops / 1e9:,.0f} Gflop, by the mathematics")
    _row("bytes a chip", f"{accessed / 1e9:.2f} GB, loops counted once")
    for kind, (count, size) in talk.collectives.items():
        _row(kind, f"{count} times, {size / _MB:,.1f} MB a chip")
    moved = sum(collective.bytes for collective in talk.collectives.values())
    bounds = {
        "operations": flops / peak.flops,
        "memory": accessed / peak.bandwidth,
        "collectives": moved / peak.interconnect,
    }
    longest = max(bounds, key=bounds.get)
    estimate = talk.cycles / peak.clock
    _row("compiler's estimate", f"{estimate * 1e3:.1f} ms of computing, collectives not in it")
    each = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in bounds.items())
    _row("roofline", f"at least {1e3 * bounds[longest]:.1f} ms ({each})")


def _refused(error: Exception) -> None:
    text = str(error)
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", text)
    if used:
        _row("DOES NOT FIT", f"needs {used[1]} of {used[2]} {used[3]}")
    else:
        _row("not compiled", text.splitlines()[0][:200])


def _row(name: str, value: str) -> None:
    print(f"  {name:<22} {value}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
