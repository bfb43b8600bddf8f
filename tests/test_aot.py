"""Every compiled program can be compiled without data, for devices that aren't there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from recexplore import aot
from recexplore.configuration import Configuration, call_configured
from recexplore.distributed.compiled import memory_of, read_text
from recexplore.errors import InputError

SCRIPT = Path(__file__).parent.parent / "scripts" / "compile_for_tpu.py"
CONFIG = "transformer.TransformerConfig"
SMALL = [  # cut down further, so that compiling takes little
    *("BATCH_SIZE = 16", "MAX_LENGTH = 16", "NUM_SAMPLES = 4"),
    *("aot.training_step.num_clusters = 27", "aot.explore_pair.num_clusters = 27"),
    *("aot.explore_pair.prompt_length = 6", "selection.BestOfN.num_chosen = 2"),
    *(f"{CONFIG}.vocab_size = 64", f"{CONFIG}.model_dim = 32", f"{CONFIG}.head_dim = 8"),
    *(f"{CONFIG}.mlp_dim = 48", f"{CONFIG}.scan_unroll = 1"),
]
LORA = [f"{CONFIG}.lora_rank = 2", f"{CONFIG}.lora_targets = ('query', 'value')"]
PROGRAMS = {"train": aot.training_step, "explore": aot.explore_pair}
# Of tiny.gin so cut down: 2 layers, 4 heads of 8 and 2 groups; wide for a key and a value.
LAYER = 32 * (2 * 4 * 8 + 2 * 2 * 8) + 3 * 32 * 48 + 2 * 32
TRANSFORMER = 64 * 32 + 2 * LAYER + 32
ADAPTERS = 2 * 2 * (2 * 32 + 4 * 8 + 2 * 8)
HEAD = 32 + 1


def lowered(program, *overrides, devices=None):
    """The program, as scripts/compile_for_tpu.py lowers it."""
    configuration = Configuration(["ahead.gin", "models/tiny.gin"], [*SMALL, *overrides])
    function, found = PROGRAMS[program], []
    selector = f"{aot.__name__}.{function.__name__}"
    bindings = configuration.reachable_from(selector, program)
    call_configured(function, program, bindings, devices or jax.devices(), found.append)
    (ahead,) = found
    return ahead


@pytest.mark.parametrize("lora", [[], LORA], ids=["whole", "lora"])
def test_a_training_step_compiles_and_says_what_it_trains(lora):
    ahead = lowered("train", *lora)
    trained = ADAPTERS if lora else TRANSFORMER
    assert ahead.sizes["parameters"] == TRANSFORMER + (ADAPTERS if lora else 0)
    assert ahead.sizes["trained"] == trained
    assert tuple(ahead.mesh.shape.values()) == (1, 8, 1)  # fsdp takes what there is
    compiled = ahead.lowered.compile()
    memory = memory_of(compiled)
    # Parameters of eight devices' shares; with Adam three numbers for each that is trained.
    kept = 4 * (3 * trained + (TRANSFORMER if lora else 0))
    assert kept / 8 < memory.arguments < kept
    assert memory.results < 1000  # the state takes its own place; left are the figures
    assert read_text(compiled.as_text()).collectives["all-gather"].count > 0


def test_the_pair_compiles_and_shares_what_is_frozen():
    plain, shared = lowered("explore"), lowered("explore", *LORA)
    assert plain.sizes["parameters"] == 2 * TRANSFORMER + HEAD
    assert plain.sizes["shared"] == 0
    assert shared.sizes["parameters"] == TRANSFORMER + 2 * ADAPTERS + HEAD
    assert shared.sizes["shared"] == TRANSFORMER
    given = memory_of(shared.lowered.compile()).arguments
    assert 2 * TRANSFORMER < given < 2 * 2 * TRANSFORMER  # in bfloat16, on each device: one of them


def test_overrides_change_what_is_compiled():
    plain = lowered("train", devices=jax.devices()[:4])
    other = lowered(
        "train", "BATCH_SIZE = 32", f"{CONFIG}.num_layers = 4", devices=jax.devices()[:4]
    )
    assert (plain.sizes["B"], other.sizes["B"]) == (16, 32)
    assert other.sizes["parameters"] == plain.sizes["parameters"] + 2 * LAYER
    assert other.flops > 3 * plain.flops  # twice the rows through twice the layers, and one table
    mixed = lowered("train", "train/partitioning.make_mesh.tensor = 2")
    assert tuple(mixed.mesh.shape.values()) == (1, 4, 2)


@pytest.mark.parametrize(
    ("program", "override", "message"),
    [
        ("train", "BATCH_SIZE = 12", "aot.training_step.batch_size is 12; .* multiple of 8"),
        ("explore", "BATCH_SIZE = 12", "aot.explore_pair.batch_size is 12"),
        ("train", "train/partitioning.make_mesh.data = 3", "data=3, fsdp=-1.*8 devices"),
        (
            "train",
            "aot.training_step.description_length = 3",
            "27 clusters can't be told apart in 3",
        ),
        ("train", f"{CONFIG}.num_heads = 3", "num_kv_heads is 2; it must divide num_heads"),
        ("train", f"{CONFIG}.model_dim = 33", "of shape .*33.* can't be dealt out"),
        ("explore", "explore/selection.BestOfN.sampler = 'beam'", "sampler is 'beam'"),
    ],
)
def test_what_cannot_be_compiled_is_named(program, override, message):
    with pytest.raises(InputError, match=message):
        lowered(program, override)


@pytest.mark.parametrize("count", [1, 2, 27, 1000])
def test_descriptions_are_all_different(count):
    trie = aot.some_trie(count, 6, 64)
    assert trie.num_sequences == count
    assert trie.max_length == 6


def compile_for_tpu(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install -e '.[tpu]'",
)
def test_the_script_compiles_for_a_tpu_that_is_not_there():
    overrides = [f"--gin.{statement.replace(' = ', '=', 1)}" for statement in SMALL]
    ended = compile_for_tpu("--gin_file=models/micro.gin", "--topology=v5e:2x4", *overrides)
    assert ended.returncode == 0, ended.stderr
    told = [part for part in ended.stdout.split("\n\n") if part.strip()]
    assert len(told) == 2
    programs = (("training step", "data 1 × fsdp 8"), ("best-of-n step", "data 8 × fsdp 1"))
    for part, (name, mesh) in zip(told, programs, strict=True):
        assert f"{name} on 8 TPU v5 lite ({mesh} × tensor 1): " in part
        peak = re.search(r"peak a chip +([\d.]+) GiB of 16$", part, re.MULTILINE)
        assert peak and float(peak[1]) < 1
        assert re.search(r"compiler's estimate +[\d.]+ ms", part)
        assert re.search(r"roofline +at least [\d.]+ ms", part)
    assert re.search(r"all-gather +\d+ times", told[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e"], "--topology v5e: it must be one of v4, v5e, v5p, v6e"),
        (["--topology=v9:2x4"], "--topology v9:2x4: it must be one of v4"),
        (["--topology=v5e:2x4", "--gin.BATCH=4"], "nothing uses the name BATCH"),
        (["--topology=v5e:2x4", "--gin.BATCH_SIZE='a'"], "batch_size is 'a'; it must be int"),
        (["--topology=v5e:2x4", "--gin_file=models/none.gin"], "models/none.gin was not found"),
    ],
)
def test_the_script_names_what_is_wrong(arguments, message):
    ended = compile_for_tpu("--gin_file=models/micro.gin", *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
