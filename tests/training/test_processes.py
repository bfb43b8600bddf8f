"""Real processes that train as one program, and how they find each other."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from copying_task import curve

from recexplore.distributed.processes import find_others
from recexplore.errors import InputError

PROGRAM = Path(__file__).parent / "two_processes.py"


def start(folder, count, devices, steps=30):
    """`count` processes with so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    others = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, folder, str(devices), str(steps)],
            env=os.environ | ({**others, "JAX_PROCESS_ID": str(i)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def ended(running):
    outputs = [process.communicate(timeout=300)[0] for process in running]
    return [process.returncode for process in running], "\n".join(outputs)


def test_two_processes_train_as_one_and_their_checkpoints_fit_any_number(tmp_path):
    codes, output = ended(start(tmp_path / "one", 1, 4))
    assert codes == [0], output
    codes, output = ended(start(tmp_path / "two", 2, 2, steps=30))
    assert codes == [0, 0], output
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 33
    assert two == pytest.approx(one, rel=1e-5)


def test_damage_that_one_process_sees_is_left_out_by_both(tmp_path):
    codes, output = ended(start(tmp_path, 2, 2))
    assert codes == [0, 0], output
    checkpoint = tmp_path / "checkpoints" / "30"
    assert {path.name for path in checkpoint.glob("digests*")} == {
        "digests.process_0.json",
        "digests.process_1.json",
    }
    files = (checkpoint / "state" / "ocdbt.process_1" / "d").iterdir()
    file = max(files, key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes(byte ^ 255 for byte in content[100:200]) + content[200:])
    codes, output = ended(start(tmp_path, 2, 2, steps=32))
    assert codes == [0, 0], output
    assert output.count("30 is damaged and left out (state/ocdbt.process_1/d/") == 1
    assert output.count("30: another process can't read it") == 1
    assert "Traceback" not in output
    assert output.count("step 20\n") == 2 and "step 19\n" not in output


def test_killed_while_it_saves_a_run_goes_on_bit_for_bit(tmp_path):
    codes, output = ended(start(tmp_path / "whole", 1, 2))
    assert codes == [0], output
    for _ in range(2):
        (running,) = start(tmp_path / "killed", 1, 2)
        while running.poll() is None and not [*tmp_path.glob("killed/checkpoints/*tmp*")]:
            time.sleep(0.001)
        running.kill()
        ended([running])
    codes, output = ended(start(tmp_path / "killed", 1, 2))
    assert codes == [0], output
    names = ("loss", "accuracy", "gradient_norm", "validation_loss")
    assert curve(tmp_path / "killed", names) == curve(tmp_path / "whole", names)


def test_sigterm_to_one_of_two_stops_both_and_one_goes_on_alone(tmp_path):
    running = start(tmp_path, 2, 2, steps=2000)
    for line in running[0].stdout:
        if line.strip() == "step 15":
            running[1].send_signal(signal.SIGTERM)
            break
    codes, output = ended(running)
    assert codes == [143, 143], output
    assert "is saved" in output
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 15 <= saved < 2000
    codes, output = ended(start(tmp_path, 1, 4, steps=saved + 2))
    assert codes == [0], output
    assert f"step {saved}\n" in output and "step 14\n" not in output


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"JAX_PLATFORMS": "cpu"}, None),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "4",
                "JAX_PROCESS_ID": "3",
            },
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3},
        ),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "1"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a batch script, not a step
    ],
)
def test_how_processes_find_each_other(environment, found):
    assert find_others({"JAX_PLATFORMS": "cpu"} | environment) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID is not"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID is 2; with JAX_NUM_PROCESSES=2 it must lie in 0..1",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "'two'.*whole numbers",
        ),
    ],
)
def test_a_contradictory_environment_is_named(environment, message):
    with pytest.raises(InputError, match=message):
        find_others(environment)
