"""A trained model as a Hugging Face folder says in transformers what it says here."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import small_pretrained
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from recexplore import artifacts, export
from recexplore.distributed.checkpoints import Checkpoints
from recexplore.errors import InputError
from recexplore.explorer import NETWORK, load_model
from recexplore.models import config_file, pretrained, saved
from recexplore.models.lora import merge, split
from recexplore.models.reward_model import RewardModel
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.tasks.prompts import alignment_prompt, novelty_prompt
from recexplore.tasks.published_tokenizer import tokenizer_files
from recexplore.tasks.vocabulary import Vocabulary, pretrained_vocabulary, train_vocabulary

DESCRIPTIONS = ["space opera", "slow cooking", "space travel", "café culture & 日本", "ﬁne arts"]
PROMPTS = [novelty_prompt([a, b]) for a in DESCRIPTIONS for b in DESCRIPTIONS]
WHY = "needs transformers and torch: pip install -e '.[bench]'"


def trained(work, name, network, base=None):
    """Puts a random model into a work directory as training leaves it; returns its folder."""
    folder, random = work / "models" / name, np.random.default_rng(1)
    parameters = jax.tree.map(
        lambda x: jnp.asarray(0.1 * random.standard_normal(x.shape), x.dtype),
        saved.abstract_parameters(network),
    )
    state = {"params": split(parameters, network.config)[0]}
    checkpoints = Checkpoints(folder / saved.CHECKPOINTS)
    checkpoints.save(1, state, {"epoch": 0, "at": 0}, 0.5)
    checkpoints.close()
    artifacts.write_json(folder / NETWORK, saved.describe(network, base))
    return folder


@pytest.fixture(scope="module")
def from_family(tmp_path_factory):
    """family → a work directory with its tokenizer, its folder, its configuration."""
    made = {}

    def make(family):
        if family not in made:
            work = tmp_path_factory.mktemp(family)
            config = small_pretrained.write(work / "base", family)
            pretrained_vocabulary(work / "vocabulary", [], ["abc"], pretrained=str(work / "base"))
            made[family] = work, work / "base", dataclasses.replace(config, max_length=40)
        return made[family]

    return make


@pytest.fixture(scope="module")
def from_nothing(tmp_path_factory):
    """A work directory with a vocabulary of our own, and the configuration of a small network."""
    work = tmp_path_factory.mktemp("nothing")
    (work / "vocabulary").mkdir()
    train_vocabulary(work / "vocabulary", PROMPTS, DESCRIPTIONS)
    rows = Vocabulary(work / "vocabulary").embedding_rows
    sizes = {**small_pretrained.SIZES, "max_length": 40}
    return work, TransformerConfig(**sizes, vocab_size=rows, dropout_rate=0.3)


def exported(work, name, **options):
    folder = work / "exported" / name
    export.export_model(work / "models" / name, Vocabulary(work / "vocabulary"), folder, **options)
    return folder


def hidden_and_logits(folder, tokens):
    """What transformers makes of an exported folder: states after the last norm, and logits."""
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = model(torch.tensor(tokens), output_hidden_states=True)
    return found.hidden_states[-1].numpy(), found.logits.numpy()


def some_tokens(config):
    return np.random.default_rng(0).integers(3, config.vocab_size, (2, 20))


@pytest.mark.parametrize(
    ("family", "rank"), [("gemma", 4), ("qwen", 4), ("qwen", 0), ("nothing", 0)]
)
def test_transformers_gives_the_same_logits(family, rank, from_family, from_nothing):
    work, base, config = (
        from_family(family) if family != "nothing" else (from_nothing[0], None, from_nothing[1])
    )
    config = dataclasses.replace(config, lora_rank=rank, lora_targets=("query", "out", "wo"))
    name = f"novelty{rank}"
    model = trained(work, name, Transformer(config), base)
    network, params, _ = load_model(model, Vocabulary(work / "vocabulary"))
    folder, tokens = exported(work, name), some_tokens(config)
    ours = network.apply(params, jnp.asarray(tokens, jnp.int32))
    assert np.abs(ours).max() > 0.1  # or nothing would be compared
    np.testing.assert_allclose(hidden_and_logits(folder, tokens)[1], ours, atol=1e-4)


@pytest.mark.parametrize("head", ["scalar", "bins", "ordinal"])
def test_the_head_beside_an_alignment_model_gives_its_scores(head, from_family):
    work, base, config = from_family("gemma")
    config = dataclasses.replace(config, lora_rank=2)
    network = RewardModel(config, head=head, num_bins=5)
    model = trained(work, f"alignment_{head}", network, base)
    folder, tokens = exported(work, f"alignment_{head}"), some_tokens(config)
    with safe_open(folder / export.REWARD_HEAD, framework="np") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert said["head"] == head and said.get("num_bins", "5") == "5"
    params = load_model(model, Vocabulary(work / "vocabulary")).params
    lengths = jnp.array([20, 20])
    ours = network.apply(params, jnp.asarray(tokens, jnp.int32), lengths)

    last = hidden_and_logits(folder, tokens)[0][:, -1]
    projected = last @ tensors["head"]
    if head == "scalar":
        scores = projected + tensors["bias"]
    else:
        if head == "bins":
            powers = np.exp(projected + tensors["bias"])
            chances = powers / powers.sum(axis=1, keepdims=True)
        else:
            above = 1 / (1 + np.exp(tensors["thresholds"][None] - projected[:, None]))
            chances = -np.diff(above, prepend=1, append=0)
        expected = chances @ np.linspace(0, 1, 5)
        scores = np.log(expected / (1 - expected))
    np.testing.assert_allclose(scores, ours, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma", "qwen", "nothing"])
def test_an_export_can_be_started_from(family, from_family, from_nothing, tmp_path):
    """The same parameters and the same tokens come in again."""
    if family == "nothing":
        (work, config), base, rank = from_nothing, None, 0
    else:
        (work, base, config), rank = from_family(family), 3
    config = dataclasses.replace(config, lora_rank=rank)
    model = trained(work, "again", Transformer(config), base)
    vocabulary, folder = Vocabulary(work / "vocabulary"), exported(work, "again")

    params = load_model(model, vocabulary).params
    if rank:
        params, config = merge(params, config)
    config = dataclasses.replace(config, dropout_rate=0.0)
    read = pretrained.load(folder, config)
    jax.tree.map(np.testing.assert_array_equal, read["params"], params["params"])
    longest = 512 if base else 40  # what the pretrained model can read, not what it was trained on
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == longest

    pretrained_vocabulary(tmp_path, PROMPTS[:4], DESCRIPTIONS[:3], pretrained=str(folder))
    again = Vocabulary(tmp_path)
    for text in PROMPTS:
        assert again.encode_prompt(text) == vocabulary.encode_prompt(text)
        assert again.decode(again.encode_prompt(text)) == vocabulary.decode(
            vocabulary.encode_prompt(text)
        )
    for field in ("begin", "lead", "eos_id", "pad_id", "size"):
        assert getattr(again, field) == getattr(vocabulary, field), field


def test_an_own_vocabulary_without_a_piece_for_a_lone_separator_can_be_started_from(tmp_path):
    for name in ("own", "again"):
        (tmp_path / name).mkdir()
    words = ["crafts", "crafts story"]  # after a space there is never a ";" in these prompts
    prompts = [novelty_prompt(words), alignment_prompt(words)]
    train_vocabulary(tmp_path / "own", prompts, words)
    own = Vocabulary(tmp_path / "own")
    for name, content in tokenizer_files(own).items():
        (tmp_path / name).write_bytes(content)
    pretrained_vocabulary(tmp_path / "again", prompts, words, pretrained=str(tmp_path))
    again = Vocabulary(tmp_path / "again")
    assert [again.encode_prompt(p) for p in prompts] == [own.encode_prompt(p) for p in prompts]


def test_transformers_splits_texts_as_our_own_vocabulary_does(from_nothing):
    transformers = pytest.importorskip("transformers", reason=WHY)
    work, config = from_nothing
    trained(work, "split", Transformer(config))
    vocabulary = Vocabulary(work / "vocabulary")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(work, "split"))
    odd = ["  two  spaces ", "space operas; opera", "slow cookingspace travel", "Ⅳ ½"]
    for text in [*DESCRIPTIONS, *PROMPTS, alignment_prompt(DESCRIPTIONS), *odd]:
        assert tokenizer(text).input_ids == vocabulary.encode(text), text
        assert tokenizer.decode(vocabulary.encode(text)) == vocabulary.decode(
            vocabulary.encode(text)
        ) or vocabulary.encode(text).count(2)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_a_family_without_bos_is_not_given_one(from_family):
    """transformers would fill in the ids of the family's first model."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    work, base, config = from_family("qwen")
    trained(work, "ids", Transformer(dataclasses.replace(config, lora_rank=1)), base)
    read = transformers.AutoConfig.from_pretrained(exported(work, "ids"))
    vocabulary = Vocabulary(work / "vocabulary")
    assert (read.bos_token_id, read.eos_token_id) == (None, vocabulary.eos_id)


