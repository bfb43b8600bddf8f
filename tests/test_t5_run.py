"""A run with encoder–decoders from a folder that transformers made, as a person would start it."""

import json
import re
import shutil
from importlib import resources

import jax
import numpy as np
import pytest
import sentencepiece

from recexplore import artifacts, cli, export
from recexplore.explorer import load_explorer
from recexplore.inference.best_of_n import BestOfN
from recexplore.models import config_file, pretrained
from recexplore.models.encoder_decoder import EncoderDecoder
from recexplore.models.reward_model import RewardModel
from recexplore.tasks.vocabulary import Vocabulary

_WHY = "needs transformers and torch: pip install -e '.[bench]'"
torch = pytest.importorskip("torch", reason=_WHY)
transformers = pytest.importorskip("transformers", reason=_WHY)

HEAD = "from __gin__ import dynamic_registration\n"
NETWORK = """
from recexplore.models import encoder_decoder
encoder_decoder.EncoderDecoderConfig.num_encoder_layers = 2
encoder_decoder.EncoderDecoderConfig.num_decoder_layers = 2
encoder_decoder.EncoderDecoderConfig.model_dim = 32
encoder_decoder.EncoderDecoderConfig.num_heads = 4
encoder_decoder.EncoderDecoderConfig.head_dim = 8
encoder_decoder.EncoderDecoderConfig.mlp_dim = 48
encoder_decoder.EncoderDecoderConfig.dtype = 'float32'
encoder_decoder.EncoderDecoderConfig.dropout_rate = 0.1
encoder_decoder.EncoderDecoderConfig.scan_unroll = 2
"""
SMALL = """
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
ROWS = 704  # of the embedding, more than the tokenizer has tokens, as published ones have


def write_folder(folder):
    """A tiny random T5 1.1 with a spiece.model like T5's: <pad>, </s> and <unk> first, no BOS."""
    config = transformers.T5Config(
        vocab_size=ROWS,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    network = transformers.T5ForConditionalGeneration(config)
    network.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(ROWS, 32))
    network.save_pretrained(folder)
    topics = resources.files("recexplore.simulation").joinpath("topics.json").read_text()
    words = sorted({*re.findall(r"[a-zé]+", topics)})
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"interests: {w}; {w}; next: liking: {w}" for w in words]),
            model_writer=file,
            vocab_size=600,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    said = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


class Run:
    """A work directory and the command line on it."""

    def __init__(self, work, base, *files):
        self.work, self.base = work, base
        shared = base.parent
        names = [
            *("runs/log_t5.gin", "data/simulated.gin", shared / "t5.gin"),
            *("models/pretrained.gin", *files, shared / "small.gin"),
        ]
        self.flags = [f"--gin_file={name}" for name in names]

    def __call__(self, stage, *flags):
        base = f"--gin.PRETRAINED='{self.base}'"
        return cli.main([stage, "--workdir", str(self.work), *self.flags, base, *flags])

    def refused(self, capsys, *arguments):
        """What is said by a command that must fail."""
        capsys.readouterr()
        assert self(*arguments) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in said
        return said[said.rindex("recexplore: ") :]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5") / "base"
    write_folder(folder)
    (folder.parent / "t5.gin").write_text(HEAD + NETWORK)
    (folder.parent / "small.gin").write_text(HEAD + SMALL)
    return folder


@pytest.fixture(scope="module")
def trained(base):
    """Both models trained, and the table explored and measured."""
    run = Run(base.parent / "work", base)
    stages = ("ingest", "cluster", "aggregate", "tokenize", "train", "explore", "evaluate")
    assert [run(stage) for stage in stages] == [0] * len(stages)
    return run


def test_models_start_from_the_folder_and_all_of_them_is_trained(trained):
    vocabulary = Vocabulary(trained.work / "vocabulary")
    assert vocabulary.path.name == "spiece.model"
    assert (vocabulary.begin, vocabulary.eos_id, vocabulary.pad_id) == ((), 1, 0)
    _, models = load_explorer(trained.work, ("novelty", "alignment"), 8)
    novelty, alignment = models["novelty"], models["alignment"]
    assert isinstance(novelty.network, EncoderDecoder) and novelty.network.config.vocab_size == ROWS
    assert isinstance(alignment.network, RewardModel) and alignment.network.config.has_encoder
    published = pretrained.load(trained.base, novelty.network.config)["params"]
    for params in (novelty.params["params"], alignment.params["params"]["transformer"]):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, published)
        if params is not novelty.params["params"]:
            assert moved.pop("logits_dense") < 1e-5  # of no use there; weight decay is all
        assert 0 < min(jax.tree.leaves(moved)) and max(jax.tree.leaves(moved)) < 0.05


