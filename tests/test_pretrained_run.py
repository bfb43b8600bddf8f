"""A run from a pretrained folder, as a person would start it."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_pretrained

from recexplore import artifacts, cli, pipeline
from recexplore.errors import InputError
from recexplore.explorer import load_explorer
from recexplore.models import pretrained, saved
from recexplore.tasks.vocabulary import Vocabulary
from recexplore.training.telemetry import Curves

FILES = ["runs/log.gin", "data/simulated.gin"]
LORA = "models/lora.gin"
HEAD = "from __gin__ import dynamic_registration\nfrom recexplore.models import transformer\n"
SMALL = """
from __gin__ import dynamic_registration
from recexplore import pipeline
from recexplore.simulation import world
from recexplore.training import optimization
from recexplore.training import trainer

NUM_CLUSTERS = 12
pipeline.tokenize.longer_histories = {}
world.Settings.num_users = 150
world.Settings.num_items = 300
world.simulate_log.num_days = 6
pipeline.train.batch_size = 16
optimization.Optimization.steps = 8
alignment/optimization.Optimization.steps = 8
items/optimization.Optimization.steps = 8
trainer.train.evaluate_every = 4
alignment/trainer.train.evaluate_every = 4
"""
WIDE = dict(model_dim=128, mlp_dim=512)  # or a checkpoint's own files would outweigh the model


class Run:
    """One work directory, its gin files, and the command line on it."""

    def __init__(self, work, family, *files, pretrained_folder=None):
        self.work, shared = work, work.parent
        self.base = pretrained_folder or shared / family
        files = [*FILES, shared / f"{family}.gin", "models/pretrained.gin", *files]
        self.flags = [f"--gin_file={file}" for file in (*files, shared / "small.gin")]

    def __call__(self, stage, *flags):
        base = f"--gin.PRETRAINED='{self.base}'"
        return cli.main([stage, "--workdir", str(self.work), *self.flags, base, *flags])

    def copy(self, name, *without):
        """The same run in a work directory of its own, some artefacts left out."""
        other = self.work.parent / name
        shutil.copytree(self.work, other, ignore=shutil.ignore_patterns(*without))
        copied = Run(other, "gemma", pretrained_folder=self.base)
        copied.flags = self.flags
        return copied

    def refused(self, capsys, *arguments):
        """What is said by a command that must fail before it trains."""
        capsys.readouterr()
        assert self(*arguments) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in said
        assert not [*self.work.glob("models/*/checkpoints/*")]
        return said[said.rindex("recexplore: ") :]


def number_of_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two pretrained folders and their gin files."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "small.gin").write_text(SMALL)
    for family in ("gemma", "qwen"):
        config = small_pretrained.write(folder / family, family, **WIDE)
        (folder / f"{family}.gin").write_text(HEAD + small_pretrained.bindings(config))
    return folder


@pytest.fixture(scope="module")
def log(folders):
    """A log with clusters and feedback, which all runs begin with."""
    run = Run(folders / "log", "gemma", LORA)
    assert [run(stage) for stage in ("ingest", "cluster", "aggregate")] == [0, 0, 0]
    return run


@pytest.fixture(scope="module")
def tokenized(log):
    """The examples for adapters around the Gemma-like model."""
    run = log.copy("tokenized")
    assert run("tokenize") == 0
    return run


@pytest.fixture(scope="module")
def adapted(tokenized):
    """Both models trained."""
    run = tokenized.copy("adapted")
    assert run("train") == 0
    return run


def test_adapters_are_all_that_is_trained_and_kept(adapted):
    base = number_of_bytes(adapted.base)
    for name in (pipeline.NOVELTY, pipeline.ALIGNMENT):
        folder = adapted.work / pipeline.model_folder(name)
        kept = [number_of_bytes(step) for step in (folder / saved.CHECKPOINTS).iterdir()]
        assert len(kept) == 2 and max(kept) < base / 2, (kept, base)
        network = saved.rebuild(artifacts.read_json(folder / "network.json"))
        assert network.config.lora_rank == 16 and network.config.param_dtype == "bfloat16"


def test_two_loaded_models_have_one_transformer_in_memory(adapted):
    explorer, models = load_explorer(adapted.work, ("novelty", "alignment"), 8)
    novelty = models["novelty"].params["params"]
    alignment = models["alignment"].params["params"]["transformer"]
    shared = jax.tree.map(lambda one, other: one is other, novelty, alignment)
    assert len(jax.tree.leaves(shared)) > 10 and all(jax.tree.leaves(shared))
    assert explorer.num_clusters == 12
    published = pretrained.load(adapted.base, models["novelty"].network.config)["params"]
    jax.tree.map(np.testing.assert_array_equal, novelty, published)


def test_explorations_are_valid_and_are_evaluated(adapted):
    assert [adapted(stage) for stage in ("explore", "evaluate")] == [0, 0]
    metrics = json.loads((adapted.work / "metrics.json").read_text())
    assert metrics["explore/valid_fraction"] == metrics["explore/novel_fraction"] == 1.0
    assert 0 <= metrics["best_of_n/recall@10"] <= 1
    assert 0 <= metrics["alignment/pairwise_accuracy"] <= 1


def test_interrupted_training_goes_on_and_ends_the_same(tokenized, adapted, monkeypatch):
    run, write = tokenized.copy("interrupted"), Curves.write

    def interrupt(self, step, figures):
        if step > 4:
            raise KeyboardInterrupt
        write(self, step, figures)

    more = ["--model", "novelty"]
    with monkeypatch.context() as patched:
        patched.setattr(Curves, "write", interrupt)
        assert run("train", *more) == 130
    checkpoints = run.work / "models/novelty" / saved.CHECKPOINTS
    assert [path.name for path in checkpoints.iterdir()] == ["4"]
    assert run("train", *more) == 0
    again, undisturbed = (
        load_explorer(r.work, ("novelty",), 8)[1]["novelty"].params["lora"] for r in (run, adapted)
    )
    jax.tree.map(np.testing.assert_array_equal, again, undisturbed)


def test_all_of_a_model_with_another_tokenizer_is_trained(log):
    """Nothing before a prompt, EOS behind all pieces, untied and padded embeddings."""
    run = log.copy("qwen_run")
    run.base, run.flags = log.base.with_name("qwen"), Run(run.work, "qwen").flags
    fewer = [f"--gin.{scope}optimization.Optimization.steps=4" for scope in ("", "alignment/")]
    assert [run(stage, *fewer) for stage in ("tokenize", "train", "explore")] == [0, 0, 0]
    vocabulary = Vocabulary(run.work / "vocabulary")
    assert not vocabulary.begin and vocabulary.eos_id == vocabulary.size - 1
    _, models = load_explorer(run.work, ("novelty", "alignment"), 8)
    network, trained, _ = models["novelty"]
    assert network.config.vocab_size == 704 > vocabulary.size and not network.config.lora_rank
    published = pretrained.load(run.base, network.config)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, published)
    assert min(jax.tree.leaves(moved)) > 0
    assert max(jax.tree.leaves(moved)) < 0.05  # from where they were, not from anywhere
    table = artifacts.read_json(run.work / "stages/explore.json")
    assert table["outputs"]["exploration"][0] > 0


def test_a_preset_that_is_not_the_folders_is_refused(tokenized, capsys):
    run = tokenized.copy("other_preset")
    said = run.refused(capsys, "train", "--gin.transformer.TransformerConfig.num_layers=3")
    assert "TransformerConfig.num_layers is 3, but " in said
    assert f"{run.base}/config.json has 2 (num_hidden_layers)" in said


def test_adapters_need_a_pretrained_model(tokenized, capsys):
    run = tokenized.copy("no_base")
    said = run.refused(capsys, "train", "--gin.pipeline.train.pretrained=None")
    assert "lora_rank is 16, but there is no pretrained transformer to add to: bind" in said


def test_the_folder_must_be_named(tokenized, capsys):
    flags = [flag for flag in tokenized.flags if "PRETRAINED" not in flag]
    assert cli.main(["run", "--workdir", str(tokenized.work), *flags]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "PRETRAINED must be set" in said and "--gin.PRETRAINED=" in said


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_shards(folder):
    config = pretrained.check_folder(folder)
    kept = {n: (folder / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}
    params = pretrained.load(folder, config)
    pretrained.save(folder, params, config, shard_bytes=300_000, beside=kept)
    return sorted(folder.glob("*.safetensors"))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "which is no folder; it should have a tokenizer.json or"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing. "),
        (lambda f: edit_config(f, model_type="mamba"), "has model_type 'mamba', which isn't"),
        (lambda f: edit_config(f, num_experts=8), "has num_experts 8; recexplore doesn't know"),
        (lambda f: edit_config(f, vocab_size=512), "has shape (640, 128), but "),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor "),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors is damaged or not whole"),
        (lambda f: in_shards(f)[-1].unlink(), "safetensors is missing; "),
        (lambda f: truncate(in_shards(f)[0]), ".safetensors is damaged or not whole"),
        (lambda f: (f / "tokenizer.json").unlink(), "a folder without tokenizer.json or "),
        (lambda f: truncate(f / "tokenizer.json"), "tokenizer.json is not a tokenizer of "),
    ],
)
def test_a_bad_folder_is_refused_before_any_stage(damage, message, folders, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(folders / "gemma", base)
    damage(base)
    run = Run(folders / tmp_path.name, "gemma", LORA, pretrained_folder=base)
    said = run.refused(capsys, "run")
    assert message in said and str(base) in said
    assert not run.work.exists()


def test_a_folder_of_another_network_is_refused_before_any_stage(folders, tmp_path, capsys):
    other = "--gin.alignment/transformer.TransformerConfig.mlp_dim=256"
    run = Run(folders / tmp_path.name, "gemma", LORA)
    said = run.refused(capsys, "run", other)
    assert f"mlp_dim is 256, but {run.base}/config.json has 512 (intermediate_size)" in said
    assert not run.work.exists()


def test_a_folder_for_one_model_alone_is_looked_at(folders, tmp_path, capsys):
    bad, run = tmp_path / "bad", Run(folders / tmp_path.name, "gemma")
    bad.mkdir()
    said = run.refused(capsys, "run", f"--gin.alignment/pipeline.train.pretrained='{bad}'")
    assert f"{bad}/config.json is missing. " in said
    assert not run.work.exists()


@pytest.fixture
def another(log, tmp_path):
    """A run from a pretrained folder of one's own."""

    def make(name, **changes):
        base = tmp_path / name
        config = small_pretrained.write(base, "gemma", **{**WIDE, **changes})
        run = log.copy(name)
        run.base = base
        return run, config

    return make


