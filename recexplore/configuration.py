"""gin files → one configuration, checked and cut up by stage, before anything heavy is imported.

gin alone would import every module that a run file names, TensorFlow-free but still seconds of
JAX, before it could say that nothing is left to do; it would take a mistyped macro for a new one;
and it would find a mistyped argument only when the function is first called. So the files are read
here with gin's own parser: names are resolved against the sources without importing them, macros
are replaced by their values, and each stage gets exactly the bindings that can be reached from its
function. That text is what gin then parses when the stage runs, and what says whether a stage is up
to date. This module and cli are the only ones that know gin.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
from gin import config_parser

from recexplore.errors import InputError, Preempted, SharedError, Unfinished

INSTALLED_CONFIGS = "recexplore.gin_configs"
_REQUIRED = "gin.REQUIRED"
_DYNAMIC = "__gin__.dynamic_registration"


@dataclasses.dataclass(frozen=True)
class _Reference:
    """`@scope/module.function` or, with `call`, `@scope/module.function()`."""

    scope: str
    selector: str
    call: bool


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


class _Delegate(config_parser.ParserDelegate):
    """Makes plain values of what gin's parser finds, and resolves nothing."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return _Reference(scope, selector, evaluate)

    def macro(self, macro_name):
        return _Macro(macro_name)


_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}


class _Key(NamedTuple):
    scope: str
    selector: str  # full dotted name of the function or class
    argument: str

    def __str__(self) -> str:
        return f"{self.scope}/{self.selector}.{self.argument}".lstrip("/")


class _Binding(NamedTuple):
    value: Any
    where: str


def config_folders(search_paths: Sequence[str] = ()) -> list[Path]:
    """Where gin files are looked for: the current folder, `search_paths`, the installed ones."""
    spec = importlib.util.find_spec(INSTALLED_CONFIGS)
    installed = list(spec.submodule_search_locations or []) if spec else []
    return [Path("."), *map(Path, search_paths), *map(Path, installed)]