def test_explorations_are_valid_and_are_evaluated(trained):
    metrics = json.loads((trained.work / "metrics.json").read_text())
    assert metrics["explore/valid_fraction"] == metrics["explore/novel_fraction"] == 1.0
    assert 0 <= metrics["best_of_n/recall@10"] <= 1
    assert 0 <= metrics["alignment/pairwise_accuracy"] <= 1
    table = artifacts.read_json(trained.work / "stages/explore.json")
    assert table["outputs"]["exploration"][0] > 0
    assert trained("explore", "--dry_run") == 0


def test_asked_alone_or_together_histories_get_the_same_answers(trained):
    explorer, models = load_explorer(trained.work, ("novelty", "alignment"), 4)
    pair = models["novelty"], models["alignment"]
    histories = [[0, 3], [0, 5], [0, 7], [2, 1], [4]]
    settings = BestOfN(num_samples=6, num_chosen=3, sampler="distinct")
    together = explorer.explore(*pair, histories, [[]] * 5, settings, seed=1)
    alone = explorer.explore(*pair, histories[:1], [[]], settings, seed=1)
    np.testing.assert_array_equal(together.clusters[:1], alone.clusters)
    streamed = []
    explorer.explore_stream(*pair, [histories[:3], histories[3:]], [], settings, 1, streamed.append)
    clusters = np.concatenate([found.clusters for found in streamed])
    np.testing.assert_array_equal(clusters, together.clusters)
    nothing = np.zeros((5, 1, explorer.num_clusters), bool)
    whole = np.exp(explorer.log_probabilities(pair[0], histories, nothing))
    np.testing.assert_allclose(whole.sum(axis=-1), 1.0, rtol=1e-4)


def test_what_was_trained_goes_out_to_transformers(trained, tmp_path):
    vocabulary = Vocabulary(trained.work / "vocabulary")
    for name in ("novelty", "alignment"):
        export.export_model(trained.work / "models" / name, vocabulary, tmp_path / name)
    read = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "novelty").eval()
    _, models = load_explorer(trained.work, ("novelty",), 8)
    network, params, _ = models["novelty"]
    prompt, answer = vocabulary.encode("interests: a; next:"), [0, 7, 9]
    with torch.no_grad():
        wanted = read(
            input_ids=torch.tensor([[*prompt, 1]]), decoder_input_ids=torch.tensor([answer])
        ).logits.numpy()
    tokens, lengths = np.array([prompt], np.int32), np.array([len(prompt)], np.int32)
    found = jax.jit(network.apply)(params, tokens, lengths, np.array([answer], np.int32))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert (tmp_path / "novelty/spiece.model").is_file()
    assert (tmp_path / "alignment" / export.REWARD_HEAD).is_file()
    ours = {
        name: getattr(network.config, name) for name in ("dropout_rate", "remat", "scan_unroll")
    }
    config = config_file.read_config(tmp_path / "novelty", network.config.max_length, **ours)
    assert config == network.config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin_file=models/lora.gin"], "TransformerConfig.lora_rank is bound but no stage of"),
        (
            ["--gin.encoder_decoder.EncoderDecoderConfig.num_heads=8"],
            "encoder_decoder.EncoderDecoderConfig.num_heads is 8, but ",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_stage(flags, message, base, capsys):
    run = Run(base.parent / "never", base)
    said = run.refused(capsys, "run", *flags)
    assert message in said
    assert not run.work.exists()


def test_a_folder_of_t5_is_not_for_a_transformer(base, capsys):
    run = Run(base.parent / "never", base)
    run.flags = [
        flag.replace("runs/log_t5", "runs/log") for flag in run.flags if "/t5." not in flag
    ]
    said = run.refused(capsys, "run")
    assert "whose configuration is encoder_decoder.EncoderDecoderConfig, not transformer.Tr" in said
    assert "pipeline.train.make_network = @encoder_decoder.EncoderDecoder." in said
    assert not run.work.exists()


def test_packed_rows_are_refused(trained, capsys):
    other = trained.work.with_name("packed")
    shutil.copytree(trained.work, other, ignore=shutil.ignore_patterns("models", "exploration"))
    run = Run(other, trained.base)
    pack = "--gin.pipeline.train.pack=True"
    said = run.refused(capsys, "train", "--model", "novelty", "--overwrite", pack)
    assert "pipeline.train.pack is True, but EncoderDecoderConfig is of networks with" in said
