"""Training learns, resumes bit for bit, and stops in words."""

import dataclasses
import logging
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copying_task import CONFIG, TRIE, Copying, curve, run, some_batch

from recexplore.distributed import digests, partitioning
from recexplore.distributed.checkpoints import Checkpoints
from recexplore.errors import InputError, Preempted
from recexplore.models import saved
from recexplore.models.transformer import Transformer
from recexplore.training import objectives

# clu and orbax bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_training_learns_and_the_best_parameters_can_be_loaded(tmp_path):
    result = run(tmp_path)
    assert result.best_validation < 0.3 < curve(tmp_path)[(10, "loss")]
    model = Transformer(CONFIG)
    params = saved.load_parameters(tmp_path, model)
    sums = objectives.constrained_description_loss(
        model, params, jax.tree.map(jnp.asarray, TRIE), jax.tree.map(jnp.asarray, some_batch())
    )
    assert float(sums.loss / sums.weight) == pytest.approx(result.best_validation, rel=1e-4)


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


def killed_at(step):
    def kill(now):
        if now == step:
            raise Killed

    return Copying(before=kill)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", data=killed_at(37))
    resumed = run(tmp_path / "killed")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert resumed == whole
    model = Transformer(CONFIG)
    first, second = (saved.load_parameters(tmp_path / n, model) for n in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(tmp_path):
    def terminate(now):
        if now == 33:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    whole = run(tmp_path / "whole")
    with pytest.raises(Preempted, match="after step 34 of 60 and is saved"):
        run(tmp_path / "stopped", data=Copying(before=terminate))
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "stopped" / "checkpoints" / "34").is_dir()
    steps = []
    resumed = run(tmp_path / "stopped", data=Copying(before=steps.append))
    assert steps[0] == 34
    assert resumed == whole
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_a_second_sigterm_does_not_cut_short_what_the_first_one_saves(tmp_path, monkeypatch):
    def terminate(now):
        if now == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    close = Checkpoints.close

    def close_when_told_again(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Checkpoints, "close", close_when_told_again)
    with pytest.raises(Preempted):
        run(tmp_path, data=Copying(before=terminate))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def largest_file(checkpoint):
    """Where most of its numbers are."""
    files = [file for file in (checkpoint / "state").rglob("d/*") if file.is_file()]
    return max(files, key=lambda file: (file.stat().st_size, file))


def overwrite(file):
    content = file.read_bytes()
    file.write_bytes(content[:300] + bytes(byte ^ 255 for byte in content[300:600]) + content[600:])


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "isn't what was written": overwrite,
    "bytes, not": truncate,
    "is missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_with_one_line(words, tmp_path, caplog, capfd):
    with pytest.raises(Killed):
        run(tmp_path, data=killed_at(50))
    damaged = tmp_path / "checkpoints" / "40"
    file = largest_file(damaged)
    DAMAGES[words](file)
    steps = []
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        run(tmp_path, data=Copying(before=steps.append))
    (said,) = caplog.messages
    assert said.startswith(f"Checkpoint {damaged} is damaged and left out (")
    assert str(file.relative_to(damaged)) in said and words in said
    assert "Traceback" not in capfd.readouterr().err
    assert steps[0] == 20  # the one before it
    assert not digests.find_damage(damaged)  # it was made again


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_checkpoint_is_never_used(words, tmp_path):
    best = run(tmp_path, steps=20).best_step
    damaged = tmp_path / "checkpoints" / str(best)
    DAMAGES[words](largest_file(damaged))
    message = rf"^{damaged} is damaged \(state/.*{words}.*\). Remove {tmp_path} and run"
    with pytest.raises(InputError, match=message):
        saved.load_parameters(tmp_path, Transformer(CONFIG))


def test_a_checkpoint_that_cannot_be_compared_is_left_out(tmp_path, caplog):
    with pytest.raises(Killed):
        run(tmp_path, data=killed_at(50))
    damaged = tmp_path / "checkpoints" / "20"  # not the best, but who could tell
    (damaged / "metrics" / "metrics").write_bytes(b"")
    with pytest.raises(InputError, match=r"20 is damaged \(metrics/metrics has 0 bytes"):
        saved.load_parameters(tmp_path, Transformer(CONFIG))
    steps = []
    with caplog.at_level(logging.WARNING):
        run(tmp_path, data=Copying(before=steps.append))
    assert steps[0] == 40 and not caplog.messages  # none needed to look at the older one