def test_a_folder_without_tokenizer_is_refused(another, capsys):
    run, _ = another("speechless")
    (run.base / "tokenizer.json").unlink()
    said = run.refused(capsys, "tokenize")
    assert f"(PRETRAINED) is '{run.base}', which is a folder without tokenizer.json or " in said


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(another, capsys):
    run, _ = another("too_few_rows", vocab_size=512)
    assert run("tokenize") == 0
    said = run.refused(capsys, "train")
    assert f"{run.base} has a token embedding of 512 rows, but " in said
    assert "the tokenizer doesn't match the embedding" in said


def test_a_file_of_tensors_that_went_missing_is_named(another, capsys):
    run, _ = another("not_whole")
    *_, shard = in_shards(run.base)
    assert run("tokenize") == 0
    shard.rename(run.base / "moved")
    said = run.refused(capsys, "train")
    assert f"{shard} is missing; " in said


def test_a_folder_that_was_moved_is_missed_when_it_is_asked_for(another, adapted, capsys):
    run = adapted.copy("moved", "exploration", "explore.json", "evaluat*", "metrics.json")
    here = run.base
    there = here.with_name("elsewhere")
    here.rename(there)
    try:
        assert run("explore") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{here}/config.json and 3 more files are gone. If you moved them" in said
        with pytest.raises(InputError, match=f"adapters for .* in {here}, which isn't there any"):
            load_explorer(run.work, ("novelty",), 8)
    finally:
        there.rename(here)
    assert run("explore", "--dry_run") == 0
