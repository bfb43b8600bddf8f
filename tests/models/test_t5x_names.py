"""Trees of T5X: by T5X's names written out here, and by T5X's own networks where they are there."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from recexplore.models.t5_names import from_t5x, to_t5x

V, D, H, W, F, N, E, L = 40, 16, 2, 6, 20, 32, 2, 3
SIZES = dict(
    vocab_size=V, model_dim=D, num_heads=H, head_dim=W, mlp_dim=F, max_length=64, end_id=-1
)
LAYERS = dict(num_encoder_layers=E, num_decoder_layers=L)
FORMS = {
    "t5_1_1": {},
    "t5": dict(activation="relu", tied_embeddings=True),
    "scalable": dict(bias_by_layer=True),
    "scalable_tied": dict(bias_by_layer=True, tied_embeddings=True),
}
EVERY = pytest.mark.parametrize("form", FORMS)


def config_of(form, **changes):
    return EncoderDecoderConfig(**{**SIZES, **LAYERS, **FORMS[form], **changes})


@functools.cache
def params_of(form):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: random.normal(0, 0.3, x.shape).astype(np.float32),
        saved.abstract_parameters(EncoderDecoder(config_of(form))),
    )


def layer(params, stack, number, attentions):
    """One layer's entry of a tree of t5x/examples/t5."""
    here = jax.tree.map(lambda x: x[number], params["params"][stack]["layers"])
    made = {}
    for name, part in here.items():
        if name in attentions:
            made[name] = {
                **{to: {"kernel": part[to].reshape(D, H * W)} for to in ("query", "key", "value")},
                "out": {"kernel": part["out"].reshape(H * W, D)},
            }
        elif name == "mlp":
            made[name] = {kernel: {"kernel": value} for kernel, value in part.items()}
        else:
            made[name] = part
    return made


@pytest.mark.parametrize("form", ["t5_1_1", "t5"])
def test_names_and_layouts_are_those_of_t5x(form):
    params = params_of(form)
    top = params["params"]
    wanted = {
        "token_embedder": {"embedding": top["token_embedder"]},
        "encoder": {
            "relpos_bias": top["encoder"]["relpos_bias"],
            "encoder_norm": top["encoder"]["encoder_norm"],
            **{f"layers_{i}": layer(params, "encoder", i, ("attention",)) for i in range(E)},
        },
        "decoder": {
            "relpos_bias": top["decoder"]["relpos_bias"],
            "decoder_norm": top["decoder"]["decoder_norm"],
            **{
                f"layers_{i}": layer(
                    params, "decoder", i, ("self_attention", "encoder_decoder_attention")
                )
                for i in range(L)
            },
        },
    }
    if form == "t5_1_1":
        wanted["decoder"]["logits_dense"] = {"kernel": top["logits_dense"].T}
    made = to_t5x(params, config_of(form))
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
    jax.tree.map(np.testing.assert_array_equal, from_t5x(wanted, config_of(form)), params)


@EVERY
@pytest.mark.parametrize("scan_axis", [0, 1])
def test_there_and_back(form, scan_axis):
    config, params = config_of(form), params_of(form)
    tree = to_t5x(params, config, scan_axis)
    jax.tree.map(np.testing.assert_array_equal, from_t5x(tree, config, scan_axis), params)
    if config.bias_by_layer:
        kernel = tree["decoder"]["decoder"]["self_attention"]["query"]["kernel"]
        assert kernel.shape == ((L, D, H, W) if scan_axis == 0 else (D, L, H, W))
        bias = tree["encoder"]["encoder"]["relpos_bias"]["rel_embedding"]
        assert bias.shape == ((E, H, N) if scan_axis == 0 else (H, E, N))


@EVERY
def test_t5xs_own_network_says_the_same(form):
    """The same logits, and all that it has is what we write."""
    scanned = "scalable" in form
    name = f"t5x.examples.{'scalable_t5' if scanned else 't5'}.network"
    pytest.importorskip(name, reason="needs T5X, which is on no registry: its git repository")
    network, config = importlib.import_module(name), config_of(form)
    theirs = network.Transformer(
        network.T5Config(
            vocab_size=V,
            dtype="float32",
            emb_dim=D,
            num_heads=H,
            num_encoder_layers=E,
            num_decoder_layers=L,
            head_dim=W,
            mlp_dim=F,
            mlp_activations=("relu",) if config.activation == "relu" else ("gelu", "linear"),
            dropout_rate=0.0,
            logits_via_embedding=config.tied_embeddings,
        )
    )
    random = np.random.default_rng(1)
    prompts, answers = random.integers(2, V, (2, 30)), random.integers(2, V, (2, 5))
    lengths = np.array([30, 11])
    prompts = np.where(np.arange(30) < lengths[:, None], prompts, 0)
    begun = np.concatenate([np.zeros((2, 1), int), answers[:, :-1]], axis=1)
    tree = to_t5x(params_of(form), config)
    arguments = (jnp.asarray(prompts), jnp.asarray(begun), jnp.asarray(answers))
    with jax.numpy_rank_promotion("allow"):
        start = functools.partial(theirs.init, jax.random.key(0), enable_dropout=False)
        shapes = jax.eval_shape(start, *arguments)
        wanted = theirs.apply({"params": tree}, *arguments, enable_dropout=False)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, shapes["params"])
    ours = jax.jit(EncoderDecoder(config).apply)(params_of(form), prompts, lengths, begun)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "changes", "edit", "message"),
    [
        (
            "t5_1_1",
            {},
            lambda tree: tree.pop("decoder/layers_2/mlp/wi_1/kernel"),
            "The tree of T5X lacks decoder/layers_2/mlp/wi_1/kernel. Bind the sizes of the model",
        ),
        (
            "t5_1_1",
            {"num_decoder_layers": 2},
            lambda tree: None,
            "T5X has besides decoder/layers_2/encoder_decoder_attention/key/kernel, ",
        ),
        (
            "t5_1_1",
            {"mlp_dim": 24},
            lambda tree: None,
            r"encoder/layers_0/mlp/wi_0/kernel has shape \(16, 20\), but .* makes it \(16, 24\)",
        ),
        ("scalable", {"bias_by_layer": False}, lambda tree: None, "bias_by_layer = True"),
        ("t5_1_1", {"bias_by_layer": True}, lambda tree: None, "bias_by_layer = False"),
    ],
)
def test_another_networks_tree_is_refused(form, changes, edit, message):
    tree = flatten_dict(to_t5x(params_of(form), config_of(form)), sep="/")
    edit(tree)
    with pytest.raises(InputError, match=message):
        from_t5x(unflatten_dict(tree, sep="/"), config_of(form, **changes))
