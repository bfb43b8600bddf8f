"""The commands that scripts/tpu_vm.sh shows and runs."""

import re
import shlex
import shutil
import subprocess

import pytest
from fake_cloud import SCRIPTS, FakeCloud
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WHERE = ["--zone=us-central2-b", "--project=lab"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
TPU_VM = ["gcloud", "compute", "tpus", "tpu-vm"]
QUOTED = r"'--gin.PATH='\''/a b'\'''"
DESCRIBE = [
    [*QUEUED, "describe", "mine", *WHERE, "--format=value(state.state)"],
    [*TPU_VM, "describe", "mine", *WHERE, "--format=value(state,health)"],
]


def on(workers: str, command: str) -> list[str]:
    return [*TPU_VM, "ssh", "mine", f"--worker={workers}", *WHERE, f"--command={command}"]


def creation(accelerator: str, runtime_version: str, *more: str) -> list[str]:
    types = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime_version}"]
    return [*QUEUED, "create", "mine", "--node-id=mine", *WHERE, *types, *more]


@pytest.fixture
def cloud(tmp_path):
    return FakeCloud(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        (["create", "--accelerator", "v4-32"], [creation("v4-32", "tpu-ubuntu2204-base")]),
        (
            ["create", "--accelerator=v5litepod-16", "--spot"],
            [creation("v5litepod-16", "v2-alpha-tpuv5-lite", "--spot")],
        ),
        (
            ["create", "--accelerator=v5p-32", "--reserved", "--network=n", "--subnetwork", "s"]
            + ["--internal_ips", "--service_account=a@b"],
            [
                creation("v5p-32", "v2-alpha-tpuv5", "--reserved", "--network=n")
                + ["--subnetwork=s", "--service-account=a@b", "--internal-ips"]
            ],
        ),
        (
            ["create", "--accelerator=v9-8", "--runtime_version=new", "--", "--labels=team=a b"],
            [creation("v9-8", "new", "--labels=team=a b")],
        ),
        (["status"], DESCRIBE),
        (["status", "--wait"], DESCRIBE),
        (
            ["run", "--", "recexplore", "train", "--gin.PATH='/a b'"],
            [on("all", f"bash recexplore/tpu_worker.sh run recexplore train {QUOTED}")],
        ),
        (["logs"], [on("0", "bash recexplore/tpu_worker.sh logs 40 0")]),
        (
            ["logs", "--worker", "all", "--lines", "7", "--follow"],
            [on("all", "bash recexplore/tpu_worker.sh logs 7 1")],
        ),
        (["stop"], [on("all", "bash recexplore/tpu_worker.sh stop 600 0")]),
        (
            ["stop", "--seconds=9", "--kill"],
            [on("all", "bash recexplore/tpu_worker.sh stop 9 1")],
        ),
        (["delete"], [[*QUEUED, "delete", "mine", *WHERE, "--force"]]),
        (["delete", "--yes"], [[*QUEUED, "delete", "mine", *WHERE, "--force", "--quiet"]]),
    ],
)
def test_a_dry_run_shows_the_exact_commands_and_needs_no_gcloud(cloud, arguments, commands):
    verb, *rest = arguments
    (cloud.folder / "bin/gcloud").unlink()
    result = cloud.launch(verb, "--dry_run", *rest)
    assert (result.returncode, result.stderr) == (0, "")
    assert [shlex.split(line) for line in result.stdout.splitlines()] == commands


