"""The files and folders that a trace has read, and whether they are still as they were.

Python's audit events tell which files are opened and which folders are listed. A question whether a file
exists makes no event, so `os.stat` is watched as well. `sys.modules` knows the files of what is imported, and
`lookups` where imports have looked.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from stagecut.tools.dump_ir import STARTED, lookups, variables
from stagecut.tools.dump_ir.lookups import import_folders, modules_in
from stagecut.tools.dump_ir.variables import is_installed

Fact = tuple[str, str, str]
"""A kind of question, a path, and the answer."""

_INSTALLED = tuple(
    f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages")
)
_DEVICES = ("/proc/", "/sys/", "/dev/")
_OUTSIDE = frozenset(
    "subprocess.Popen os.system os.exec os.fork os.posix_spawn socket.connect "
    "socket.getaddrinfo".split()
)
"""Events after which a trace may depend on anything."""
_OPENS = frozenset(("open", "sqlite3.connect"))
_LISTS = frozenset(("os.listdir", "os.scandir"))
_EVENTS = _OUTSIDE | _OPENS | _LISTS
_MAKES = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_OWN_LISTS = lookups.__file__


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


def _modules_at(question: str) -> str:
    """What an import would find: for a folder, and names behind it, the files of each name."""
    folder, _, names = question.rpartition("\n")
    there = modules_in(folder)
    return " ".join(there[name] for name in names.split() if name in there)


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


_QUESTIONS: Mapping[str, Callable[[str], str]] = {
    "file": _file,
    "status": _status,
    "names": _names,
    "modules": _modules_at,
}


def change(facts: Iterable[Fact]) -> str:
    """The first answer that is another one today, in a few words; empty where none is."""
    for kind, question, answer in facts:
        now = _QUESTIONS[kind](question)
        if now != answer:
            return _told(kind, question, answer, now)
    return ""


def _told(kind: str, question: str, before: str, now: str) -> str:
    """The words for a fact that has changed."""
    if kind == "modules":
        folder = question.rpartition("\n")[0]
        apart = {*before.split()} ^ {*now.split()}
        names = ", ".join(_shown(os.path.join(folder, name)) for name in sorted(apart))
        return f"there are other modules to import: {names}"
    if kind == "names":
        return f"the folder {_shown(question)} holds other files"
    if before == "absent":
        return f"{_shown(question)} is new"
    if now == "absent":
        return f"{_shown(question)} is gone"
    return f"{_shown(question)} has changed"


def _shown(path: str) -> str:
    """A path as a person names it: from the working folder, or from that of the installed packages."""
    for folder in _INSTALLED:
        _, is_there, inside = path.rpartition(folder)
        if is_there:
            return f"{inside} (installed)"
    beside = os.path.relpath(path)
    return path if beside.startswith(os.pardir) else beside


folders: list[str] = []
"""Where imports looked at the beginning."""


def begin() -> None:
    """A run begins: neither torch nor a model has set anything."""
    variables.begin()
    folders[:] = sys.path


_NUMBER = re.compile(r"(?<![\w.])\d+\.\d{7,}(?:e[+-]\d+)?")
_OF_DTYPES = frozenset(
    (
        3.4028234663852886e38,
        1.1754943508222875e-38,
        1.1920928955078125e-07,
        3.3895313892515355e38,
        6.103515625e-05,
    )
)
"""Numbers of torch.finfo."""


def has_computed_number(program: str) -> bool:
    """True where the text of a program has a number that torch may have computed in float32: its last digits
    may be others with another number of threads.
    """
    return any(map(_is_single, map(float, _NUMBER.findall(program))))


def _is_single(number: float) -> bool:
    """True for a number that float32 holds exactly, and that is none of a dtype's own."""
    if number > max(_OF_DTYPES) or number in _OF_DTYPES:
        return False
    (single,) = struct.unpack("f", struct.pack("f", number))
    return bool(single == number)


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

    def __init__(self, folder: str, asked: variables.Asked) -> None:
        self.opened: dict[str, bool] = {}
        """Path of an opened file -> whether it was there."""
        self.listed: dict[str, None] = {}
        self.asked: dict[str, str] = {}
        """Path that was asked for -> the answer."""
        self.made: set[str] = set()
        self.outside = ""
        self.began = time.time_ns()
        self.known = {*sys.modules}
        self.folders = import_folders() | {os.path.abspath(folder)}
        self._asked = asked

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

    def ask_threads(self) -> None:
        """Somebody asks how many threads compute."""
        self._asked.names |= variables.THREADS

    @property
    def counting(self) -> variables.Counting:
        """The variables that the trace depends on."""
        return variables.counting(self._asked)

    def facts(self) -> list[Fact]:
        """All else that the trace depends on. Raises Uncertain where that cannot be said."""
        if lookups.IS_LATE:
            raise Uncertain("torch was imported before it was known where it looks")
        if self.outside:
            raise Outside(
                f"the model starts a program or asks the network ({self.outside}), which may answer otherwise"
            )
        facts: list[Fact] = []
        modules = _modules()
        for name, path in modules.items():
            since = _CAME.setdefault(name, self._since(name))
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
        for folder in self.folders | import_folders():
            if not os.path.isdir(folder):
                facts.append(("status", folder, _status(folder)))
        facts += _looks()
        return sorted({*facts})

    def _since(self, name: str) -> int:
        """A time before a module was read."""
        return STARTED if name in self.known else self.began


