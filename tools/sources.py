"""What `dump-ir` shows: a model that a factory makes, an architecture of transformers, an exported program, or IR text."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from stagecut.ir.bindings import Bindings
from stagecut.ir.errors import InputError, StagecutError, nearest
from stagecut.ir.graph import Program
from stagecut.ir.parser import parse
from stagecut.ir.verifier import verify


@dataclass
class Source:
    """A program, and for a model what it is bound to and the flat inputs of the example call."""

    program: Program
    bindings: Bindings | None = None
    inputs: list[Any] | None = None

    @property
    def is_model(self) -> bool:
        """False for text, which may have been through any pass."""
        return self.bindings is not None


def load(options: Namespace) -> Source:
    """The source that the command line names. Raises InputError when there is no such thing, or it does not work."""
    source: str = options.source
    if source == "-":
        return Source(_checked(parse(sys.stdin.read(), "<stdin>")))
    if source.endswith(".ir"):
        return Source(_checked(parse(_read(Path(source)), source)))
    if source.endswith(".pt2"):
        return _exported(Path(source), options.trust)
    if source.startswith("hf:"):
        from stagecut.tools.hugging_face import make

        model, args, kwargs = _guard(lambda: make(source[3:], options), f"making '{source}'")
        return _traced(model, args, kwargs, options.leaf)
    path, colon, name = source.rpartition(":")
    if not colon or not name or not path:
        raise InputError(
            f"'{source}' is neither FILE.py:FACTORY, pkg.mod:FACTORY, hf:NAME, FILE.pt2 nor FILE.ir", hint="dump-ir model.py:make"
        )
    model, args, kwargs = _call(_factory(path, name), source)
    return _traced(model, args, kwargs, options.leaf)


def _checked(program: Program) -> Program:
    verify(program)
    return program


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None


def _exported(path: Path, trusted: bool) -> Source:
    if not path.is_file():
        raise InputError(f"there is no file '{path}'")
    if not trusted:
        raise InputError(
            f"'{path}' is an exported program: torch.export.load unpickles what is inside, and a pickle can run any code",
            hint="--trust, if you know who made it",
        )
    import torch

    import stagecut.frontend.markers  # noqa: F401  the op of pipe_split

    exported = _guard(lambda: torch.export.load(path), f"loading '{path}'")
    args, kwargs = exported.example_inputs or ((), {})
    return _traced(exported, args, kwargs)


def _traced(module: Any, args: Any, kwargs: Any, leaves: Sequence[str] = ()) -> Source:
    from stagecut.pipe import lower

    program, bindings, _ = lower(module, args, kwargs, leaf_modules=leaves)
    inputs = bindings.call.flatten(args, kwargs) if bindings.call is not None else list(args)
    return Source(program, bindings, inputs)


def _factory(path: str, name: str) -> Callable[[], Any]:
    module = _module_of_file(Path(path)) if path.endswith(".py") else _import(path)
    factory = getattr(module, name, None)
    if factory is None:
        known = [n for n, item in vars(module).items() if callable(item) and not n.startswith("_")]
        raise InputError(f"'{path}' has no factory '{name}'", hint=nearest(name, known))
    if not callable(factory):
        raise InputError(f"'{name}' in '{path}' is no callable", hint="it must return (module, args, kwargs)")
    made: Callable[[], Any] = factory
    return made


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file '{path}'")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    _guard(lambda: spec.loader.exec_module(module), f"importing '{path}'")  # type: ignore[union-attr]
    return module


def _import(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    module: ModuleType = _guard(lambda: importlib.import_module(name), f"importing '{name}'")
    return module


def _call(factory: Callable[[], Any], source: str) -> tuple[Any, Any, Any]:
    made = _guard(factory, f"calling '{source}'")
    if not isinstance(made, tuple) or len(made) != 3:
        count = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise InputError(f"'{source}' returned a {type(made).__name__}{count}", hint="it must return (module, args, kwargs)")
    return made


def _guard(action: Callable[[], Any], doing: str) -> Any:
    """The result of the user's code; what it raises becomes an error that points at its line."""
    try:
        with redirect_stdout(sys.stderr):  # what users' code prints is no part of what we show
            return action()
    except StagecutError:
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{doing} failed: {type(error).__name__}: {error}", where=f"{frame.filename}:{frame.lineno}: {frame.line}"
        ) from None


def settings(given: list[str]) -> dict[str, Any]:
    """What `--config` says: files of JSON, and KEY=VALUE, the later ones first."""
    found: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        found |= {key: _literal(value)} if equals else _json(Path(item))
    return found


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"'{path}' is no JSON: {error}") from None
    if not isinstance(made, dict):
        raise InputError(f"'{path}' holds {type(made).__name__}, not the settings of a config")
    return made
