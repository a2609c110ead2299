"""The sources that `dump-ir` shows: a model that a factory makes, an architecture of transformers, an
exported program, or IR text.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import sys
import sysconfig
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import InputError, StagecutError, nearest
from stagecut.ir.graph import Program
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.text.parser import parse
from stagecut.passes.fold_blocks import unfold


@dataclass
class Source:
    """A program, and for a model its bindings, the flat inputs of the example call, and the notes of
    tracing. `is_model` is False for text, which may have been through any pass. `is_kept` is True where the
    program is from the cache.
    """

    program: Program
    bindings: Bindings | None = None
    inputs: list[Any] | None = None
    notes: Sequence[str] = ()
    is_model: bool = False
    is_kept: bool = False


_FORMS = "FILE.py:FACTORY, pkg.mod:FACTORY, hf:NAME, FILE.pt2, FILE.ir or - for text"


def load(options: Namespace) -> Source:
    """The source that the command line names. Raises InputError when there is no such source, or it does not
    work.
    """
    source: str = options.source
    if source == "-":
        return Source(_checked(parse(_standard_input(), "<stdin>")))
    if os.path.isdir(source):
        raise InputError(f"'{source}' is a directory", hint=_in_directory(Path(source)))
    if source.endswith(".ir"):
        return text_file(source)
    if source.endswith(".pt2"):
        return _exported(Path(source), options.trust)
    if source.startswith("hf:") and source != "hf:":
        from stagecut.tools.dump_ir.hugging_face import make

        model, args, kwargs = _guard(
            lambda: make(source[3:], options), f"making '{source}'"
        )
        return _traced(model, args, kwargs, options.leaf)
    path, name = _named(source)
    model, args, kwargs = _call(_factory(path, name), source)
    return _traced(model, args, kwargs, options.leaf)


def text_file(path: str) -> Source:
    """The program in a file of IR text. Raises InputError for a file that cannot be read, ParseError and
    VerifyError for text that is no program.
    """
    return Source(_checked(parse(_read(Path(path)), path)))


def _standard_input() -> str:
    if sys.stdin is None:
        raise InputError(
            "standard input is closed",
            hint="dump-ir SOURCE | dump-ir -, or name a file",
        )
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no text: {error}") from None


def _checked(program: Program) -> Program:
    verify(program)
    unfold(program)
    return program


def _read(path: Path) -> str:
    try:
        return _existing(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None


def _exported(path: Path, trusted: bool) -> Source:
    _existing(path)
    if not trusted:
        raise InputError(
            f"'{path}' is an exported program: torch.export.load unpickles what is inside, and a pickle can "
            "run any code",
            hint="--trust, if you know who made it",
        )
    import torch

    import stagecut.frontend.markers  # noqa: F401  the op of pipe_split

    exported = _guard(lambda: torch.export.load(path), f"loading '{path}'")
    args, kwargs = exported.example_inputs or ((), {})
    return _traced(exported, args, kwargs)


def _traced(module: Any, args: Any, kwargs: Any, leaves: Sequence[str] = ()) -> Source:
    from stagecut.frontend.capture.quiet import quiet_torch
    from stagecut.pipe import lower
    from stagecut.unwrapped import unwrapped

    with quiet_torch():
        model = unwrapped(module)
        program, bindings, _ = lower(model, args, kwargs, leaf_modules=leaves)
    inputs = (
        bindings.call.flatten(args, kwargs) if bindings.call is not None else list(args)
    )
    return Source(program, bindings, inputs, bindings.notes, is_model=True)


# --- the factory ----------------------------------------------------------------------------------


def _named(source: str) -> tuple[str, str]:
    """The file or module, and the factory in it. Raises InputError that lists functions where none is
    named.
    """
    path, _, name = source.rpartition(":") if ":" in source else (source, "", "")
    is_module = path.endswith(".py") or all(
        part.isidentifier() for part in path.split(".")
    )
    if is_module and name:
        return path, name
    file = _file_of(path) if is_module else None
    if file is None:
        what = f"'{source}' is no SOURCE" if source else "SOURCE is empty"
        raise InputError(f"{what}: it must be {_FORMS}", hint=_way_to_show(source))
    raise InputError(
        f"'{source}' names no function that makes the model",
        where=str(file),
        hint=_factories_in(path, file),
    )


_TEXT = re.compile(r"(\s|#.*\n)*program @")
"""The beginning of IR text."""
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


def _way_to_show(source: str) -> str:
    """A hint for what is no source: how a file of that kind is shown."""
    if not os.path.isfile(source):
        return "dump-ir model.py:make"
    path = Path(source)
    if path.suffix in _WEIGHTS:
        return "weights have no code: name the function that makes the model, model.py:make"
    try:
        start = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "dump-ir model.py:make"
    if _TEXT.match(start):
        text_file = shlex.quote(source)
        return f"this is IR text: call it {path.with_suffix('.ir')}, or dump-ir - < {text_file}"
    if path.suffix == ".json" and '"model_type"' in start:
        return f"this is a config of transformers: dump-ir hf:NAME --config {shlex.quote(source)}"
    return "dump-ir model.py:make"


def _file_of(path: str) -> Path | None:
    """The source of a Python file or of a module, None where there is no such module. Raises InputError for a
    file that is not there.
    """
    if path.endswith(".py"):
        return _existing(Path(path))
    sys.path.insert(0, os.getcwd())
    spec = _guard(lambda: _spec_of(path), f"looking for '{path}'")
    return (
        Path(spec.origin)
        if spec is not None and spec.origin and spec.origin.endswith(".py")
        else None
    )


def _spec_of(name: str) -> ModuleSpec | None:
    """The spec of a module, after the packages around it are imported. None where one of them or the module
    does not exist.
    """
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    raise InputError(f"there is no file '{path}'", hint=_files_like(path))


def _files_like(path: Path) -> str:
    """A hint with the files beside a path that end as it does."""
    try:
        files = sorted(path.parent.glob(f"*{path.suffix}"))
    except OSError:
        return ""
    if not files:
        return f"no file in '{path.parent}' ends in {path.suffix}"
    return nearest(str(path), map(str, files), 1)


def _factories_in(path: str, file: Path) -> str:
    """A hint with the functions of a file that take no arguments; the file is not run."""
    try:
        body = ast.parse(_read(file)).body
    except (SyntaxError, ValueError):
        body = []
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    names = [
        function.name
        for function in functions
        if not function.name.startswith("_") and _needs_nothing(function.args)
    ]
    if not names:
        return (
            "write a function without arguments there that returns (module, args, kwargs), and name it: "
            f"{path}:make"
        )
    return " or ".join(f"{path}:{name}" for name in names[:MOST_NAMED])


def _needs_nothing(parameters: ast.arguments) -> bool:
    """True where all parameters have defaults."""
    return (
        len(parameters.args) == len(parameters.defaults)
        and None not in parameters.kw_defaults
    )


MOST_NAMED = 8
"""At most so many functions of a file, or files of a directory, are named."""


def _in_directory(path: Path) -> str:
    """A hint with the files of a directory that can be shown."""
    if path.suffix == ".pt2":
        return "torch.export.save writes one file"
    suffixes = (".py", ".ir", ".pt2")
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    shown = [
        f"{file}:FACTORY" if file.suffix == ".py" else str(file)
        for file in files[:MOST_NAMED]
    ]
    return " or ".join(shown) if shown else f"name a file: {path / 'model.py'}:make"


def _factory(path: str, name: str) -> Callable[[], Any]:
    module = _module_of_file(Path(path)) if path.endswith(".py") else _import(path)
    factory = getattr(module, name, None)
    if factory is None:
        functions = [
            function
            for function, value in vars(module).items()
            if callable(value)
            and not function.startswith("_")
            and getattr(value, "__module__", None) == module.__name__
        ]
        raise InputError(
            f"'{path}' has no factory '{name}'", hint=nearest(name, functions)
        )
    if not callable(factory):
        raise InputError(
            f"'{name}' in '{path}' is no callable",
            hint="it must return (module, args, kwargs)",
        )
    return cast(Callable[[], Any], factory)


def _module_of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, _existing(path))
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    _guard(lambda: spec.loader.exec_module(module), f"importing '{path}'")  # type: ignore[union-attr]
    return module


def _import(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    module: ModuleType = _guard(
        lambda: importlib.import_module(name), f"importing '{name}'"
    )
    return module


def _call(factory: Callable[[], Any], source: str) -> tuple[Any, Any, Any]:
    where = _definition(factory)
    needed = _required(factory)
    if needed:
        raise InputError(
            f"'{source}' takes arguments: {', '.join(needed)}",
            where=where,
            hint="it is called without any: give them defaults",
        )
    call = _guard(factory, f"calling '{source}'")
    if not isinstance(call, tuple) or len(call) != 3:
        count = f" of {len(call)}" if isinstance(call, tuple) else ""
        raise InputError(
            f"'{source}' returned a {type(call).__name__}{count}",
            where=where,
            hint="it must return (module, args, kwargs), the model and the arguments of one call of it; "
            "dump-ir cuts it",
        )
    return call


def _required(factory: Callable[[], Any]) -> list[str]:
    """The parameters that a call must give; none where they are not known."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _definition(factory: Callable[[], Any]) -> str:
    """file:line: source of a function or class, '' where it is not known."""
    try:
        lines, first = inspect.getsourcelines(inspect.unwrap(factory))
        return f"{inspect.getsourcefile(inspect.unwrap(factory))}:{first}: {lines[0].strip()}"
    except (OSError, TypeError):
        return ""