def test_a_checkpoint_whose_digests_were_never_written_counts(tmp_path, caplog):
    with pytest.raises(Killed):
        run(tmp_path, data=killed_at(50))
    for file in (tmp_path / "checkpoints" / "40").glob("digests*"):
        file.unlink()
    steps = []
    with caplog.at_level(logging.WARNING):
        run(tmp_path, data=Copying(before=steps.append))
    assert steps[0] == 40 and not caplog.messages


def test_damage_that_only_the_reader_of_arrays_finds_is_told_too(tmp_path, caplog):
    with pytest.raises(Killed):
        run(tmp_path, data=killed_at(50))
    damaged = tmp_path / "checkpoints" / "40"
    for file in [*damaged.glob("digests*"), *(damaged / "state").rglob("*")]:
        if file.is_file():
            file.write_bytes(b"") if file.parent != damaged else file.unlink()
    steps = []
    with caplog.at_level(logging.WARNING):
        run(tmp_path, data=Copying(before=steps.append))
    assert "40 is damaged and left out" in caplog.text
    assert steps[0] == 20


def test_an_unfinished_checkpoint_is_left_out_with_a_warning(tmp_path, caplog):
    with pytest.raises(Killed):
        run(tmp_path, data=killed_at(50))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "40").rename(checkpoints / "40.orbax-checkpoint-tmp")
    steps = []
    with caplog.at_level(logging.WARNING):
        run(tmp_path, data=Copying(before=steps.append))
    assert "40.orbax-checkpoint-tmp was never finished" in caplog.text
    assert steps[0] == 20


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    run(tmp_path, evaluate_every=10, keep_last=2, keep_best=3)
    losses = {step: x for (step, _), x in curve(tmp_path, ["validation_loss"]).items()}
    best = sorted(losses, key=losses.get)[:3]
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {50, 60, *best}


def test_trouble_of_the_machine_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run(tmp_path, data=killed_at(50))
    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.StandardCheckpointHandler.restore", _too_many_open_files)
        with pytest.raises(OSError, match="Too many open files"):
            run(tmp_path)
    assert (tmp_path / "checkpoints" / "40").is_dir()


def _too_many_open_files(*_, **__):
    raise OSError(24, "Too many open files")


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        saved.load_parameters(tmp_path, Transformer(CONFIG))


def test_a_loss_that_is_not_finite_stops_with_its_examples_and_keeps_the_checkpoint(tmp_path):
    message = (
        r"(?s)loss is (nan|inf) at step 27 \(learning rate 0.00.*examples are 2700, 2701.* 2715"
    )
    with pytest.raises(InputError, match=rf"{message}\). The checkpoint of step 20 is kept. Try"):
        run(tmp_path, data=Copying(poison_at=27))
    assert curve(tmp_path)[(20, "validation_loss")] > 0
    saved.load_parameters(tmp_path, Transformer(CONFIG))


def test_no_checkpoint_is_promised_where_there_is_none(tmp_path):
    with pytest.raises(
        InputError, match=r"at step 7 \(.*\). There is no checkpoint yet. Try a low"
    ):
        run(tmp_path, data=Copying(poison_at=7))
    assert not [*(tmp_path / "checkpoints").iterdir()]


@pytest.mark.parametrize(
    ("sizes", "optimization"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
        ({"data": 1, "fsdp": 8}, {}),
        ({"data": 4, "fsdp": 2}, {"optimizer": "adafactor"}),
    ],
)
def test_sharded_parameters_train_like_whole_ones(tmp_path, sizes, optimization):
    data = run(tmp_path / "data", steps=20, optimization=optimization)
    mixed = run(
        tmp_path / "mixed",
        steps=20,
        optimization=optimization,
        make_mesh=lambda: partitioning.make_mesh(**sizes),
    )
    assert mixed.best_validation == pytest.approx(data.best_validation, rel=1e-3)


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "moved", data=killed_at(30))
    other = lambda: partitioning.make_mesh(data=2, fsdp=2, tensor=2)  # noqa: E731
    moved = run(tmp_path / "moved", make_mesh=other)
    assert moved.best_validation == pytest.approx(whole.best_validation, rel=1e-3)
    for key, value in curve(tmp_path / "whole").items():
        assert curve(tmp_path / "moved")[key] == pytest.approx(value, rel=2e-3), key