def test_small_adapters_survive_in_float32(from_family):
    work, base, config = from_family("gemma")
    config = dataclasses.replace(config, lora_rank=2, lora_scale=1e-3, param_dtype="bfloat16")
    model = trained(work, "small", Transformer(config), base)
    params = load_model(model, Vocabulary(work / "vocabulary")).params
    wide = {**params, "params": jax.tree.map(lambda x: x.astype(jnp.float32), params["params"])}
    wanted, merged = merge(wide, config)
    merged = dataclasses.replace(merged, param_dtype="float32")
    read = pretrained.load(exported(work, "small", dtype="float32"), merged)
    jax.tree.map(np.testing.assert_array_equal, read["params"], wanted["params"])
    assert config_file.read_config(work / "exported" / "small", 8).param_dtype == "float32"


def script():
    path = Path(__file__).parent.parent / "scripts" / "export_huggingface.py"
    spec = importlib.util.spec_from_file_location("export_huggingface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_script_exports_and_refuses_in_words(from_nothing, tmp_path, capsys):
    work, config = from_nothing
    trained(work, "novelty", Transformer(config))
    odd = dataclasses.replace(config, post_norms=True)
    trained(work, "odd", Transformer(odd))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("keep me")

    def run(name, to, *flags):
        flags = ["--workdir", str(work), "--model", name, "--to", str(tmp_path / to), *flags]
        status, said = script()(flags), capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    status, said = run("novelty", "new")
    assert status == 0 and "config.json, model.safetensors, tokenizer.json" in said
    for name, to, flags, message in (
        ("nov", "x", [], "models/nov holds no trained model. "),
        ("nov", "x", [], "novelty"),
        ("novelty", "x", ["--dtype", "int8"], "'int8'; it must be float32 or bfloat16"),
        ("odd", "x", [], "post_norms is True, but it must be False in every llama model"),
        ("novelty", "full", [], "holds something that isn't a model"),
    ):
        status, said = run(name, to, *flags)
        assert status == 2 and message in said, said
    assert not (tmp_path / "x").exists()


def test_what_would_be_split_otherwise_is_refused(tmp_path):
    """A vocabulary that isn't as ours are made: this one puts no space before a text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
        add_dummy_prefix=False,
        minloglevel=2,
    )
    (tmp_path / "sentencepiece.model").write_bytes(model.getvalue())
    with pytest.raises(InputError, match="can't be written for transformers: .* would split"):
        tokenizer_files(Vocabulary(tmp_path))


@pytest.fixture(scope="module")
def both(from_nothing):
    """Our own vocabulary, and what is written of it."""
    vocabulary = Vocabulary(from_nothing[0] / "vocabulary")
    written = tokenizer_files(vocabulary)["tokenizer.json"].decode()
    return vocabulary, tokenizers.Tokenizer.from_str(written)


@given(st.lists(st.sampled_from([*DESCRIPTIONS, "next:", "space", "; ", " ", "é", "x"])))
@settings(max_examples=200, deadline=None)
def test_any_text_is_split_as_it_was(both, parts):
    vocabulary, written = both
    text = "".join(parts)
    assert written.encode(text, add_special_tokens=False).ids == vocabulary.encode(text)
