"""Who may import whom: the import statements, read against the table in docs/architecture.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "recexplore"
ROOMS = {
    "errors": set(),
    "artifacts": {"errors"},
    "progress": set(),
    "interactions": {"errors", "artifacts"},
    "interests": {"errors", "artifacts", "interactions"},
    "feedback": {"errors", "artifacts", "interactions", "interests"},
    "tasks": {"errors", "artifacts", "interactions", "interests", "feedback"},
    "distributed": {"errors"},
    "models": {"errors", "distributed"},
    "explorer": {"errors", "artifacts", "interests", "tasks", "models", "inference"},
    "export": {"errors", "artifacts", "tasks", "models", "explorer"},
    "inference": {"errors", "models"},  # never training
    "training": {"errors", "distributed", "models", "inference"},  # a policy is tuned on draws
    "aot": {"errors", "distributed", "models", "training", "inference"},
    "serving": {"errors", "artifacts", "models", "inference"},
    "serve": {"errors", "artifacts", "progress", "interests", "planning", "serving"},
    "simulation": {"errors", "artifacts", "interactions"},
    "evaluation": {"errors", "artifacts", "interests", "serving", "simulation", "feedback"},
    "planning": {"interests", "items", "serving"},
    "precompute": {
        *("errors", "artifacts", "progress", "interests", "tasks", "models"),
        *("distributed", "explorer", "inference", "serving"),
    },
    "held_out": {
        *("errors", "progress", "tasks", "evaluation", "explorer", "feedback", "inference"),
    },
    "items": {
        *("errors", "artifacts", "progress", "interests", "feedback", "tasks"),
        *("distributed", "models", "serving", "evaluation"),
    },
    "configuration": {"errors"},
    "workdir": {"errors", "artifacts", "configuration", "distributed", "progress"},
}
STAGES = {*ROOMS, "experiments", "closed_loop"}
EVERYTHING = {*STAGES, "checks", "pipeline", "cli"}
ROOMS |= {
    "experiments": STAGES,
    "closed_loop": STAGES,
    "checks": STAGES | {"adapters"},  # whether a checkpoint to be taken is there
    "pipeline": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
    "adapters": {  # nobody else imports them
        *("errors", "artifacts", "interests", "tasks", "distributed", "models", "training"),
        *("explorer", "pipeline"),
    },
}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "seqio", "clu"}
MAY_IMPORT_TENSORFLOW = {
    "tasks/seqio_tasks.py",  # SeqIO is TensorFlow
    "tasks/seqio_vocabulary.py",
    "tasks/item_tasks.py",
    "tasks/example_stream.py",  # runs its tasks
    "interactions/movielens.py",  # tensorflow_datasets, inside the one reader that needs it
    "training/telemetry.py",  # clu's TensorBoard writer, when training starts
    "adapters/t5x.py",  # T5X is TensorFlow too
    "adapters/t5x_data.py",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_the_table_allows(path):
    room = _room(path)
    modules = {m for m in _imported_modules(path) if m.startswith("recexplore.")}
    imported = {m.split(".")[1] for m in modules} & {*ROOMS}
    assert room == "__init__" or imported <= ROOMS[room] | {room}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tensorflow_and_gin_are_imported_where_they_belong_and_nowhere_else(path):
    imported = {name.split(".")[0] for name in _imported_modules(path)}
    if str(path.relative_to(PACKAGE)) not in MAY_IMPORT_TENSORFLOW:
        assert not imported & TENSORFLOW
    if _room(path) != "configuration":
        assert "gin" not in imported


def test_every_room_is_in_the_table():
    rooms = {_room(path) for path in FILES} - {"__init__"}
    assert rooms <= set(ROOMS)
