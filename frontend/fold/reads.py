"""Records what the code of a block reads while it is traced, besides its arguments, parameters and buffers:
attributes of its modules, globals, closures, classes.
"""

from __future__ import annotations

import dis
import gc
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import nn

from stagecut.frontend.fold.values import Shared, Unknown, Values
from stagecut.frontend.source import TORCH_DIR, is_users_file
from stagecut.frontend.watch.attributes import SIMPLE

_ABSENT = "absent"
_NOT_ITS_OWN = ("torch", "builtins")

Block = dict[str, nn.Module]
"""The modules of a block by their paths in it; the block itself is ''."""


class Reads:
    """The attributes of the modules of a block, and the variables around its code, that its trace reads."""

    def __init__(self) -> None:
        self.attributes: dict[tuple[str, str], None] = {}
        self.variables: dict[tuple[int, str], dict[str, Any]] = {}
        """Globals of a function by their id, and a name in them -> these globals."""
        self.names: dict[str, None] = {}
        """The names of all attributes that the user's code reads of whatever object."""
        self.odd = ""
        """Something that the code did after which no call of it stands for another one; '' for nothing."""

    def includes(self, other: Reads) -> bool:
        """True when all that `other` has read is here too."""
        return (
            other.attributes.keys() <= self.attributes.keys()
            and other.variables.keys() <= self.variables.keys()
            and other.names.keys() <= self.names.keys()
        )

    def add(self, other: Reads) -> None:
        """All that `other` has read is here too."""
        self.attributes |= other.attributes
        self.variables |= other.variables
        self.names |= other.names

    def values(self, block: Block, shared: Shared) -> Any:
        """What the code would read in a call of this block now. Raises Unknown where that cannot be told."""
        paths = {id(module): path for path, module in block.items()}
        values = Values(paths, shared)
        found: list[Any] = []
        for path, name in self.attributes:
            found.append(_attribute(block[path], name, values))
        for (_, name), home in self.variables.items():
            found.append(self._variable(home, name, values))
        classes = dict.fromkeys(
            cls for module in block.values() for cls in type(module).__mro__
        )
        found += [values.of(cls) for cls in classes if not _is_foreign(cls)]
        return found

    def _variable(self, home: dict[str, Any], name: str, values: Values) -> Any:
        value = home.get(name, _ABSENT)
        if not isinstance(value, types.ModuleType) or not _is_users(value):
            return values.of(value)
        # of a module only what code asks it for
        inside = vars(value)
        return id(value), [
            values.of(inside[part]) for part in self.names if part in inside
        ]

    # --- while the code runs ----------------------------------------------------------------------

    @contextmanager
    def noting(self, block: Block) -> Iterator[None]:
        """While open, what the code reads is noted."""
        paths = {id(module): path for path, module in block.items()}
        own_set, own_delete = nn.Module.__setattr__, nn.Module.__delattr__
        outer_get = vars(nn.Module).get("__getattribute__")
        get = object.__getattribute__
        attributes = self.attributes

        def read(module: nn.Module, name: str) -> Any:
            path = paths.get(id(module))
            if path is None:
                self._outside(module, name, sys._getframe(1))
            elif name == "__dict__":
                self._all_of(module, path, sys._getframe(1))
            else:
                attributes[path, name] = None
            return get(module, name)

        def write(module: nn.Module, name: str, value: Any) -> None:
            self.odd = self.odd or f"it sets '{name}'"
            own_set(module, name, value)

        def delete(module: nn.Module, name: str) -> None:
            self.odd = self.odd or f"it deletes '{name}'"
            own_delete(module, name)

        outer = sys.gettrace()

        def step(frame: FrameType, event: Any, arg: Any) -> Any:
            self._runs(frame)
            return outer(frame, event, arg) if outer is not None else None

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__ = write  # type: ignore[method-assign, assignment]
        nn.Module.__delattr__ = delete  # type: ignore[method-assign]
        # what runs when garbage is collected is no code of the block
        collects = gc.isenabled()
        gc.disable()
        sys.settrace(step)
        try:
            yield
        finally:
            sys.settrace(outer)
            if collects:
                gc.enable()
            nn.Module.__delattr__ = own_delete  # type: ignore[method-assign]
            nn.Module.__setattr__ = own_set  # type: ignore[method-assign]
            if outer_get is None:
                del nn.Module.__getattribute__
            else:
                nn.Module.__getattribute__ = outer_get  # type: ignore[method-assign]

    def _outside(self, module: nn.Module, name: str, frame: FrameType) -> None:
        """A module outside of the block is read: by the tracer, or by code that stands for no other call."""
        if name.startswith("__") or not _is_models(frame):
            return
        self.odd = self.odd or f"it reads '{name}' of a {type(module).__name__} outside"

    def _all_of(self, module: nn.Module, path: str, frame: FrameType) -> None:
        """The attributes of a module are read without their names."""
        if is_users_file(frame.f_code.co_filename):
            self.attributes |= dict.fromkeys(
                (path, name) for name in object.__getattribute__(module, "__dict__")
            )

    def _runs(self, frame: FrameType) -> None:
        """A function runs."""
        code = frame.f_code
        if not is_users_file(code.co_filename):
            return
        uses = _uses(code)
        if uses.odd:
            self.odd = self.odd or f"{code.co_name} {uses.odd}"
        variables = (
            (frame.f_globals, uses.globals),
            (sys.modules, uses.imports),
            (vars(os), uses.settings),
        )
        for home, names in variables:
            for name in names:
                self.variables.setdefault((id(home), name), home)
        self.names |= uses.attributes


