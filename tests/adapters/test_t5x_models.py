"""Our models as T5X's: against plain forward passes, in one process."""

import functools
import itertools
import warnings

import numpy as np
import pytest
import scipy.stats
from needs_t5x import as_t5x_runs, import_t5x

t5x = import_t5x()

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402
from flax.linen import partitioning as flax_partitioning  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from t5x import decoding, optimizers, partitioning, train_state

    from recexplore.adapters import t5x as t5x_models
    from recexplore.adapters import t5x_data

from recexplore.errors import InputError  # noqa: E402
from recexplore.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig  # noqa: E402
from recexplore.models.reward_model import RewardModel  # noqa: E402
from recexplore.models.saved import fresh_variables  # noqa: E402
from recexplore.models.transformer import Transformer, TransformerConfig  # noqa: E402
from recexplore.models.trie import build_trie  # noqa: E402
from recexplore.tasks import seqio_tasks  # noqa: E402
from recexplore.training import objectives  # noqa: E402
from recexplore.training.optimization import Optimization  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
EOS, V = 1, 12
SIZES = dict(
    vocab_size=V,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    max_length=16,
)
# One is a beginning of another, two share most of their way, some part early.
SEQUENCES = [[2, 3, EOS], [2, 3, 4, EOS], [5, EOS], [2, 6, 7, 10, EOS], [2, 6, 8, EOS], [9, EOS]]
TRIE = build_trie(SEQUENCES, EOS, V)
ON_DEVICE = jax.device_put(TRIE)
PROMPTS = [[3, 7, 4, 8], [3, 7], [3, 7, 11, 10, 9]]
SEEN = [[], [0, 2], [5]]
LENGTH = 12
WORDS = seqio.PassThroughVocabulary(V, eos_id=EOS)
OPTIMIZATION = Optimization(steps=10, learning_rate=0.1)