# --- the user's code ------------------------------------------------------------------------------


def _guard(action: Callable[[], Any], doing: str) -> Any:
    """The result of the user's code. An error that it raises becomes one that points at the user's line."""
    try:
        # output of users' code is no part of our output
        with redirect_stdout(sys.stderr):
            return action()
    except StagecutError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
        raise InputError(
            f"{doing} failed: {type(error).__name__}: {error.msg}", where=where
        ) from None
    except (Exception, SystemExit) as error:
        hint = _module_hint(error) if isinstance(error, ModuleNotFoundError) else ""
        raise InputError(
            f"{doing} failed: {type(error).__name__}: {error}",
            where=_users_line(error),
            hint=hint,
        ) from None


def _module_hint(error: ModuleNotFoundError) -> str:
    """A hint with the modules of the working folder whose names are like that of one that is missing."""
    beside = nearest(error.name or "", [path.stem for path in Path().glob("*.py")])
    is_like = beside.startswith("did you mean")
    return beside if is_like else "install it, or put its folder on PYTHONPATH"


_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STANDARD = sysconfig.get_path("stdlib") + os.sep


def _users_line(error: BaseException) -> str:
    """The innermost line that is neither ours nor Python's, preferably not an installed package's; '' for
    none.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.exists(frame.filename) and not frame.filename.startswith(_OWN)
    ]
    installed = [frame for frame in frames if _is_installed(frame.filename)]
    own = [
        frame
        for frame in frames
        if frame not in installed and not frame.filename.startswith(_STANDARD)
    ]
    if not own and not installed:
        return ""
    frame = (own or installed)[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


def _is_installed(file: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def settings(config: list[str]) -> dict[str, Any]:
    """The settings of `--config`: files of JSON, and KEY=VALUE, later ones override earlier ones."""
    chosen: dict[str, Any] = {}
    for text in config:
        key, equals, value = text.partition("=")
        chosen |= {key: _parsed(value)} if equals else _json(Path(text))
    return chosen


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"'{path}' is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(
            f"'{path}' holds {type(data).__name__}, not the settings of a config"
        )
    return data