def test_setup_copies_what_is_committed_to_all_workers(cloud):
    archive = cloud.commit()
    result = cloud.launch("setup", "--dry_run", "--internal_ips")
    inside = [*WHERE, "--internal-ip"]
    ssh = [*TPU_VM, "ssh", "mine", "--worker=all", *inside]
    files = [f"dist/{archive}", "scripts/tpu_worker.sh", "mine:recexplore/"]
    assert [shlex.split(line) for line in result.stdout.splitlines()] == [
        ["mkdir", "-p", "dist"],
        ["git", "archive", "--format=tar.gz", f"--output=dist/{archive}", "HEAD"],
        [*ssh, "--command=mkdir -p recexplore"],
        [*TPU_VM, "scp", *files, "--worker=all", *inside],
        [*ssh, f"--command=bash recexplore/tpu_worker.sh setup {archive}"],
    ]
    assert not (cloud.root / "dist").exists()
    (cloud.root / "scripts/environment.sh").write_text("")
    assert "isn't committed" in cloud.launch("setup", "--dry_run").stderr


@pytest.mark.parametrize(
    "words",
    [
        ["recexplore", "train", "--gin.MOVIELENS_DIR='/data/ml'", "--workdir", "/mnt/a b"],
        ["bash", "-c", "echo \"$HOME\" | grep -v 'x' > /tmp/y && exit 3; `id`"],
        ["", "'", "''", "\\", "*", "a\nb", "two  spaces", "--dry_run", "é", "#", "~", "!"],
    ],
)
def test_words_arrive_at_the_worker_as_they_were_given(cloud, words):
    worker = cloud.homes[0] / "recexplore/tpu_worker.sh"
    worker.parent.mkdir()
    worker.write_text('printf "%s\\0" "$@"')
    result = cloud.launch("run", "--", *words)
    assert result.returncode == 0 and result.stdout.split("\0")[:-1] == ["run", *words]
    (called,) = cloud.calls()
    assert shlex.split(result.stderr) == ["gcloud", *called]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_any_words_survive_the_quoting_for_two_shells(cloud, words):
    result = cloud.launch("run", "--dry_run", "--", *words)
    command = shlex.split(result.stdout)[-1].removeprefix("--command=")
    assert shlex.split(command)[3:] == words


def test_the_commands_shown_are_the_commands_run(cloud):
    cloud.launch("create", "--accelerator=v6e-8", "--spot")
    cloud.launch("delete", "--yes")
    create, delete = cloud.calls()
    assert ["gcloud", *create] == creation("v6e-8", "v2-alpha-tpuv6e", "--spot")
    assert ["gcloud", *delete] == [*QUEUED, "delete", "mine", *WHERE, "--force", "--quiet"]


def test_settings_come_from_the_environment_and_flags_win(cloud):
    result = cloud.launch(
        "create", "--dry_run", "--name=other", ACCELERATOR="v4-8", RUNTIME_VERSION="v", ZONE="z"
    )
    words = shlex.split(result.stdout)
    assert words[5] == "other" and "--node-id=other" in words
    assert {"--accelerator-type=v4-8", "--runtime-version=v", "--zone=z"} < set(words)


def test_waiting_ends_when_the_node_is_ready(cloud):
    cloud.program("sleep", f'#!/bin/sh\necho "$1" >>{cloud.folder}/slept\n')
    cloud.answers("queued-resources", ["WAITING_FOR_RESOURCES"] * 2 + ["PROVISIONING", "ACTIVE"])
    cloud.answers("tpu-vm", ["CREATING\tUNKNOWN", "READY\tHEALTHY"])
    result = cloud.launch("status", "--wait")
    assert result.stdout.splitlines() == [
        "queued resource: WAITING_FOR_RESOURCES",
        "queued resource: PROVISIONING",
        "queued resource: ACTIVE, node: CREATING UNKNOWN",
        "queued resource: ACTIVE, node: READY HEALTHY",
    ]
    assert result.returncode == 0
    assert (cloud.folder / "slept").read_text().split() == ["30"] * 4


@pytest.mark.parametrize(
    ("queued", "node"), [("FAILED", ""), ("SUSPENDED", ""), ("ACTIVE", "PREEMPTED\t")]
)
def test_waiting_ends_when_there_is_nothing_to_wait_for(cloud, queued, node):
    cloud.answers("queued-resources", [queued])
    cloud.answers("tpu-vm", [node])
    assert cloud.launch("status").returncode == 0
    result = cloud.launch("status", "--wait")
    assert result.returncode == 1 and "delete it" in result.stdout