class Configuration:
    """All bindings of a run, by full name.

    Args:
      files: gin files, looked up in `config_folders`; later ones win.
      overrides: further statements such as "clustering.cluster_items.num_clusters = 20".
      search_paths: more folders to look for gin files in.

    Raises:
      InputError: a file is missing, a line can't be parsed, or a name doesn't exist.
    """

    def __init__(
        self, files: Sequence[str], overrides: Sequence[str] = (), search_paths: Sequence[str] = ()
    ):
        self._folders = config_folders(search_paths)
        self._bindings: dict[_Key, _Binding] = {}
        self._macros: dict[str, _Binding] = {}
        self._aliases: dict[str, str] = {}
        self._used_before: set[str] = set()  # names in bindings that others have replaced
        self._open: list[Path] = []  # files being read, each included by the one before
        for file in files:
            self._read_file(file)
        for override in overrides:
            self._read_statements(override, "command line", dict(self._aliases))
        self._check_macros()
        self._check_types()

    def value(self, selector: str, argument: str, default: Any, scope: str = "") -> Any:
        """The plain value bound to an argument of a stage function, or `default`."""
        binding = self._bindings.get(_Key(scope, selector, argument))
        return default if binding is None else self._resolve(binding.value)

    def reachable_from(self, selector: str, scope: str = "") -> dict[str, str]:
        """The bindings that can affect a call of `selector`: full name → value as gin text.

        Args:
          selector: full dotted name of a stage function.
          scope: the gin scope it is called in.
        """
        found: dict[str, str] = {}
        todo, done = [(scope, selector)], set()
        while todo:
            active, name = todo.pop()
            if (active, name) in done:
                continue
            done.add((active, name))
            for key, binding in self._bindings.items():
                if key.selector != name or not _covers(key.scope, active):
                    continue
                value = self._resolve(binding.value)
                found[str(key)] = _as_gin(value)
                for reference in _references(value):
                    todo.append((reference.scope or active, reference.selector))
        return dict(sorted(found.items()))

    def check_all_used(self, roots: Sequence[tuple[str, str]]) -> None:
        """Checks that every binding can be reached from one of `roots` (selector, scope).

        Raises:
          InputError: a binding would never have any effect.
        """
        used = set()
        for selector, scope in roots:
            used.update(self.reachable_from(selector, scope))
        for key, binding in self._bindings.items():
            if str(key) not in used:
                raise InputError(
                    f"{binding.where}: {_short(key)} is bound but no stage of this run uses it "
                    f"(nothing refers to @{key.scope + '/' if key.scope else ''}"
                    f"{_short_selector(key.selector)}). Remove the line, or bind it where it is "
                    "called."
                )

    def check_required(self, selector: str, scope: str = "") -> None:
        """Checks that a stage has all the values that its run file leaves open.

        Raises:
          InputError: naming what must be set and how.
        """
        bound = self.reachable_from(selector, scope)
        module = _module_of(selector)
        node = _definitions(module)[selector[len(module) + 1 :]]
        defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        for argument in [a.arg for a, default in defaults if default is None]:
            if not {str(_Key(s, selector, argument)) for s in ("", scope)} & bound.keys():
                raise InputError(
                    f"{_short_selector(selector)}.{argument} is not bound. A run file includes "
                    "pipeline.gin, a file of models/ and one of data/; add the missing one with "
                    "--gin_file."
                )
        for name, text in self.reachable_from(selector, scope).items():
            if f"%{_REQUIRED}" in text:
                macros = [m for m, b in self._macros.items() if _is_required(b.value)]
                names = [m for m in macros if self._mentions(name, m)] or [_short_name(name)]
                raise InputError(
                    f"{names[0]} must be set: the run file leaves it open on purpose. Add "
                    f"--gin.{names[0]}=VALUE to the command, or set it in a gin file of your own."
                )

    def _mentions(self, name: str, macro: str) -> bool:
        return any(
            str(key) == name and macro in _macro_names(binding.value)
            for key, binding in self._bindings.items()
        )

    def _read_file(self, name: str) -> None:
        for folder in self._folders:
            path = folder / name
            if path.is_file():
                if path in self._open:
                    circle = " → ".join(str(p) for p in [*self._open, path])
                    raise InputError(f"gin files include one another in a circle: {circle}.")
                try:
                    text = path.read_text(encoding="utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{path} is not UTF-8 text ({error}).") from error
                self._open.append(path)
                self._read_statements(text, str(path), {})
                self._open.pop()
                return
        looked = ", ".join(str(folder.resolve()) for folder in self._folders)
        raise InputError(f"gin file {name} was not found. Looked in: {looked}.")

    def _read_statements(self, text: str, source: str, aliases: dict[str, str]) -> None:
        try:
            for statement in config_parser.ConfigParser(text, _Delegate()):
                self._read_statement(statement, source, aliases)
        except (SyntaxError, ValueError, tokenize.TokenError) as error:
            if isinstance(error, InputError):
                raise
            if source == "command line":
                raise InputError(
                    f"--gin.{text.replace(' = ', '=', 1)} can't be parsed. Strings need quotes "
                    "inside the shell's own, for instance --gin.NAME=\"'text'\"."
                ) from error
            line = f" line {error.lineno}" if getattr(error, "lineno", None) else ""
            reason = str(getattr(error, "msg", None) or error).strip().splitlines()[0]
            raise InputError(
                f"{source}{line} can't be parsed: {reason}. Is it a gin file?"
            ) from error

    def _read_statement(self, statement: Any, source: str, aliases: dict[str, str]) -> None:
        where = f"{source}:{statement.location.line_num}"
        if source == "command line":
            where = f"--gin.{statement.location.line_content.strip()}"
        if isinstance(statement, config_parser.IncludeStatement):
            self._read_file(statement.filename)
        elif isinstance(statement, config_parser.ImportStatement):
            if statement.module != _DYNAMIC:
                name = statement.bound_name()
                aliases[name] = statement.module if statement.alias or statement.is_from else name
                self._aliases[name] = aliases[name]
        elif isinstance(statement, config_parser.BindingStatement):
            self._bind(statement, where, aliases)

    def _bind(self, statement: Any, where: str, aliases: dict[str, str]) -> None:
        value = _qualify(statement.value, where, aliases)
        if not statement.arg_name:
            name = "/".join(part for part in (statement.scope, statement.selector) if part)
            self._macros[name] = _Binding(value, where)
            return
        selector = _full_name(statement.selector, where, aliases)
        arguments = _arguments(selector)
        if arguments is not None and statement.arg_name not in arguments:
            raise InputError(
                f"{where}: {_short_selector(selector)} has no argument "
                f"{statement.arg_name!r}.{_suggest(statement.arg_name, arguments)}"
            )
        key = _Key(statement.scope, selector, statement.arg_name)
        if key in self._bindings:
            self._used_before.update(_macro_names(self._bindings[key].value))
        self._bindings[key] = _Binding(value, where)

    def _check_macros(self) -> None:
        used = set()
        everything = [*self._bindings.values(), *self._macros.values()]
        for binding in everything:
            for name in _macro_names(binding.value):
                used.add(name)
                if name != _REQUIRED and name not in self._macros:
                    raise InputError(
                        f"{binding.where}: %{name} is not defined.{_suggest(name, self._macros)}"
                    )
        for name, binding in self._macros.items():
            if name not in used | self._used_before:
                raise InputError(
                    f"{binding.where}: nothing uses the name {name}.{_suggest(name, sorted(used))} "
                    "(A binding is written module.function.argument = value.)"
                )
            self._resolve(binding.value)

    def _check_types(self) -> None:
        for key, binding in self._bindings.items():
            value = self._resolve(binding.value)
            if isinstance(value, (_Macro, _Reference)):
                continue
            wanted = _annotations(key.selector).get(key.argument, "").split(" | ")
            if not set(wanted) <= _TYPES.keys():
                continue
            fits = isinstance(value, tuple(_TYPES[name] for name in wanted)) and (
                "bool" in wanted or not isinstance(value, bool)
            )
            if not fits or (key.argument == "seed" and value < 0):
                rule = "a whole number from 0 on" if key.argument == "seed" else " or ".join(wanted)
                raise InputError(f"{binding.where}: {_short(key)} is {value!r}; it must be {rule}.")

    def _resolve(self, value: Any, seen: tuple[str, ...] = ()) -> Any:
        def resolve(leaf: Any) -> Any:
            if not isinstance(leaf, _Macro) or leaf.name == _REQUIRED:
                return leaf
            if leaf.name in seen:
                circle = " → ".join([*seen, leaf.name])
                raise InputError(f"{self._macros[leaf.name].where}: {circle} goes in a circle.")
            return self._resolve(self._macros[leaf.name].value, (*seen, leaf.name))

        return _map_leaves(resolve, value)