def variables_of(module, scale=3.0):
    """Fresh ones, made larger so that distributions aren't flat, and heads that aren't zero."""
    fresh = nn.unbox(fresh_variables(module, jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    return jax.tree.map(
        lambda p: scale * p + 0.1 * jax.random.normal(next(keys), p.shape, p.dtype), fresh
    )


def novelty_model(objective=objectives.constrained_description_loss, **changes):
    config = TransformerConfig(**SIZES, attention_windows=(3, 0), logit_softcap=4.0)
    arguments = dict(
        module=Transformer(config),
        input_vocabulary=WORDS,
        output_vocabulary=WORDS,
        trie=TRIE,
        optimizer_def=t5x_models.optimizer(OPTIMIZATION),
        objective=objective,
    )
    return t5x_models.NoveltyModel(**arguments | changes)


def alignment_model(objective=objectives.pointwise_loss, **changes):
    module = RewardModel(TransformerConfig(**SIZES), **changes)
    optimizer = t5x_models.optimizer(OPTIMIZATION)
    return t5x_models.AlignmentModel(module, WORDS, WORDS, TRIE, optimizer, objective)


def converted(prompts, descriptions, converter, **more):
    """A batch as SeqIO's pipeline would give it to T5X."""

    def examples():
        for row, (prompt, description) in enumerate(zip(prompts, descriptions, strict=True)):
            others = {name: values[row] for name, values in more.items()}
            yield {"inputs": prompt, "targets": description, **others}

    ints = tf.TensorSpec([None], tf.int32)
    kinds = {"seen": tf.TensorSpec([None], tf.int64)}
    spec = {name: kinds.get(name, tf.TensorSpec([], tf.float32)) for name in more}
    dataset = tf.data.Dataset.from_generator(
        examples, output_signature={"inputs": ints, "targets": ints, **spec}
    )
    lengths = {"inputs": LENGTH - TRIE.max_length, "targets": TRIE.max_length}
    return next(converter(dataset, lengths).batch(len(prompts)).as_numpy_iterator())


def batch_of(descriptions, prompts=PROMPTS, **more):
    more = {"seen": SEEN, "label": [0.1, 0.9, 0.4], "weight": [1.0, 2.0, 0.5]} | more
    converter = t5x_data.ExampleConverter(len(SEQUENCES), pack=False)
    return converted(prompts, descriptions, converter, **more)


def next_log_probabilities(module, variables, tokens, possible):
    """Of each next token after `tokens`, if it must be one of `possible`."""
    row = np.zeros((1, SIZES["max_length"]), np.int32)
    row[0, : len(tokens)] = tokens
    logits = np.float64(_forward(module)(variables, row)[0, len(tokens) - 1])
    kept = np.full(V, -np.inf)
    kept[sorted(possible)] = logits[sorted(possible)]
    return kept - np.logaddexp.reduce(kept)


@functools.cache
def _forward(module):
    return jax.jit(module.apply)


def cluster_log_probabilities(module, variables, prompt, seen):
    """By plain forward passes: of every cluster, those seen being impossible."""
    found = np.full(len(SEQUENCES), -np.inf)
    left = [c for c in range(len(SEQUENCES)) if c not in seen]
    for cluster in left:
        total, said = 0.0, []
        for token in SEQUENCES[cluster]:
            here = [SEQUENCES[c] for c in left if SEQUENCES[c][: len(said)] == said]
            possible = {sequence[len(said)] for sequence in here}
            total += next_log_probabilities(module, variables, prompt + said, possible)[token]
            said = [*said, token]
        found[cluster] = total
    return found


def without_padding(row):
    return [int(token) for token in row if token]


def test_examples_have_the_features_that_seqio_gives_to_decoders():
    descriptions = [SEQUENCES[3], SEQUENCES[2], SEQUENCES[0]]
    ours = batch_of(descriptions)
    theirs = converted(PROMPTS, descriptions, seqio.DecoderFeatureConverter(pack=False))
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)
        assert ours[name].dtype == values.dtype
    assert {*ours} - {*theirs} == {"seen", "label", "weight"}
    assert [np.flatnonzero(row).tolist() for row in ours["seen"]] == SEEN
    np.testing.assert_array_equal(ours["label"], np.float32([0.1, 0.9, 0.4]))
    rows = t5x_models.as_ours(theirs, len(SEQUENCES))
    assert rows["prompt_lengths"].tolist() == [4, 2, 5]
    assert rows["lengths"].tolist() == [9, 4, 8]
    assert not rows["seen"].any() and rows["weight"].tolist() == [1, 1, 1]
    for row, prompt, description in zip(rows["tokens"], PROMPTS, descriptions, strict=True):
        assert without_padding(row) == prompt + description


@pytest.mark.parametrize("objective", ["constrained_description_loss", "next_description_loss"])
def test_the_loss_is_the_objective_s_mean_and_metrics_have_t5x_s_names(objective):
    model = novelty_model(getattr(objectives, objective))
    variables, batch = variables_of(model.module), batch_of([SEQUENCES[3], [5, 1], SEQUENCES[0]])
    rows = t5x_models.as_ours(batch, len(SEQUENCES))
    sums = model._objective(model.module, variables, ON_DEVICE, rows)
    loss, metrics = model.eval_fn(variables["params"], batch)
    np.testing.assert_allclose(loss, sums.loss / 3.5, rtol=1e-6)
    assert float(metrics["loss"].replace_steps(1).compute()) == pytest.approx(float(loss))
    assert float(metrics["accuracy"].compute()) == pytest.approx(float(sums.correct) / 3.5)
    assert {"timing/steps_per_second", "timing/seqs_per_second", "timing/seconds"} < set(metrics)
    summed = novelty_model(getattr(objectives, objective), loss_normalizing_factor=2.0)
    loss, _ = summed.eval_fn(variables["params"], batch)
    np.testing.assert_allclose(loss, sums.loss / 2.0, rtol=1e-6)


def test_parts_of_a_batch_add_up_to_its_loss_and_gradient():
    from t5x import trainer

    weights = batch_of([SEQUENCES[3], [5, 1], SEQUENCES[0]])["weight"]
    model = novelty_model(loss_normalizing_factor=float(2 * weights.sum()))
    variables = variables_of(model.module)
    batch = batch_of([SEQUENCES[3], [5, 1], SEQUENCES[0]])
    batch = {name: np.concatenate([rows, rows]) for name, rows in batch.items()}
    state = train_state.FlaxOptimTrainState.create(
        model.optimizer_def, model.get_initial_variables(jax.random.PRNGKey(0), {})
    ).replace_params(variables["params"])

    def of_parts(count):
        return trainer.accumulate_grads_microbatched(
            model, state, batch, jax.random.PRNGKey(1), count
        )

    with as_t5x_runs():
        (whole, said, _), (added, parts, _) = of_parts(None), of_parts(2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), whole, added)
    loss, summed = (float(x["loss"].replace_steps(1).compute()) for x in (said, parts))
    assert summed == pytest.approx(loss, rel=1e-5)


