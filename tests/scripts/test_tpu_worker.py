"""What happens on the workers (here: folders): set-up, a job's life, its log and its end."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from fake_cloud import FakeCloud

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("flock", "setsid")),
    reason="flock and setsid, which every Linux has, aren't installed",
)

# Installs no more than the two programs that set-up looks for.
UV = """\
#!/bin/sh
echo "$PWD: $*" >>"$HOME/uv"
case "$1" in
  venv) for folder; do :; done; mkdir -p "$folder/bin"; program=python ;;
  pip) folder=../environment; program=recexplore ;;
esac
printf '#!/bin/sh\\necho %s "$@"\\n' "$program" >"$folder/bin/$program"
chmod +x "$folder/bin/$program"
"""
# A program that saves upon SIGTERM, as training does.
TRAINING = "trap 'echo saved; exit 7' TERM; echo \"training $0\"; while :; do sleep 0.02; done"


@pytest.fixture
def cloud(tmp_path):
    made = FakeCloud(tmp_path, num_workers=2)
    made.program("uv", UV)
    (made.root / "setup.py").write_text("first\n")
    (made.root / "pyproject.toml").write_text("")
    (made.root / "gone later.py").write_text("")
    made.commit()
    assert made.launch("setup").returncode == 0
    yield made
    for home in made.homes:
        pid = home / "recexplore/job/pid"
        if pid.exists():
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass


def logged(cloud, worker: int) -> str:
    return (cloud.homes[worker] / "recexplore/job/log").read_text()


def wait_for(text: str, cloud, workers=(0, 1)) -> None:
    for worker in workers:
        for _ in range(500):
            if text in logged(cloud, worker):
                break
            time.sleep(0.02)
        else:
            raise AssertionError(logged(cloud, worker))


def test_setup_installs_on_every_worker_and_replaces_only_what_it_brought(cloud):
    for home in cloud.homes:
        assert (home / "recexplore/source/setup.py").read_text() == "first\n"
        venv, pip = (home / "uv").read_text().splitlines()
        assert venv.endswith("source: venv --quiet --python 3.11 ../environment")
        python = home / "recexplore/environment/bin/python"
        assert pip.endswith(f"source: pip install --quiet --python {python} --editable .[tpu]")
        (home / "recexplore/source/made by a job").write_text("kept")
    (cloud.root / "gone later.py").unlink()
    (cloud.root / "setup.py").write_text("second\n")
    archive = cloud.commit()
    result = cloud.launch("setup")
    assert result.stdout.count(f"ready: {archive.removesuffix('.tar.gz')}, ") == 2
    for home in cloud.homes:
        source = home / "recexplore/source"
        assert (source / "setup.py").read_text() == "second\n"
        assert (source / "made by a job").read_text() == "kept"
        assert not (source / "gone later.py").exists()
        assert len((home / "uv").read_text().splitlines()) == 3  # the environment is still there


def test_a_job_goes_on_without_the_connection_and_saves_when_stopped(cloud):
    job = ["bash", "-c", TRAINING, "it's one"]
    result = cloud.launch("run", "--", *job)
    assert result.returncode == 0 and result.stdout.count("] started\n") == 2
    wait_for("\ntraining it's one\n", cloud)

    again = cloud.launch("run", "--", *job)
    assert again.returncode == 0
    assert again.stdout.count("this command is running already") == 2
    other = cloud.launch("run", "--", "recexplore", "train")
    assert other.returncode == 1 and "another job is running: bash -c trap" in other.stderr
    longer = cloud.root / "scripts/tpu_worker.sh"  # is copied over the one that runs
    longer.write_text(longer.read_text() + "touch read-on\n" * 9)
    refused = cloud.launch("setup")
    assert refused.returncode == 1 and "Stop it first: tpu_vm.sh stop" in refused.stderr
    assert "the job is running" in cloud.launch("logs").stdout

    stopped = cloud.launch("stop")
    assert stopped.returncode == 0
    assert stopped.stdout.count("the job has ended with status 7") == 2
    for worker in (0, 1):
        first, *_, saved, ended = logged(cloud, worker).splitlines()
        assert first.endswith("Z bash -c " + TRAINING + " it's one")
        assert saved == "saved" and ended.endswith("ended with status 7")
        assert not list(cloud.homes[worker].rglob("read-on"))


def test_the_same_command_goes_on_in_the_same_log(cloud):
    for count in (1, 2):
        assert cloud.launch("run", "--", "sh", "-c", "exit 3").returncode == 0
        wait_for("ended with status 3", cloud)
        while logged(cloud, 0).count("ended with status 3") < count:
            time.sleep(0.02)
    seen = cloud.launch("logs", "--worker=0", "--lines=1").stdout.splitlines()
    assert len(seen) == 2 and seen[0].endswith("ended with status 3")
    assert seen[1].endswith("] the job has ended with status 3")


def test_a_job_finds_the_environment_and_the_sources(cloud):
    cloud.launch("run", "--", "recexplore", "train", "--gin.A='b c'")
    wait_for("\nrecexplore train --gin.A='b c'\n=== ", cloud)
    show = 'echo "$JAX_PLATFORMS $PYTHONUNBUFFERED $PWD"'
    while "running" in cloud.launch("logs", "--worker=all").stdout:
        time.sleep(0.02)
    cloud.launch("run", "--", "env", "JAX_PLATFORMS=cpu", "sh", "-c", show)
    wait_for(f"\ncpu 1 {cloud.homes[0]}/recexplore/source\n", cloud, [0])


def test_following_ends_with_the_job(cloud):
    cloud.launch("run", "--", "bash", "-c", TRAINING)
    wait_for("\ntraining", cloud)
    follow = subprocess.Popen(
        cloud.command("logs", "--worker=all", "--follow"),
        env=cloud.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert follow.stdout.readline().startswith("[")
    cloud.launch("stop")
    rest, _ = follow.communicate(timeout=20)
    assert rest.count("] saved\n") == 2
    assert rest.count("] the job has ended with status 7\n") == 2


def test_a_job_that_does_not_end_is_killed_only_when_asked(cloud):
    deaf = "trap '' TERM; echo deaf; while :; do sleep 0.02; done"
    cloud.launch("run", "--", "bash", "-c", deaf)
    wait_for("\ndeaf\n", cloud)
    result = cloud.launch("stop", "--seconds=0")
    assert result.returncode == 1
    assert "hasn't ended within 0 seconds" in result.stderr
    result = cloud.launch("stop", "--seconds=0", "--kill")
    assert result.returncode == 0
    assert result.stdout.count("the job is gone without a status") == 2


def test_what_is_not_there_is_said(tmp_path):
    cloud = FakeCloud(tmp_path)
    worker = cloud.homes[0] / "recexplore"
    worker.mkdir()
    shutil.copy(cloud.root / "scripts/tpu_worker.sh", worker)
    result = cloud.launch("run", "--", "recexplore")
    assert result.returncode == 1 and "isn't set up here" in result.stderr
    result = cloud.launch("logs")
    assert result.returncode == 1 and "no job has been started here yet" in result.stderr
    assert "no job is running" in cloud.launch("stop").stdout
