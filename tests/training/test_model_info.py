"""model-info.txt names every variable, how large it is and where it lies."""

import dataclasses
import math
import re

import jax
from copying_task import CONFIG

from recexplore.distributed import partitioning
from recexplore.models.transformer import Transformer
from recexplore.training import model_info, objectives
from recexplore.training.optimization import Optimization
from recexplore.training.program import Program

LINE = re.compile(r"Variable (\S+) +size (\d+) +shape (\(.*?\)) +partition spec (\(.*\))")


def read(folder, config):
    optimization = Optimization(steps=10, learning_rate=1e-3)
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    loss = objectives.constrained_description_loss
    program = Program(Transformer(config), loss, optimization, mesh)
    model_info.write(folder, program)
    text = (folder / model_info.MODEL_INFO).read_text()
    return program, {found[0]: found[1:] for found in LINE.findall(text)}, text.splitlines()


def test_every_variable_has_its_size_its_axes_and_its_place(tmp_path):
    program, lines, text = read(tmp_path / "new", CONFIG)
    leaves = jax.tree_util.tree_leaves_with_path(program.state.params)
    assert len(lines) == len(leaves)
    for path, leaf in leaves:
        size, shape, spec = lines["/".join(key.key for key in path)]
        assert int(size) == math.prod(leaf.shape)
        assert [int(n) for n in re.findall(r"=(\d+)", shape)] == list(leaf.shape)
        assert spec == str(tuple(leaf.sharding.spec))
    (embedding,) = (line for name, line in lines.items() if "embed" in name.lower())
    assert embedding[1] == f"(vocab={CONFIG.vocab_size}, embed={CONFIG.model_dim})"
    total = sum(math.prod(leaf.shape) for _, leaf in leaves)
    assert text[-1] == f"Total number of parameters: {total}"


def test_what_is_not_trained_is_named_apart(tmp_path):
    program, lines, text = read(tmp_path, dataclasses.replace(CONFIG, lora_rank=2))
    frozen = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.frozen))
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.params))
    assert sum(int(size) for name, (size, *_) in lines.items() if "frozen/" in name) == frozen > 0
    assert text[-2:] == [
        f"Total number of parameters: {trained + frozen}",
        f"of which are trained: {trained}",
    ]