def gin_text(bindings: dict[str, str]) -> str:
    """A gin file with `bindings` (as from `reachable_from`), importing all that it names."""
    modules = set()
    for name, text in bindings.items():
        selectors = [name.rpartition("/")[2].rpartition(".")[0]]
        selectors += [r.selector for r in _references(_parse_value(text))]
        modules.update(_module_of(selector) for selector in selectors)
    lines = ["from __gin__ import dynamic_registration", *(f"import {m}" for m in sorted(modules))]
    return "\n".join([*lines, "", *(f"{name} = {text}" for name, text in bindings.items()), ""])


def call_configured(function: Callable, scope: str, bindings: dict[str, str], *args: Any) -> str:
    """Calls `function(*args)` with `bindings` in force; returns gin's operative configuration.

    Raises:
      InputError: gin refuses a binding, or an argument without default is left unset.
    """
    gin.clear_config()
    try:
        gin.parse_config(gin_text(bindings))
    except (ValueError, TypeError, AttributeError, ImportError, SyntaxError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"The gin configuration of {function.__name__}: {reason}") from error
    name = f"{function.__module__}.{function.__qualname__}"
    if any(key.rpartition("/")[2].startswith(f"{name}.") for key in bindings):
        function = gin.get_configurable(function)
    with gin.config_scope(scope or None):
        try:
            function(*args)
        except (InputError, Preempted, Unfinished) as error:
            # gin adds a trail of calls, which is of no use to a person.
            kinds = (SharedError, InputError, Preempted, Unfinished)
            kind = next(kind for kind in kinds if isinstance(error, kind))
            raise kind(str(error).partition("\n  In call to configurable")[0]) from error
        except OSError as error:  # gin's copy of it has forgotten its number and its file
            cause = error
            while cause is not None and getattr(cause, "errno", None) is None:
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None
    return gin.operative_config_str()


