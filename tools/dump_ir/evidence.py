"""The files, folders and variables that a trace has read, and whether they are still as they were.

Python's audit events tell which files are opened and which folders are listed. A question whether a file
exists makes no event, so `os.stat` is watched as well. Of what is imported, `sys.modules` knows the files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from stagecut.tools.dump_ir import STARTED

Fact = tuple[str, str, str]
"""A kind of question, a path, and the answer."""

_STANDARD = sysconfig.get_path("stdlib") + os.sep
_DEVICES = ("/proc/", "/sys/", "/dev/")
_SHELLS_OWN = frozenset("_ SHLVL OLDPWD PWD COLUMNS LINES TERM".split())
"""Variables that tell of the shell and its window."""
_OUTSIDE = frozenset(
    "subprocess.Popen os.system os.exec os.fork os.posix_spawn socket.connect "
    "socket.getaddrinfo".split()
)
"""Events after which a trace may depend on anything."""
_OPENS = frozenset(("open", "sqlite3.connect"))
_LISTS = frozenset(("os.listdir", "os.scandir"))
_EVENTS = _OUTSIDE | _OPENS | _LISTS
_MAKES = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_IMPORTABLE = (".py", ".pyc", ".so", ".zip")


class Uncertain(Exception):
    """It cannot be said what a trace depends on, since a file has changed meanwhile. The next may be kept."""


class Outside(Uncertain):
    """A trace depends on what is no file, and so will the next. The message says on what."""


# --- facts --------------------------------------------------------------------------------------------


def _file(path: str) -> str:
    """The state of a path: the contents of a file, of an installed one its size and times."""
    try:
        status = os.stat(path)
        if os.path.isdir(path):
            return "folder"
        if is_installed(path):
            return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "absent"


def _status(path: str) -> str:
    """Whether a path is there, a folder or a file, and size and time of a file."""
    try:
        status = os.stat(path)
    except OSError:
        return "absent"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    return f"{status.st_size} {status.st_mtime_ns}"


def _names(folder: str) -> str:
    """The names in a folder."""
    try:
        return _digest(sorted(os.listdir(folder)))
    except OSError:
        return "absent"


def _importable(folder: str) -> str:
    """The names in a folder that an import could find. A folder without code is none."""
    try:
        with os.scandir(folder) as entries:
            return _digest(sorted(filter(None, map(_module_in, entries))))
    except OSError:
        return "absent"


def _module_in(entry: os.DirEntry[str]) -> str | None:
    """The name of an entry that an import could find, else None."""
    is_name = entry.name.partition(".")[0].isidentifier()
    if not is_name or entry.name == "__pycache__":
        return None
    if entry.name.endswith(_IMPORTABLE):
        return entry.name
    is_package = entry.name.isidentifier() and entry.is_dir() and _has_code(entry.path)
    return entry.name if is_package else None


def _has_code(folder: str) -> bool:
    """True for a folder with modules, or with folders that may have some."""
    with os.scandir(folder) as entries:
        return any(
            entry.name.endswith(_IMPORTABLE) or entry.is_dir() for entry in entries
        )


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


_QUESTIONS: Mapping[str, Callable[[str], str]] = {
    "file": _file,
    "status": _status,
    "names": _names,
    "importable": _importable,
}


def holds(facts: Iterable[Fact]) -> bool:
    """True when every answer is the same today."""
    return all(_QUESTIONS[kind](path) == answer for kind, path, answer in facts)


def is_installed(path: str) -> bool:
    """True for a file of Python or of an installed package, which an installer changes, not a user."""
    if path.startswith(_STANDARD):
        return True
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def environment() -> str:
    """A digest of the variables of this process."""
    own = [item for item in os.environ.items() if item[0] not in _SHELLS_OWN]
    return _digest(f"{name}={value}" for name, value in sorted(own))


_GPUS = ("nvidia", "kfd", "dri", "dxg")


def accelerators(root: str = "/") -> list[str]:
    """The GPUs of this machine, as their drivers show them in files: which are there, and of which kind."""
    shown: list[str] = []
    with suppress(OSError):
        shown += filter(lambda name: name.startswith(_GPUS), os.listdir(f"{root}dev"))
    driver = Path(root, "proc/driver/nvidia")
    for path in (driver / "version", *driver.glob("gpus/*/information")):
        with suppress(OSError):
            shown.append(path.read_text())
    return sorted(shown)


# --- watching -----------------------------------------------------------------------------------------


class Watch:
    """The paths that Python code asks for while it is open. `folder` is one in which imports will look."""

    def __init__(self, folder: str) -> None:
        self.opened: dict[str, bool] = {}
        """Path of an opened file -> whether it was there."""
        self.listed: dict[str, None] = {}
        self.asked: dict[str, str] = {}
        """Path that was asked for -> the answer."""
        self.made: set[str] = set()
        self.outside = ""
        self.began = time.time_ns()
        self.known = {*sys.modules}
        looked = _import_paths() | {os.path.abspath(folder)}
        self.importable = {path: _importable(path) for path in looked}

    def event(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit event."""
        if event in _OUTSIDE:
            self.outside = event
            return
        path = _path("." if args[0] is None else args[0])
        if path is None:
            return
        if event in _LISTS:
            self.listed[path] = None
        elif event == "open" and isinstance(args[2], int) and args[2] & _MAKES:
            if path not in self.opened:
                self.made.add(path)
        elif path not in self.made and not _is_compiled(path):
            self.opened.setdefault(path, os.path.lexists(path))

    def ask(self, path: str) -> None:
        """Somebody asks whether there is something at a path, and for its size and times."""
        is_ours = path in self.made or path in self.asked or _is_compiled(path)
        if not is_ours and not is_installed(path):
            self.asked[path] = _status(path)

    def facts(self) -> list[Fact]:
        """All that the trace depends on. Raises Uncertain where that cannot be said."""
        if self.outside:
            raise Outside(
                f"the model starts a program or asks the network ({self.outside}), which may answer otherwise"
            )
        facts: list[Fact] = []
        modules = _modules()
        for name, path in modules.items():
            since = STARTED if name in self.known else self.began
            facts.append(("file", path, _unchanged(path, since)))
        for path, was_there in self.opened.items():
            facts.append(("file", path, _unchanged(path, self.began)))
            if was_there != (facts[-1][-1] != "absent"):
                raise Uncertain(path)
        read = {path for _, path, _ in facts}
        for path, answer in self.asked.items():
            if _status(path) != answer:
                raise Uncertain(path)
            if path not in read:
                facts.append(("status", path, answer))
        facts += [("names", path, _names(path)) for path in self.listed]
        for folder in sorted(self.importable.keys() | _import_paths()):
            now = _importable(folder)
            if self.importable.get(folder, now) != now:
                raise Uncertain(folder)
            facts.append(("importable", folder, now))
        return sorted({*facts})