def _looks() -> Iterator[Fact]:
    """What imports found where they looked. Raises Uncertain where that has changed since."""
    for folder, names in lookups.looked.items():
        now, before = modules_in(folder), lookups.at_first[folder]
        if any(now.get(name) != before.get(name) for name in names):
            raise Uncertain(folder)
        question = f"{folder}\n{' '.join(sorted(names))}"
        yield "modules", question, _modules_at(question)


_CAME: dict[str, int] = {}
"""Name of a module that a watch has seen -> a time before it was read."""

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
def watching(folder: str, first: Sequence[str] = ("torch",)) -> Iterator[Watch]:
    """A watch of what the block reads. It will import from `folder`. The modules `first` are imported before:
    where torch looks for libraries of this machine, by programs too, is not the model's doing.
    """
    if not _HOOKED:
        sys.addaudithook(_hook)
        _HOOKED.append(True)
    for name in first:
        import_module(name)
    with variables.noted() as asked:
        watch = Watch(folder, asked)
        _WATCHES.append(watch)
        try:
            with _stat_watched(watch), _threads_watched(watch):
                yield watch
        finally:
            _WATCHES.remove(watch)


@contextmanager
def _stat_watched(watch: Watch) -> Iterator[None]:
    """Inside, the watch is told of calls of `os.stat`."""
    python_stat = os.stat

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

    os.stat = watched_stat
    try:
        yield
    finally:
        os.stat = python_stat


@contextmanager
def _threads_watched(watch: Watch) -> Iterator[None]:
    """Inside, the watch is told when torch is asked how many threads it has."""
    torch = import_module("torch")

    def tell(*_: Any) -> None:
        watch.ask_threads()

    with ExitStack() as stack:
        for name in ("get_num_threads", "get_num_interop_threads"):
            stack.enter_context(_replaced(torch, name, tell))
        yield


@contextmanager
def _replaced(owner: Any, name: str, tell: Callable[..., None]) -> Iterator[None]:
    """Inside, a function of `owner` tells its arguments before it does its work."""
    function = getattr(owner, name)

    def telling(*args: Any) -> Any:
        tell(*args)
        return function(*args)

    setattr(owner, name, telling)
    try:
        yield
    finally:
        setattr(owner, name, function)


def _path(path: Any) -> str | None:
    """A path as a full name; None for a number of a file, and for a device."""
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    name = os.path.abspath(os.fsdecode(path))
    return None if name.startswith(_DEVICES) else name


def _is_compiled(path: str) -> bool:
    return f"{os.sep}__pycache__{os.sep}" in path


def _by_import(depth: int) -> bool:
    """True where Python's import system is so many calls above, or what notes its looks."""
    file = sys._getframe(depth).f_code.co_filename
    return "importlib" in file or file == _OWN_LISTS


def _modules() -> dict[str, str]:
    """Name of each module that is loaded -> its file."""
    files: dict[str, str] = {}
    for name, module in [*sys.modules.items()]:
        path = getattr(module, "__file__", None)
        if isinstance(path, str):
            files[name] = os.path.abspath(path)
    return files


def _unchanged(path: str, since: int) -> str:
    """The state of a file that has not changed since a time. Raises Uncertain for one that has."""
    answer = _file(path)
    if answer in ("absent", "folder"):
        return answer
    status = os.stat(path)
    if max(status.st_mtime_ns, status.st_ctime_ns) >= since:
        raise Uncertain(path)
    return answer