class Counted(seqio_tasks.Batches):
    """Batches that are their own numbers."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return {"tokens": np.full((2, 3), self.at), "example_id": np.arange(2)}

    def restart(self):
        self.at = 0

    def position(self):
        return {"at": self.at}

    def move_to(self, position):
        self.at = position["at"]


def test_the_place_in_the_data_is_saved_with_what_clusters_it_is_of(tmp_path):
    rows = t5x_data.Rows(Counted(), "abc")
    assert [int(next(rows)["tokens"][0, 0]) for _ in range(3)] == [1, 2, 3]
    rows.save(tmp_path / "place")
    again = t5x_data.Rows(Counted(), "abc")
    again.restore(str(tmp_path / "place"))
    assert int(next(again)["tokens"][0, 0]) == 4
    with pytest.raises(InputError, match="place is of a training on other clusters"):
        t5x_data.Rows(Counted(), "def").restore(tmp_path / "place")
    (tmp_path / "place").write_text('{"at": 7}')  # of a checkpoint that says nothing of them
    again.restore(tmp_path / "place")
    assert int(next(again)["tokens"][0, 0]) == 8


def test_an_encoder_is_refused():
    config = EncoderDecoderConfig(
        vocab_size=V,
        num_encoder_layers=1,
        num_decoder_layers=1,
        model_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
        max_length=16,
    )
    with pytest.raises(InputError, match="EncoderDecoderConfig, but under T5X rec.* are decoders"):
        novelty_model(module=EncoderDecoder(config))
    with pytest.raises(InputError, match="Train encoder-decoders by `recexplore train`"):
        t5x_models.AlignmentModel(
            RewardModel(config), WORDS, WORDS, TRIE, None, objectives.pointwise_loss
        )


def test_training_smooths_labels_and_evaluation_does_not():
    model = novelty_model()
    variables, batch = variables_of(model.module), batch_of([SEQUENCES[3], [5, 1], SEQUENCES[0]])
    rows = t5x_models.as_ours(batch, len(SEQUENCES))
    key = jax.random.PRNGKey(3)  # of the old kind, as T5X has them
    loss, _ = model.loss_fn(variables["params"], batch, key)
    sums = model._objective(model.module, variables, ON_DEVICE, rows, jax.random.wrap_key_data(key))
    np.testing.assert_allclose(loss, sums.loss / 3.5, rtol=1e-6)
    assert abs(float(loss) - float(model.eval_fn(variables["params"], batch)[0])) > 1e-3


def test_the_novelty_score_is_the_log_probability_of_the_description():
    model = novelty_model()
    variables = variables_of(model.module)
    exact = [
        cluster_log_probabilities(model.module, variables, prompt, seen)
        for prompt, seen in zip(PROMPTS, SEEN, strict=True)
    ]
    for clusters in itertools.product([1, 3], [1, 4], [0, 3]):
        batch = batch_of([SEQUENCES[cluster] for cluster in clusters])
        scores = model.score_batch(variables["params"], batch)
        wanted = [exact[row][cluster] for row, cluster in enumerate(clusters)]
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
        scores, _ = model.score_batch(variables["params"], batch, return_intermediates=True)
        np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_decoding_draws_unseen_clusters_with_their_probabilities():
    model = novelty_model(decode_fn=decoding.temperature_sample)
    variables, draws = variables_of(model.module), 1500
    batch = batch_of([[5, 1]] * 3)
    with as_t5x_runs():
        tokens, aux = jax.jit(
            lambda params: model.predict_batch_with_aux(
                params,
                batch,
                jax.random.PRNGKey(0),
                return_all_decodes=True,
                num_decodes=draws,
                decoder_params={"topk": 0, "rescale_log_probs": False},
            )
        )(variables["params"])
    assert tokens.shape == (3, draws, LENGTH) and aux["scores"].shape == (3, draws)
    for row, (prompt, seen) in enumerate(zip(PROMPTS, SEEN, strict=True)):
        exact = cluster_log_probabilities(model.module, variables, prompt, seen)
        drawn = np.array([SEQUENCES.index(without_padding(said)) for said in tokens[row]])
        assert not set(drawn.tolist()) & set(seen)
        np.testing.assert_allclose(aux["scores"][row], exact[drawn], atol=1e-5)
        left = [c for c in range(len(SEQUENCES)) if c not in seen]
        expected = draws * np.exp(exact[left])
        np.testing.assert_allclose(expected.sum(), draws, rtol=1e-6)
        counts = np.bincount(drawn, minlength=len(SEQUENCES))[left]
        assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_who_has_seen_everything_is_given_something():
    model = novelty_model()
    batch = batch_of([[5, 1]] * 3, seen=[list(range(len(SEQUENCES)))] * 3)
    with as_t5x_runs():
        tokens = model.predict_batch(variables_of(model.module)["params"], batch)
    assert all(without_padding(row) in SEQUENCES for row in tokens)


def test_free_decoding_is_that_of_plain_forward_passes():
    """The most probable token each time, from caches of prompts of different lengths."""
    model = novelty_model(objectives.next_description_loss)
    variables = variables_of(model.module)
    batch = batch_of([[5, 1]] * 3)
    with as_t5x_runs():
        tokens, aux = model.predict_batch_with_aux(
            variables["params"],
            batch,
            decoder_params={
                "logit_callback_fn": None,
                "topk": 1,
                "rescale_log_probs": False,
                "max_decode_steps": 5,
            },
        )
    for row, prompt in enumerate(PROMPTS):
        said, total = [], 0.0
        while len(said) < 5 and EOS not in said:
            logs = next_log_probabilities(model.module, variables, prompt + said, set(range(V)))
            total += logs.max()
            said.append(int(logs.argmax()))
        assert np.trim_zeros(tokens[row], "b").tolist() == np.trim_zeros(said, "b")
        assert float(aux["scores"][row]) == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("head", ["scalar", "bins", "ordinal"])
def test_the_alignment_score_is_the_reward_model_s(head):
    objective = {"scalar": objectives.pointwise_loss, "bins": objectives.binned_loss}.get(
        head, objectives.ordinal_loss
    )
    model = alignment_model(objective, head=head)
    variables = variables_of(model.module)
    descriptions = [SEQUENCES[3], [5, 1], SEQUENCES[0]]
    batch = batch_of(descriptions)
    scores = model.score_batch(variables["params"], batch)
    for row, (prompt, description) in enumerate(zip(PROMPTS, descriptions, strict=True)):
        alone = jnp.asarray([prompt + description])
        exact = model.module.apply(variables, alone, jnp.asarray([alone.shape[1]]))
        np.testing.assert_allclose(scores[row], exact[0], atol=1e-5)
    rows = t5x_models.as_ours(batch, len(SEQUENCES))
    sums = objective(model.module, variables, TRIE, rows)
    loss, _ = model.eval_fn(variables["params"], batch)
    np.testing.assert_allclose(loss, sums.loss / 3.5, rtol=1e-6)


@pytest.mark.parametrize("model", [novelty_model(), alignment_model(head="bins")])
def test_parameters_have_t5x_s_logical_axes_and_can_be_sharded(model):
    variables = model.get_initial_variables(jax.random.PRNGKey(0), {})
    axes = flax_partitioning.get_axis_names(variables["params_axes"])
    layers = axes.get("transformer", axes)["layers"]
    assert layers["mlp"]["wo"] == jax.P("layers", "mlp", "embed")
    assert layers["self_attention"]["query"] == jax.P("layers", "embed", "heads", "kv")
    known = {name for name, _ in partitioning.standard_logical_axis_rules()} | {None}
    is_spec = lambda leaf: isinstance(leaf, jax.P)  # noqa: E731
    for leaf, spec in zip(
        jax.tree.leaves(variables["params"]), jax.tree.leaves(axes, is_leaf=is_spec), strict=True
    ):
        assert type(leaf) is not nn.LogicallyPartitioned and len(spec) == leaf.ndim
        assert set(spec) <= known
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)
    rules = partitioning.standard_logical_axis_rules()
    partitioner = partitioning.PjitPartitioner(num_partitions=2, logical_axis_rules=rules)
    placed = partitioner.get_mesh_axes(state)
    inner = placed.params.get("transformer", placed.params)["layers"]["mlp"]["wi_0"]
    assert inner == jax.P(None, None, "model")


def test_the_optimizer_keeps_to_its_own_schedule():
    """T5X's trainer logs a rate that an optax optimizer doesn't listen to: it must be the same."""
    rule, rate = t5x_models.optimizer(OPTIMIZATION), t5x_models.learning_rate(OPTIMIZATION)
    assert isinstance(rule, optimizers.OptaxWrapper)
    params = {"kernel": jnp.zeros((2, 2)), "scale": jnp.zeros(2)}
    optimizer = rule.create(params)
    for step in range(10):
        before = optimizer.target
        gradients = jax.tree.map(jnp.ones_like, params)
        optimizer = optimizer.apply_gradient(gradients, learning_rate=123.0)
        moved = before["scale"] - optimizer.target["scale"]  # Adam's first steps go by the rate
        np.testing.assert_allclose(moved, rate(step), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: t5x_models.optimizer(Optimization(10, 0.1, optimizer="adafactor")),
            "shard the state of adamw alone",
        ),
        (
            lambda: t5x_models.optimizer(Optimization(10, 0.1, microbatches=2)),
            "num_microbatches instead",
        ),
        (lambda: t5x_data.ExampleConverter(3, pack=True), "can't pack recexplore's examples"),
        (
            lambda: alignment_model().predict_batch({}, {}),
            "predicts no text. Bind infer_script.infer.mode = 'score'",
        ),
        (
            lambda: t5x_models.as_ours({"decoder_target_tokens": jnp.zeros((1, 2), int)}, 3),
            "doesn't say where prompts end",
        ),
        (
            lambda: novelty_model(
                module=Transformer(TransformerConfig(**SIZES, lora_rank=2))
            ).get_initial_variables(jax.random.PRNGKey(0), {}),
            "the network has lora too",
        ),
        (lambda: t5x_data.task("nowhere", "novelty"), "no examples of a model 'novelty'; it has n"),
    ],
)
def test_what_t5x_can_not_do_is_refused(ask, message):
    with pytest.raises(InputError, match=message):
        ask()
