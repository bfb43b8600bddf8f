"""A stage runs when it must, says so when it needn't, and never takes what isn't up to date."""

import json
import os
from pathlib import Path

import pytest

from recexplore.configuration import Configuration
from recexplore.errors import InputError
from recexplore.progress import Progress
from recexplore.workdir import Stage, WorkDirectory

RAN = []


class Lines(Progress):
    """Remembers what was said instead of printing it."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def make(work, progress, *, source="", number=1):
    RAN.append("make")
    if number == "x":
        raise InputError("no good")
    (work / "made").mkdir(exist_ok=True)
    (work / "made" / "data.txt").write_text(str(number))


def use(work, progress, *, factor=1):
    RAN.append("use")
    number = int((work / "made" / "data.txt").read_text())
    (work / "used.json").write_text(json.dumps(number * factor))


def learn(work, progress, model, *, steps=3):
    RAN.append(f"learn {model}")
    done = work / model / "done.txt"
    before = int(done.read_text()) if done.exists() else 0
    done.write_text(str(before + 1))
    if before + 1 < steps:
        raise RuntimeError("killed")


STAGES = [
    Stage("make", make, (), ("made",)),
    Stage("use", use, ("made",), ("used.json",)),
    Stage("learn", learn, ("made",), ("big",), model="big", resumes=True),
]
MAKE, USE, LEARN = STAGES


@pytest.fixture(autouse=True)
def forget():
    RAN.clear()


def work_directory(folder, *bindings):
    (folder / "run.gin").write_text(
        "from __gin__ import dynamic_registration\nimport test_workdir\n"
        + "".join(f"test_workdir.{binding}\n" for binding in bindings)
    )
    return WorkDirectory(folder / "W", STAGES, Configuration([str(folder / "run.gin")]))


def run(work, stage, **options):
    lines = Lines()
    with work.locked():
        work.run(stage, lines, **options)
    return lines.lines


def test_a_second_run_does_nothing_and_says_so_in_one_line(tmp_path):
    run(work_directory(tmp_path, "make.number = 2"), MAKE)
    assert run(work_directory(tmp_path, "make.number = 2"), MAKE) == ["make: up to date"]
    assert RAN == ["make"]


def test_a_new_checkpoint_in_a_folder_that_a_binding_names_is_noticed(tmp_path):
    (tmp_path / "T" / "checkpoint_10").mkdir(parents=True)
    (tmp_path / "T" / "config.gin").write_text("")
    binding = f"make.source = '{tmp_path}/T'"
    run(work_directory(tmp_path, binding), MAKE)
    (tmp_path / "T" / "others").mkdir()
    assert run(work_directory(tmp_path, binding), MAKE) == ["make: up to date"]
    (tmp_path / "T" / "checkpoint_20").mkdir()
    assert "what it reads has changed" in run(work_directory(tmp_path, binding), MAKE)[0]
    os.utime(tmp_path / "T" / "checkpoint_20", (1, 1))  # another of the same name
    assert "what it reads has changed" in run(work_directory(tmp_path, binding), MAKE)[0]
    assert RAN == ["make"] * 3


def test_the_operative_configuration_lies_beside_folders_and_files(tmp_path):
    work = work_directory(tmp_path, "make.number = 2", "use.factor = 5")
    run(work, MAKE)
    run(work, USE)
    assert "make.number = 2" in (tmp_path / "W/made/config.gin").read_text()
    assert "use.factor = 5" in (tmp_path / "W/used.config.gin").read_text()


def test_another_configuration_is_refused_with_the_difference_and_keeps_what_is_there(tmp_path):
    run(work_directory(tmp_path, "make.number = 2"), MAKE)
    with pytest.raises(InputError, match=r"test_workdir.make.number was 2, now 3.*--overwrite"):
        run(work_directory(tmp_path, "make.number = 3"), MAKE)
    assert (tmp_path / "W/made/data.txt").read_text() == "2"
    run(work_directory(tmp_path, "make.number = 3"), MAKE, overwrite=True)
    assert (tmp_path / "W/made/data.txt").read_text() == "3"


def test_what_follows_from_a_remade_stage_is_made_again(tmp_path):
    first = work_directory(tmp_path, "make.number = 2")
    run(first, MAKE)
    run(first, USE)
    second = work_directory(tmp_path, "make.number = 3")
    with pytest.raises(InputError, match="made, which use reads, is not up to date"):
        run(second, USE)
    run(second, MAKE, overwrite=True)
    assert "what it reads has changed" in run(second, USE)[0]
    assert json.loads((tmp_path / "W/used.json").read_text()) == 3


def test_what_another_version_made_is_made_again(tmp_path, monkeypatch):
    run(work_directory(tmp_path, "make.number = 2"), MAKE)
    monkeypatch.setattr("recexplore.__version__", "99.0")
    with pytest.raises(InputError, match="recexplore was 0.*, now 99.0.*--overwrite"):
        run(work_directory(tmp_path, "make.number = 2"), MAKE)
    again = work_directory(tmp_path, "make.number = 2")
    run(again, MAKE, overwrite=True)
    assert run(again, MAKE) == ["make: up to date"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_a_damaged_record_counts_as_none(tmp_path, content):
    work = work_directory(tmp_path, "make.number = 2")
    run(work, MAKE)
    work.record_path(MAKE).write_text(content)
    assert "not made yet" in run(work, MAKE)[0]
    assert run(work, MAKE) == ["make: up to date"]


def test_a_stage_that_fails_keeps_what_it_had_made_before(tmp_path, monkeypatch):
    work = work_directory(tmp_path, "make.number = 2")
    run(work, MAKE)
    with pytest.raises(InputError, match="no good"):
        run(work_directory(tmp_path, "make.number = 'x'"), MAKE, overwrite=True)
    assert run(work_directory(tmp_path, "make.number = 2"), MAKE) == ["make: up to date"]


@pytest.mark.parametrize("damage", ["remove", "shorten", "scribble"])
def test_a_missing_or_shortened_artefact_is_made_again(tmp_path, damage):
    work = work_directory(tmp_path, "make.number = 22")
    run(work, MAKE)
    data = tmp_path / "W/made/data.txt"
    data.unlink() if damage == "remove" else data.write_text("2" if damage == "shorten" else "23")
    assert "gone or was changed" in run(work, MAKE)[0]
    assert data.read_text() == "22"


@pytest.mark.parametrize("named", ["'{}'", "('other', '{}')", "{{'log': ['{}']}}", "'duckdb://{}'"])
def test_a_changed_source_file_makes_the_stage_run_again(tmp_path, named):
    folder = tmp_path / "d[1]"
    folder.mkdir()
    source = folder / "log.csv"
    source.write_text("1")
    binding = f"make.source = {named.format(source)}"
    run(work_directory(tmp_path, binding), MAKE)
    assert run(work_directory(tmp_path, binding), MAKE) == ["make: up to date"]
    source.write_text("1,2")
    assert "what it reads has changed" in run(work_directory(tmp_path, binding), MAKE)[0]


def test_an_interrupted_stage_that_resumes_goes_on_with_the_same_recipe_only(tmp_path):
    work = work_directory(tmp_path, "make.number = 1")
    run(work, MAKE)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            run(work, LEARN)
    assert (tmp_path / "W/big/done.txt").read_text() == "2"
    other = work_directory(tmp_path, "make.number = 1", "learn.steps = 1")
    with pytest.raises(InputError, match="learn.steps was not set, now 1.*--overwrite"):
        run(other, LEARN)
    assert (tmp_path / "W/big/done.txt").read_text() == "2"
    run(other, LEARN, overwrite=True)
    assert (tmp_path / "W/big/done.txt").read_text() == "1"


def test_two_runs_on_one_work_directory_are_refused(tmp_path):
    work = work_directory(tmp_path, "make.number = 1")
    with work.locked():
        with pytest.raises(InputError, match="in use by another recexplore run"):
            with work.locked():
                pass


def test_a_work_directory_that_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="can't be made"):
        run(WorkDirectory(Path("/proc/none"), STAGES, Configuration([])), MAKE)


def test_a_file_as_work_directory_is_refused(tmp_path):
    (tmp_path / "W").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        run(work_directory(tmp_path, "make.number = 1"), MAKE)