def test_microbatches_give_the_whole_batch_s_step(tmp_path):
    model = Transformer(dataclasses.replace(CONFIG, dropout_rate=0.0))
    whole = run(tmp_path / "whole", model=model)
    parts = run(tmp_path / "parts", model=model, optimization={"microbatches": 2})
    assert parts.best_validation == pytest.approx(whole.best_validation, rel=1e-4)


def test_adafactor_learns_with_less_state(tmp_path):
    result = run(tmp_path, optimization={"optimizer": "adafactor"})
    assert result.best_validation < 0.3


def test_without_an_average_the_parameters_themselves_are_used(tmp_path):
    result = run(tmp_path, optimization={"average_decay": 0.0})
    model = Transformer(CONFIG)
    params = saved.load_parameters(tmp_path, model)
    sums = objectives.constrained_description_loss(
        model, params, jax.tree.map(jnp.asarray, TRIE), jax.tree.map(jnp.asarray, some_batch())
    )
    assert float(sums.loss / sums.weight) == pytest.approx(result.best_validation, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "Optimization.steps is 0"),
        ({"evaluate_every": 0}, "train.evaluate_every is 0"),
        ({"log_every": -1}, "train.log_every is -1"),
        ({"keep_last": 0}, "train.keep_last is 0"),
        (
            {"make_mesh": lambda: partitioning.make_mesh(data=1, fsdp=1, tensor=8)},
            r"key.*of shape \(2, 16, 2, 8\) can't be dealt out: axis 2 doesn't divide by 8",
        ),
        ({"optimization": {"learning_rate": -1.0}}, "Optimization.learning_rate is -1.0"),
        ({"optimization": {"optimizer": "sgd"}}, "optimizer is 'sgd'.*adamw, adafactor"),
        ({"optimization": {"microbatches": 4}}, "batch_size is 16.*multiple of 32"),
        (
            {"make_mesh": lambda: partitioning.make_mesh(data=3)},
            "make_mesh has data=3, fsdp=1, tensor=1.*8 devices",
        ),
        ({"rules": (("embed", "data"), ("embed", "fsdp"))}, "map the axis 'embed' twice"),
        ({"rules": (("embed", "model"),)}, "names the mesh axis 'model'"),
    ],
)
def test_impossible_settings_are_named_before_training(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **options)


def test_the_best_checkpoint_is_the_one_with_least_of_what_it_is_chosen_by(tmp_path):
    def distance_to_a_loss_of_one(model, params, trie, batch, dropout_key=None):
        sums = objectives.constrained_description_loss(model, params, trie, batch)
        return sums._replace(loss=abs(sums.loss - sums.weight))

    result = run(tmp_path, choose_by=distance_to_a_loss_of_one, evaluate_every=5)
    found = curve(tmp_path, ["validation_loss", "validation_choice"])
    choices = {step: x for (step, name), x in found.items() if name == "validation_choice"}
    best = min(choices, key=choices.get)
    assert result.best_step == best < 60  # the loss itself is least at the end
    assert result.best_validation == choices[best]
    for step, value in choices.items():
        assert value == pytest.approx(abs(found[(step, "validation_loss")] - 1), abs=1e-5)


def test_a_run_tells_how_fast_it_is(tmp_path):
    run(tmp_path, steps=20, log_every=10)
    rates = ("steps_per_second", "seqs_per_second", "target_tokens_per_second")
    names = [f"timing/{name}" for name in ("seconds", *rates, "target_tokens_per_second_per_core")]
    names += ["timing/model_flops_utilization", "timing/data_wait_fraction", "padding_fraction"]
    found = curve(tmp_path, names)
    assert {name for _, name in found} == set(names)
    assert found[(20, "padding_fraction")] == 0
    steps, rows, tokens = (found[(20, f"timing/{name}")] for name in rates)
    assert steps * found[(20, "timing/seconds")] == pytest.approx(10)
    assert rows == pytest.approx(steps * Copying.batch_size) and tokens > rows
    own = found[(20, "timing/target_tokens_per_second_per_core")]
    assert own == pytest.approx(tokens / jax.device_count())
    assert 0 < found[(20, "timing/model_flops_utilization")] < 1
    assert 0 < found[(20, "timing/data_wait_fraction")] < 1


def test_a_profile_of_chosen_steps_is_written(tmp_path):
    run(tmp_path, steps=8, profile_from=3, profile_steps=2)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
