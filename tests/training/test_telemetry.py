"""What a run tells of itself is counted right, whatever the clock says."""

import json
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from recexplore.distributed import devices
from recexplore.training import telemetry
from recexplore.training.telemetry import Curves, Meter

# clu brings warnings of its own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(telemetry.time, "perf_counter", clock)
    return clock


def batch(lengths, width, **more):
    return {"tokens": np.zeros((len(lengths), width)), "lengths": np.array(lengths), **more}


def test_speed_is_what_was_counted_over_the_time_it_took(clock):
    meter = Meter(flops_per_step=600, peak_flops=1000.0, devices=8, times=2.0)
    clock.now += 1.0
    meter.count(batch([3, 5], 8), waited=0.25)
    clock.now += 3.0
    meter.count(batch([8, 0], 8), waited=0.75)
    assert meter.read() == {
        "timing/seconds": 4.0,
        "timing/steps_per_second": 2 / 4.0,
        "timing/seqs_per_second": 2 * (2 + 2) / 4.0,
        "timing/target_tokens_per_second": 2 * (3 + 5 + 8) / 4.0,
        "timing/target_tokens_per_second_per_core": 2 * (3 + 5 + 8) / 4.0 / 8,
        "timing/model_flops_utilization": 2 * 600 / 4.0 / 1000,
        "timing/data_wait_fraction": (0.25 + 0.75) / 4.0,
        "padding_fraction": 1 - (3 + 5 + 8) / (4 * 8),
    }


def test_reading_starts_over_and_so_does_what_is_no_step(clock):
    meter = Meter(600, 1000.0)
    meter.count(batch([8], 8), waited=5.0)
    clock.now += 10.0
    meter.read()
    clock.now += 50.0  # an evaluation
    meter.restart()
    clock.now += 2.0
    meter.count(batch([4], 8), waited=1.0)
    found = meter.read()
    assert found["timing/steps_per_second"] == 0.5
    assert found["padding_fraction"] == 0.5
    assert found["timing/data_wait_fraction"] == 0.5


def test_no_steps_have_no_speed(clock):
    """The first step isn't counted, because it compiles."""
    meter = Meter(600, 1000.0)
    clock.now += 10.0
    assert meter.read() == {}
    meter.count(batch([4], 8), waited=0.0)
    clock.now += 2.0
    assert meter.read()["timing/steps_per_second"] == 0.5


def test_pairs_and_packed_rows_count_all_their_tokens(clock):
    meter = Meter(1, 1.0)
    pairs = {"other_tokens": np.zeros((2, 8)), "other_lengths": np.array([2, 2])}
    meter.count(batch([3, 5], 8, **pairs), waited=0.0)
    clock.now += 1.0
    found = meter.read()
    assert found["timing/target_tokens_per_second"] == 12
    assert found["padding_fraction"] == 1 - 12 / 32
    packed = {"tokens": np.zeros((2, 16)), "lengths": np.array([[5, 4, 3], [16, 0, 0]])}
    meter.count(packed, waited=0.0)
    clock.now += 1.0
    assert meter.read()["padding_fraction"] == 1 - 28 / 32


def written(folder):
    return [json.loads(line) for line in (folder / telemetry.CURVES).read_text().splitlines()]


def test_curves_are_cut_back_to_the_step_that_a_run_goes_on_from(tmp_path):
    first = Curves(tmp_path / "model", start=0)
    for step in (10, 20, 30):
        first.write(step, {"loss": 1.0 / step})
    first.close()
    path = tmp_path / "model" / telemetry.CURVES
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')  # the kill came in the middle of a line
    second = Curves(tmp_path / "model", start=20)
    assert [line["step"] for line in written(tmp_path / "model")] == [10, 20]
    second.write(25, {"loss": 0.5, "accuracy": 0.25})
    # A line is there as soon as it is written, for whoever watches.
    assert written(tmp_path / "model")[-1] == {"step": 25, "loss": 0.5, "accuracy": 0.25}
    second.close()
    assert [line["loss"] for line in written(tmp_path / "model")] == [0.1, 0.05, 0.5]
    assert list((tmp_path / "model").glob("events.out.tfevents*"))
    assert not list((tmp_path / "model").glob("*.tmp"))


def test_a_run_from_the_start_begins_a_new_curve(tmp_path):
    for value in (1.0, 2.0):
        curves = Curves(tmp_path, start=0)
        curves.write(10, {"loss": value})
        curves.close()
    assert written(tmp_path) == [{"step": 10, "loss": 2.0}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    curves = Curves(tmp_path / "model", start=0)
    curves.write(10, {"loss": 1.0})
    curves.close()
    assert not (tmp_path / "model").exists()


def chips(kind, count, platform="tpu"):
    """As much of so many devices as is asked about."""
    return [Mock(jax.Device, device_kind=kind, platform=platform) for _ in range(count)]


@pytest.mark.parametrize(
    ("kind", "teraflops", "gigabytes"),
    [  # as their makers' pages have them
        ("TPU v4", 275, 32),
        ("TPU v5 lite", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA H100 80GB HBM3", 989, 80),
    ],
)
def test_published_peaks_add_up(kind, teraflops, gigabytes):
    assert devices.peak_flops(chips(kind, 4)) == 4 * teraflops * 1e12
    assert devices.PUBLISHED[kind].memory == gigabytes << 30


def test_clocks_are_those_that_the_matrix_units_reach_their_peak_with():
    """Units of 128 × 128 (v6e: 256 × 256) multiply and add once a cycle each."""
    units = {"TPU v4": 8, "TPU v5 lite": 4, "TPU v5": 8, "TPU v6 lite": 4}
    for kind, count in units.items():
        peak, side = devices.PUBLISHED[kind], 256 if kind == "TPU v6 lite" else 128
        assert peak.flops == pytest.approx(count * 2 * side**2 * peak.clock, rel=0.01)


def test_where_nothing_is_published_it_is_measured_once_for_cores_that_are_shared(monkeypatch):
    monkeypatch.setattr(devices, "_measured_flops", lambda: 7e9)
    assert devices.peak_flops(chips("cpu", 8, "cpu")) == 7e9
    assert devices.peak_flops(chips("some new chip", 8, "gpu")) == 8 * 7e9
    assert devices.peak_flops(chips("TPU v4", 1) + chips("some new chip", 1)) == 2 * 7e9


def test_a_measured_rate_is_one_that_a_computer_can_have():
    assert 1e8 < devices._measured_flops(size=256, repeats=2) < 1e14