_UNSEEN = frozenset(
    """globals eval exec __import__ import_module _getframe currentframe stack f_back f_locals f_globals
    __getattribute__ __closure__ __globals__ modules gc""".split()
)
"""Names by which code reads what nobody sees it read."""

_ENVIRONMENT = ("environ", "environb", "getenv")


class _Uses:
    """The globals and the attributes that code names."""

    def __init__(self, code: CodeType) -> None:
        self.globals: dict[str, None] = {}
        self.imports: dict[str, None] = {}
        self.settings: dict[str, None] = {}
        """Of the module os: the environment, where the code reads it."""
        self.attributes: dict[str, None] = {}
        self.odd = ""
        for step in dis.get_instructions(code):
            name = str(step.argval)
            # a class that looks up attributes by itself does so for whoever asks
            if name == code.co_name == "__getattribute__":
                continue
            if name in _UNSEEN and step.opname.startswith("LOAD_"):
                self.odd = f"uses {name}"
            if name in _ENVIRONMENT:
                self.settings["environ"] = None
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.globals[name] = None
            elif step.opname in (
                "LOAD_ATTR",
                "LOAD_METHOD",
                "LOAD_SUPER_ATTR",
                "IMPORT_FROM",
            ):
                self.attributes[name] = None
            elif step.opname == "IMPORT_NAME":
                self.imports[name] = None
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self.odd = f"sets the global '{name}'"
            elif (
                step.opname in ("STORE_DEREF", "DELETE_DEREF")
                and name in code.co_freevars
            ):
                self.odd = f"sets '{name}' of a function around it"


_KNOWN: dict[CodeType, _Uses] = {}


def _uses(code: CodeType) -> _Uses:
    if code not in _KNOWN:
        _KNOWN[code] = _Uses(code)
    return _KNOWN[code]


def _is_users(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__.partition(".")[0] not in sys.stdlib_module_names
    return is_users_file(file)


def _is_models(frame: FrameType) -> bool:
    """True for the code of the user's, and of torch's own modules."""
    file = frame.f_code.co_filename
    return is_users_file(file) or file.startswith(f"{TORCH_DIR}nn")


def _is_foreign(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _NOT_ITS_OWN


def _attribute(module: nn.Module, name: str, values: Values) -> Any:
    """The value of an attribute as it would be read."""
    own = vars(module)
    if name in own:
        if name in _STRUCTURE:
            return None
        return values.of(own[name])
    if any(name in own[kind] for kind in ("_parameters", "_buffers", "_modules")):
        return "state"
    for cls in type(module).__mro__:
        if name in vars(cls):
            value = vars(cls)[name]
            # functions, and what the class keeps, belong to the class, which is the same
            return (
                values.of(value)
                if isinstance(value, (*SIMPLE, list, dict, set))
                else None
            )
    return _ABSENT


_STRUCTURE = frozenset(vars(nn.Module()))
"""The attributes of every module: parameters, buffers, modules, hooks. They are in the key of a call."""


__all__ = ["Block", "Reads", "Shared", "Unknown"]
