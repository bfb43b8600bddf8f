"""gin files are read, checked and cut up by stage without importing what they name."""

import re
import subprocess
import sys
import textwrap

import pytest

from recexplore import configuration as configuration_module
from recexplore.configuration import Configuration, call_configured
from recexplore.errors import InputError

MODULE = """
import dataclasses

def inner(size=1, factor=1.0):
    return size * factor

def typed(count: int, share: float | None = None, name: str = "", seed: int = 0):
    pass

def outer(log, make, extra=()):
    log.append(make())
    log.extend(extra)

def stage(work, progress, *, read, size=1):
    return read(work)

def failing(path):
    open(path)

@dataclasses.dataclass
class Shape:
    width: int = 1
    height: int = 1
"""


@pytest.fixture(autouse=True)
def toy_module(tmp_path, monkeypatch):
    """A module `toy` with functions to configure; forgotten again afterwards."""
    (tmp_path / "toy.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("toy", None)
    for cached in ("_module_of", "_definitions", "_arguments"):
        getattr(configuration_module, cached).cache_clear()


def write(name: str, text: str) -> str:
    header = "from __gin__ import dynamic_registration\nimport toy\n"
    with open(name, "w") as file:
        file.write(header + textwrap.dedent(text))
    return name


def test_reachable_bindings_follow_references_scopes_and_macros():
    file = write(
        "run.gin",
        """
        SIZE = 3
        toy.outer.make = @toy.inner
        toy.inner.size = %SIZE
        big/toy.inner.size = 30
        toy.Shape.width = %SIZE
        """,
    )
    run = Configuration([file])
    assert run.reachable_from("toy.outer") == {
        "toy.outer.make": "@toy.inner",
        "toy.inner.size": "3",
    }
    assert run.reachable_from("toy.outer", scope="big")["big/toy.inner.size"] == "30"
    assert run.reachable_from("toy.Shape") == {"toy.Shape.width": "3"}


def test_overrides_win_over_files_and_later_files_over_earlier_ones():
    write("first.gin", "toy.inner.size = 1\ntoy.inner.factor = 1.0\n")
    second = write("second.gin", "include 'first.gin'\ntoy.inner.size = 2\n")
    run = Configuration([second], ["toy.inner.factor = 2.5"])
    assert run.reachable_from("toy.inner") == {"toy.inner.size": "2", "toy.inner.factor": "2.5"}


def test_the_call_sees_the_scoped_values():
    file = write(
        "run.gin",
        """
        toy.outer.make = @toy.inner
        toy.outer.extra = (@big/toy.inner(), %N)
        N = 7
        toy.inner.size = 2
        big/toy.inner.size = 20
        """,
    )
    import toy

    run, log = Configuration([file]), []
    operative = call_configured(toy.outer, "", run.reachable_from("toy.outer"), log)
    assert log == [2.0, 20.0, 7]
    assert "toy.inner.size = 2" in operative
    log = []
    call_configured(toy.outer, "big", run.reachable_from("toy.outer", "big"), log)
    assert log == [20.0, 20.0, 7]


BAD = {
    "toy.inner.sise = 1": "toy.inner has no argument 'sise'. Did you mean size?",
    "toy.Shape.colour = 1": "toy.Shape has no argument 'colour'. There is: height, width.",
    "toy.iner.size = 1": "there is no iner in toy. Did you mean inner?",
    "tay.inner.size = 1": "names no module that was imported. Did you mean toy?",
    "toy.inner.size = %SISE\nSIZE = 2": "%SISE is not defined. Did you mean SIZE?",
    "SIZE = 2": "nothing uses the name SIZE.",
    "toy.inner.size = %A\nA = %B\nB = %A": "goes in a circle",
    "toy.inner.size = hello world": "can't be parsed",
    "include 'missing.gin'": "gin file missing.gin was not found",
}


@pytest.mark.parametrize("text", BAD)
def test_mistakes_are_named_with_their_place(text):
    file = write("run.gin", text + "\n")
    with pytest.raises(InputError) as error:
        Configuration([file])
    assert BAD[text] in str(error.value)


def test_a_name_whose_use_was_overridden_is_no_mistake():
    file = write("run.gin", "SIZE = 2\ntoy.inner.size = %SIZE\n")
    run = Configuration([file], ["toy.inner.size = 3"])
    assert run.value("toy.inner", "size", None) == 3


def test_a_mistake_on_the_command_line_is_shown_as_it_was_typed():
    file = write("run.gin", "toy.inner.size = 1\n")
    with pytest.raises(InputError, match=r"--gin\.toy\.inner\.sise = 2"):
        Configuration([file], ["toy.inner.sise = 2"])


def test_a_binding_that_no_stage_uses_is_an_error():
    run = Configuration([write("run.gin", "toy.outer.make = @toy.inner\ntoy.Shape.width = 2\n")])
    run.check_all_used([("toy.outer", ""), ("toy.Shape", "")])
    with pytest.raises(InputError, match="toy.Shape.width is bound but no stage of this run"):
        run.check_all_used([("toy.outer", "")])


def test_a_value_left_open_names_the_flag_that_sets_it():
    file = write("run.gin", "FOLDER = %gin.REQUIRED\ntoy.inner.size = %FOLDER\n")
    with pytest.raises(InputError, match="FOLDER must be set.*--gin.FOLDER=VALUE"):
        Configuration([file]).check_required("toy.inner")
    Configuration([file], ["FOLDER = 'here'"]).check_required("toy.inner")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("count = 1e3", r"typed.count is 1000.0; it must be int"),
        ("count = True", "typed.count is True; it must be int"),
        ("share = 'much'", r"typed.share is 'much'; it must be float or None"),
        ("name = 3", "typed.name is 3; it must be str"),
        ("seed = -1", "typed.seed is -1; it must be a whole number from 0 on"),
    ],
)
def test_values_of_the_wrong_type_are_named(binding, message):
    with pytest.raises(InputError, match=message):
        Configuration([write("run.gin", f"toy.typed.{binding}\n")])
    Configuration([write("run.gin", "toy.typed.share = 1\ntoy.typed.count = 2\n")])