_WATCHES: list[Watch] = []
"""The watch that is open, if one is."""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    # at the end of the interpreter the names of a module are gone
    if not _WATCHES or event not in _EVENTS:
        return
    watch = _WATCHES[-1]
    if event not in _LISTS or not _by_import(2):
        watch.event(event, args)


_HOOKED: list[bool] = []
"""Whether this process has the hook; a hook stays for ever."""


@contextmanager
def watching(folder: str) -> Iterator[Watch]:
    """A watch of what the block reads. It will import from `folder`. torch is imported then: where that looks
    for libraries of this machine, by programs too, is not the model's doing.
    """
    if not _HOOKED:
        sys.addaudithook(_hook)
        _HOOKED.append(True)
    watch, python_stat = Watch(folder), os.stat
    import_module("torch")

    def watched_stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if not _by_import(2):
            os.stat = python_stat
            try:
                name = _path(path)
                if name is not None:
                    watch.ask(name)
            finally:
                os.stat = watched_stat
        return python_stat(path, *args, **kwargs)

    _WATCHES.append(watch)
    os.stat = watched_stat
    try:
        yield watch
    finally:
        os.stat = python_stat
        _WATCHES.remove(watch)


def _path(path: Any) -> str | None:
    """A path as a full name; None for a number of a file, and for a device."""
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    name = os.path.abspath(os.fsdecode(path))
    return None if name.startswith(_DEVICES) else name


def _is_compiled(path: str) -> bool:
    return f"{os.sep}__pycache__{os.sep}" in path


def _by_import(depth: int) -> bool:
    """True where Python's import system is so many calls above."""
    return "importlib" in sys._getframe(depth).f_code.co_filename


def _modules() -> dict[str, str]:
    """Name of each module that is loaded -> its file."""
    files: dict[str, str] = {}
    for name, module in [*sys.modules.items()]:
        path = getattr(module, "__file__", None)
        if isinstance(path, str):
            files[name] = os.path.abspath(path)
    return files


def _import_paths() -> set[str]:
    """The folders in which imports look."""
    return {os.path.abspath(path) for path in sys.path}


def _unchanged(path: str, since: int) -> str:
    """The state of a file that has not changed since a time. Raises Uncertain for one that has."""
    answer = _file(path)
    if answer in ("absent", "folder"):
        return answer
    status = os.stat(path)
    if max(status.st_mtime_ns, status.st_ctime_ns) >= since:
        raise Uncertain(path)
    return answer
