"""Tuning ends where the mathematics says, survives being killed, and refuses bad settings."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from small_policy import (
    ALIGNMENT,
    HISTORIES,
    NETWORK,
    NOVELTY,
    PREFIX,
    SEQUENCES,
    answers_of,
    batch_of,
    log_probabilities,
    tune,
)

from recexplore import artifacts
from recexplore.distributed import partitioning
from recexplore.errors import InputError, Preempted
from recexplore.models import saved
from recexplore.training.policy_gradient import PolicyGradient

# clu and orbax bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def probabilities(params, row):
    """Of the clusters that may follow one history, by the parameters."""
    batch = jax.tree.map(jnp.asarray, batch_of([row]))
    found = log_probabilities(params, batch, answers_of(SEQUENCES, 1), "constrained")[0]
    allowed = [i for i in range(len(SEQUENCES)) if i not in HISTORIES[row]]
    return np.exp(np.asarray(found, np.float64)[allowed]), allowed


def exact_rewards(row):
    prompt = batch_of([row]).alignment.tokens[0, : batch_of([row]).alignment.lengths[0]].tolist()
    wholes = [PREFIX + prompt + text for text in SEQUENCES]
    lengths = jnp.array([len(whole) for whole in wholes])
    rows = jnp.array([whole + [0] * (10 - len(whole)) for whole in wholes])
    return np.asarray(jax.jit(ALIGNMENT.network.apply)(ALIGNMENT.params, rows, lengths), float)


@pytest.mark.parametrize(("kl_weight", "moved"), [(0.7, (0.1, 1.0)), (100.0, (0.0, 0.03))])
def test_tuning_ends_at_the_optimum_that_is_known(tmp_path, kl_weight, moved):
    """On one prompt, π ∝ π₀ exp(r / β); with a high KL weight that is the reference itself."""
    row = 2
    tune(
        tmp_path,
        prompts=batch_of([row]),
        kl_weight=kl_weight,
        decoding="constrained",
        prompts_per_step=16,
        samples_per_prompt=8,
        steps=300,
        evaluate_every=300,
        learning_rate=0.03,
    )
    before, allowed = probabilities(NOVELTY.params, row)
    wanted = before * np.exp(exact_rewards(row)[allowed] / kl_weight)
    wanted /= wanted.sum()
    found, _ = probabilities(saved.load_parameters(tmp_path, NETWORK), row)
    assert np.abs(found - wanted).sum() / 2 < 0.05
    assert moved[0] <= np.abs(found - before).sum() / 2 <= moved[1]


def test_preferences_raise_the_reward(tmp_path):
    tune(tmp_path, method="direct_preference", steps=80, evaluate_every=80, learning_rate=0.02)
    first, *steps, last = curve(tmp_path)
    assert last["evaluation_reward"] > first["evaluation_reward"] + 0.1
    assert first["evaluation_kl"] == pytest.approx(0, abs=1e-5) and last["evaluation_kl"] > 0.1
    assert steps[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)  # before anything has moved
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_what_was_answered_is_kept(tmp_path):
    outputs = tune(tmp_path, kl_weight=0.0, evaluate_every=5)
    assert outputs.steps.tolist() == [0, 5, 10, 12]
    by_step = {r["step"]: r for r in curve(tmp_path) if "evaluation_reward" in r}
    assert list(by_step) == [0, 5, 10, 12]
    for place, step in enumerate(outputs.steps.tolist()):
        valid = outputs.clusters[place] >= 0
        assert by_step[step]["evaluation_valid"] == pytest.approx(valid.mean())
        assert by_step[step]["evaluation_distinct"] == len(
            set(outputs.clusters[place][valid].tolist())
        )
        mean = outputs.rewards[place].mean()
        assert by_step[step]["evaluation_reward"] == pytest.approx(mean, abs=1e-5)
    rows = outputs.rows(lambda tokens: "-".join(map(str, tokens)))
    table = tmp_path / "outputs.parquet"
    artifacts.write_table(table, pa.table(rows), artifacts.TUNING_OUTPUTS)
    assert artifacts.read_table(table, artifacts.TUNING_OUTPUTS).num_rows == len(rows["step"])
    assert len(rows["step"]) == outputs.clusters.size
    place = np.ravel_multi_index((2, 1, 3), outputs.clusters.shape)
    tokens, cluster = outputs.tokens[2, 1, 3].tolist(), outputs.clusters[2, 1, 3]
    assert (rows["step"][place], rows["history"][place], rows["cluster"][place]) == (10, 1, cluster)
    assert rows["text"][place] == "-".join(map(str, tokens))


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


def at(step, do):
    def progress(now, *_, **__):
        if now == step:
            do()

    return progress


def kill():
    raise Killed


def assert_same(one, other, found, wanted):
    assert curve(one) == curve(other)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    first, second = (saved.load_parameters(folder, NETWORK) for folder in (one, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_killed_or_stopped_run_goes_on_bit_for_bit(tmp_path):
    wanted = tune(tmp_path / "whole")
    with pytest.raises(Killed):
        tune(tmp_path / "killed", at(7, kill))
    assert_same(tmp_path / "killed", tmp_path / "whole", tune(tmp_path / "killed"), wanted)
    with pytest.raises(Preempted, match="after step 6 of 12 and is saved"):
        tune(tmp_path / "stopped", at(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    steps = []
    found = tune(tmp_path / "stopped", lambda step, *_, **__: steps.append(step))
    assert steps[0] == 7
    assert_same(tmp_path / "stopped", tmp_path / "whole", found, wanted)


def test_eight_devices_give_what_one_gives(tmp_path):
    mesh = partitioning.make_mesh(data=4, fsdp=2)
    tune(tmp_path / "one", steps=2)
    tune(tmp_path / "eight", steps=2, make_mesh=lambda: mesh)
    for one, eight in zip(curve(tmp_path / "one"), curve(tmp_path / "eight"), strict=True):
        assert one == pytest.approx(eight, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kl_weight=-0.1), r"kl_weight is -0.1; it must be a number from 0 on"),
        (dict(kl_weight=0.0, method="direct_preference"), "kl_weight is 0.0; .* above 0"),
        (dict(method="ppo"), "method is 'ppo'; .* policy_gradient, direct_preference"),
        (dict(decoding="greedy"), "decoding is 'greedy'; it must be one of free, constrained"),
        (dict(samples_per_prompt=1), "samples_per_prompt is 1; .* whole number from 2 on"),
        (
            dict(samples_per_prompt=3, method="direct_preference"),
            "samples_per_prompt is 3; it must be an even number",
        ),
        (dict(prompts_per_step=0), "prompts_per_step is 0; .* whole number from 1 on"),
        (dict(steps=0), "steps is 0; .* whole number from 1 on"),
        (dict(evaluate_every=0), "evaluate_every is 0"),
        (dict(temperature=0.0), "temperature is 0.0; it must be a number above 0"),
        (dict(learning_rate=float("nan")), "learning_rate is nan; it must be a number above 0"),
        (dict(seed=-1), "seed is -1; it must be a whole number from 0 on"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, message):
    with pytest.raises(InputError, match=f"policy_gradient.PolicyGradient.{message}"):
        PolicyGradient(**settings)


def test_prompts_that_cannot_be_dealt_out_are_refused(tmp_path):
    with pytest.raises(InputError, match="PolicyGradient.prompts_per_step is 9; .* multiple of 8"):
        tune(tmp_path, make_mesh=partitioning.make_mesh, prompts_per_step=9)