def test_a_look_that_fails_is_not_taken_for_a_state(cloud):
    cloud.program("gcloud", "#!/bin/sh\necho NOT_FOUND >&2\nexit 5\n")
    result = cloud.launch("status", "--wait")
    assert (result.returncode, result.stdout) == (5, "")
    assert "NOT_FOUND" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "say what to do: create, status, setup, run, logs, stop or delete"),
        (["start"], {}, "there is no verb start; there are: create, status,"),
        (["logs", "--tail"], {}, "there is no flag --tail. See: scripts/tpu_vm.sh --help"),
        (["logs", "--spot"], {}, "--spot goes with create, not with logs"),
        (["logs", "all"], {}, "all isn't a flag. A command comes after --"),
        (["logs", "--worker"], {}, "--worker wants a value"),
        (["logs", "--worker", "--follow"], {}, "--worker wants a value"),
        (["logs", "--worker="], {}, "--worker wants a value"),
        (["logs", "--follow=yes"], {}, "--follow takes no value"),
        (["logs", "--worker=w1"], {}, "--worker is w1; it can be 2, a list 0,2, a range 0-3, or"),
        (["logs", "--lines=many"], {}, "--lines is many, not a whole number"),
        (["stop", "--", "now"], {}, "stop takes nothing after --"),
        (["run", "recexplore"], {}, "recexplore isn't a flag. A command comes after --"),
        (["run", "--"], {}, "nothing to run: the command comes after --"),
        (["stop"], {"TPU_NAME": ""}, "the TPU has no name: give --name, or set TPU_NAME"),
        (["stop"], {"ZONE": ""}, "no zone: give --zone, or set ZONE"),
        (["stop"], {"PROJECT": ""}, "no project: give --project, or set PROJECT"),
        (["stop"], {"INTERNAL_IPS": "yes"}, "INTERNAL_IPS is yes, not 0 or 1"),
        (["create"], {}, "no accelerator type: give --accelerator, or set ACCELERATOR"),
        (
            ["create", "--accelerator=v9-8"],
            {},
            "no usual software is known for v9-8: give --runtime_version",
        ),
        (
            ["create", "--accelerator=v4-8", "--spot", "--reserved"],
            {},
            "--spot and --reserved exclude each other",
        ),
        (["setup"], {}, "isn't a git repository with a commit"),
    ],
)
def test_bad_input_is_said_in_words(cloud, arguments, environment, message):
    environment = {"GIT_CEILING_DIRECTORIES": str(cloud.folder), **environment}
    result = cloud.launch(*arguments, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith("tpu_vm.sh: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert not cloud.calls()


def test_a_missing_gcloud_is_said_in_words(cloud):
    (cloud.folder / "empty").mkdir()
    result = cloud.launch("stop", PATH=str(cloud.folder / "empty"))
    assert result.returncode == 2
    assert "gcloud isn't on the path. Install the Google Cloud CLI" in result.stderr


def test_help_names_every_verb_and_flag(cloud):
    text = cloud.launch("--help").stdout
    assert text == cloud.launch("stop", "--help").stdout
    script = (SCRIPTS / "tpu_vm.sh").read_text()
    table = script[script.index("verb_of() {") : script.index("parse() {")]
    flags = set(re.findall(r"--\w+", table))
    assert len(flags) >= 15
    for name in [*flags, "create", "status", "setup", "run", "logs", "stop", "delete"]:
        assert f" {name}" in text


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck isn't installed")
def test_shellcheck_finds_nothing():
    scripts = ["scripts/tpu_vm.sh", "scripts/tpu_worker.sh"]
    command = ["shellcheck", "--external-sources", *scripts]
    found = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
