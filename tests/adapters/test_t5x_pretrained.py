"""T5X's checkpoints of T5 become folders that transformers and we read alike."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5x_layout import write_legacy, write_orbax

from recexplore.adapters.t5x_pretrained import config_of, to_huggingface
from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from recexplore.models.pretrained import load
from recexplore.models.t5_names import to_t5x

SIZES = dict(
    vocab_size=40,
    num_encoder_layers=2,
    num_decoder_layers=3,
    model_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=20,
    max_length=512,
    num_buckets=8,
)
FORMS = {"t5_1_1": {}, "t5": {"activation": "relu", "tied_embeddings": True}}
SCRIPT = Path(__file__).parents[2] / "scripts" / "import_t5x.py"


def made(form):
    """A network's sizes, and random parameters."""
    config = EncoderDecoderConfig(**SIZES, **FORMS[form])
    random = np.random.default_rng(0)
    shapes = saved.abstract_parameters(EncoderDecoder(config))
    return config, jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", [write_orbax, write_legacy])
def test_a_checkpoint_becomes_a_folder_that_transformers_reads(tmp_path, form, write):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config, params = made(form)
    checkpoint = write(tmp_path, 7, {"target": to_t5x(params, config)})
    assert to_huggingface(checkpoint, tmp_path / "hf") == config
    read = load(tmp_path / "hf", config)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    random = np.random.default_rng(1)
    prompts, answers = random.integers(2, 40, (3, 9)), random.integers(2, 40, (3, 4))
    answers[:, 0] = 0
    ended = np.pad(prompts, ((0, 0), (0, 1)), constant_values=1)
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(ended), decoder_input_ids=torch.tensor(answers)
        ).logits.numpy()
    found = EncoderDecoder(config).apply(
        read, jnp.asarray(prompts), jnp.full(3, 9), jnp.asarray(answers)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_t5_s_tokenizer_keeps_no_name_that_is_ours(tmp_path):
    config, params = made("t5_1_1")
    checkpoint = write_orbax(tmp_path, 7, {"target": to_t5x(params, config)})
    tokenizer = tmp_path / "sentencepiece.model"  # as T5's is called in its own bucket
    with pytest.raises(InputError, match="sentencepiece.model, the Sent.* is missing"):
        to_huggingface(checkpoint, tmp_path / "hf", tokenizer)
    tokenizer.write_bytes(b"pieces")
    to_huggingface(checkpoint, tmp_path / "hf", tokenizer)
    assert (tmp_path / "hf" / "spiece.model").read_bytes() == b"pieces"
    assert not (tmp_path / "hf" / "sentencepiece.model").exists()


def test_what_is_not_t5_s_is_refused_with_its_reason():
    config = EncoderDecoderConfig(**SIZES, bias_by_layer=True)
    shapes = saved.abstract_parameters(EncoderDecoder(config))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    with pytest.raises(InputError, match="layers are scanned .*bias_by_layer = True"):
        config_of(to_t5x(params, config))
    with pytest.raises(InputError, match="it has no token_embedder/embedding"):
        config_of({"decoder": {"norm": np.zeros(3)}})


def test_the_script_says_what_it_made_or_what_is_wrong(tmp_path, capsys):
    found = importlib.util.spec_from_file_location("import_t5x", SCRIPT)
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    config, params = made("t5_1_1")
    checkpoint = write_orbax(tmp_path, 7, {"target": to_t5x(params, config)})
    flags = ["--to", str(tmp_path / "hf"), "--checkpoint"]
    assert script.main([*flags, str(checkpoint)]) == 0
    assert "2 + 3 layers of width 16, 40 tokens" in capsys.readouterr().out
    assert script.main([*flags, str(tmp_path / "nowhere")]) == 2
    assert "is no T5X checkpoint and holds none" in " ".join(capsys.readouterr().err.split())