def _covers(binding_scope: str, active: str) -> bool:
    return not binding_scope or f"{active}/".startswith(f"{binding_scope}/")


def _is_required(value: Any) -> bool:
    return isinstance(value, _Macro) and value.name == _REQUIRED


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {_map_leaves(function, k): _map_leaves(function, item) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_leaves(function, item) for item in value)
    return function(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _map_leaves(found.append, value)
    return found


def _references(value: Any) -> list[_Reference]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, _Reference)]


def _macro_names(value: Any) -> list[str]:
    return [leaf.name for leaf in _leaves(value) if isinstance(leaf, _Macro)]


def _as_gin(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_as_gin(k)}: {_as_gin(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_gin, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_as_gin, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, _Reference):
        scope = f"{value.scope}/" if value.scope else ""
        return f"@{scope}{value.selector}{'()' if value.call else ''}"
    if isinstance(value, _Macro):
        return f"%{value.name}"
    return repr(value)


def _parse_value(text: str) -> Any:
    return config_parser.ConfigParser(text, _Delegate()).parse_value()


def _qualify(value: Any, where: str, aliases: dict[str, str]) -> Any:
    def qualify(leaf: Any) -> Any:
        if not isinstance(leaf, _Reference):
            return leaf
        return dataclasses.replace(leaf, selector=_full_name(leaf.selector, where, aliases))

    return _map_leaves(qualify, value)


def _full_name(selector: str, where: str, aliases: dict[str, str]) -> str:
    first, _, rest = selector.partition(".")
    full = f"{aliases[first]}.{rest}" if first in aliases and rest else selector
    module, name = _module_of(full), full
    if module is None:
        raise InputError(
            f"{where}: {selector} names no module that was imported."
            f"{_suggest(first, aliases)} A gin file names a function as module.function and "
            "imports the module first, for instance `from recexplore.interests import clustering`."
        )
    name = full[len(module) + 1 :]
    if "." in name or name not in _definitions(module):
        raise InputError(
            f"{where}: there is no {name} in {module}.{_suggest(name, _definitions(module))}"
        )
    return full


@functools.cache
def _module_of(selector: str) -> str | None:
    """The longest prefix of `selector` that is a module; imports parent packages only."""
    parts = selector.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.origin:
            return name
    return None


@functools.cache
def _definitions(module: str) -> dict[str, ast.AST]:
    """The functions and classes that a module's source defines or imports at its top level."""
    spec = importlib.util.find_spec(module)
    if not spec.origin.endswith(".py"):
        return {}
    found: dict[str, ast.AST] = {}
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            found.update({(a.asname or a.name).partition(".")[0]: node for a in node.names})
        elif isinstance(node, ast.Assign):
            found.update({t.id: node for t in node.targets if isinstance(t, ast.Name)})
    return found


@functools.cache
def _annotations(selector: str) -> dict[str, str]:
    """The annotations of a function's arguments, or of a class's fields, as text."""
    module = _module_of(selector)
    node = _definitions(module).get(selector[len(module) + 1 :])
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return {n.target.id: ast.unparse(n.annotation) for n in fields}
    if not isinstance(node, ast.FunctionDef):
        return {}
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation is not None}


@functools.cache
def _arguments(selector: str) -> tuple[str, ...] | None:
    """The argument names of a function, or a class's fields; None where only a call can tell."""
    module = _module_of(selector)
    node = _definitions(module).get(selector[len(module) + 1 :])
    if isinstance(node, ast.ClassDef):
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not init:
            fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
            return tuple(fields) if node.decorator_list or fields else None
        node = init[0]
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg:
        return None
    return tuple(a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])


def _suggest(name: str, choices: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]}?"
    shown = ", ".join(sorted(choices)[:12])
    return f" There is: {shown}." if shown else ""


def _short_selector(selector: str) -> str:
    """module.function, as run files write it."""
    return ".".join(selector.split(".")[-2:])


def _short(key: _Key) -> str:
    scope = f"{key.scope}/" if key.scope else ""
    return f"{scope}{_short_selector(key.selector)}.{key.argument}"


def _short_name(name: str) -> str:
    scope, _, rest = name.rpartition("/")
    selector, _, argument = rest.rpartition(".")
    return _short(_Key(scope, selector, argument))