@pytest.mark.parametrize("override", ["toy.inner.size = [", "toy.inner.size = b/c.csv", "X ="])
def test_an_override_that_cannot_be_parsed_is_shown(override):
    file = write("run.gin", "toy.inner.size = 1\n")
    typed = override.replace(" = ", "=", 1)
    with pytest.raises(InputError, match=f"--gin.{re.escape(typed)}"):
        Configuration([file], [override])


def test_an_argument_that_nothing_binds_is_named_before_anything_runs():
    file = write("run.gin", "toy.stage.size = 2\n")
    with pytest.raises(InputError, match="toy.stage.read is not bound"):
        Configuration([file]).check_required("toy.stage")
    bound = Configuration([file], ["toy.stage.read = @toy.failing"])
    bound.check_required("toy.stage")
    scoped = Configuration([file], ["big/toy.stage.read = @toy.failing"])
    scoped.check_required("toy.stage", "big")
    with pytest.raises(InputError, match="toy.stage.read is not bound"):
        scoped.check_required("toy.stage")


def test_files_that_include_one_another_are_an_error():
    with open("a.gin", "w") as first, open("b.gin", "w") as second:
        first.write("include 'b.gin'\n")
        second.write("include 'a.gin'\n")
    with pytest.raises(InputError, match=r"in a circle: .*a\.gin → .*b\.gin → .*a\.gin"):
        Configuration(["a.gin"])


def test_an_error_of_the_machine_comes_out_of_gin_as_it_was():
    import toy

    run = Configuration([write("run.gin", "toy.stage.read = @toy.failing\n")])
    with pytest.raises(FileNotFoundError) as error:
        call_configured(toy.stage, "", run.reachable_from("toy.stage"), "no_such_file", None)
    assert error.value.errno == 2 and error.value.filename == "no_such_file"


def test_reading_a_configuration_imports_no_jax():
    code = (
        "import sys; from recexplore.configuration import Configuration; "
        "Configuration(['runs/demo.gin']); print('jax' in sys.modules, 'ibis' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr
