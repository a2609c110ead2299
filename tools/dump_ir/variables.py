"""The variables of the environment that count: those that Python code has read since this file was imported,
and those that code which is not Python may read.

Python code reads them by `os.environ`, which tells of each. What C reads is not seen: for torch and its
libraries there are the beginnings of names.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = tuple(
    f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages")
)
_READERS = ("os", "collections.abc")
"""The modules by which variables are read."""
_GOES_THROUGH_ALL = ("__iter__", "__repr__")
_SHELLS_OWN = frozenset("_ SHLVL OLDPWD PWD COLUMNS LINES TERM".split())
"""Variables that tell of the shell and its window. They count where the model's own code asks."""
THREADS = frozenset(
    "OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS NUMEXPR_MAX_THREADS "
    "VECLIB_MAXIMUM_THREADS BLIS_NUM_THREADS RAYON_NUM_THREADS OMP_PROC_BIND OMP_PLACES "
    "GOMP_CPU_AFFINITY KMP_AFFINITY".split()
)
"""Variables that say how many threads compute, and where. They count where Python code asks while a model is
traced.
"""
_SESSIONS = tuple(
    "SSH_ XDG_SESSION_ TMUX STY WINDOWID TERM_ COLORTERM VTE_ VSCODE_ GNOME_TERMINAL_ KITTY_ ITERM_ "
    "DISPLAY WAYLAND_DISPLAY DBUS_ INVOCATION_ID JOURNAL_STREAM GPG_TTY LS_COLORS".split()
)
"""Variables that begin so tell of the terminal and the session. They count as those of threads do."""
_BY_C = tuple(
    "PYTHON LD_ DYLD_ GLIBC_ MALLOC_ LANG LC_ TZ HOME TMPDIR "
    "TORCH PYTORCH ATEN_ AT_ C10_ CAFFE2_ PT_ PT2_ KINETO_ GLOO_ TP_ NNPACK_ XNNPACK_ FBGEMM_ "
    "CUDA CUBLAS CUDNN CUSPARSE CUSOLVER CUFFT NVIDIA_ NV NCCL_ "
    "HIP HSA_ ROC MIOPEN_ AMD_ GPU_ SYCL_ ONEAPI_ ZE_ XPU_ "
    "OMP_ GOMP_ KMP_ LIBOMP MKL_ DNNL_ ONEDNN_ OPENBLAS_ GOTO_ BLIS_ VECLIB_ NUMEXPR_ NPY_ NUMPY_ "
    "RAYON_ RUST_ TOKENIZERS_ SAFETENSORS_ HF_ HUGGINGFACE_ TRANSFORMERS_ "
    "TRITON_ LLVM_ XLA_ PJRT_ TF_".split()
)
"""Variables that begin so always count."""
_LISTERS = {"networkx": "NETWORKX_", "tqdm": "TQDM_"}
"""Packages that go through all variables for those that begin so, which then always count."""


@dataclass(frozen=True)
class Counting:
    """Which variables count besides those that always do: asked: by name. all: all but those of the terminal
    and of threads. model_lists: all.
    """

    asked: tuple[str, ...] = ()
    all: bool = False
    model_lists: bool = False

    def counts(self, name: str) -> bool:
        """Whether a variable counts."""
        if name in self.asked or self.model_lists:
            return True
        if _is_of_terminal(name):
            return False
        return self.all or name.startswith((*_BY_C, *_LISTERS.values()))


@dataclass
class Asked:
    """What was asked for while this was noted."""

    names: set[str] = field(default_factory=set)
    by_package: bool = False
    """Whether an installed package went through all variables."""
    by_model: bool = False
    """Whether other code did."""


at_first: dict[str, str] = {}
"""The variables of this process at the beginning; torch and models may set others."""
_since_start = Asked(by_package="sitecustomize" in sys.modules)
"""What was asked for since this file was imported. A person's own start of Python may have asked for any."""
_NOTED: list[Asked] = [_since_start]


def begin() -> None:
    """A run begins: neither torch nor a model has set anything."""
    at_first.clear()
    with unnoted():
        at_first.update(os.environ)


@contextmanager
def unnoted() -> Iterator[None]:
    """Nothing that is asked for inside is noted."""
    noted, _NOTED[:] = [*_NOTED], []
    try:
        yield
    finally:
        _NOTED[:] = noted


@contextmanager
def noted() -> Iterator[Asked]:
    """What is asked for inside."""
    asked = Asked()
    _NOTED.append(asked)
    try:
        yield asked
    finally:
        _NOTED.remove(asked)


def counting(traced: Asked) -> Counting:
    """The variables that count for what was computed while `traced` was noted."""
    names = {name for name in _since_start.names if not _is_of_terminal(name)}
    lists = _since_start.by_package or _since_start.by_model
    return Counting(tuple(sorted(names | traced.names)), lists, traced.by_model)


def environment(those: Counting) -> dict[str, str]:
    """The variables that count, each with a mark: equal values have equal marks. One digest, under the empty
    name, tells them apart for certain; a mark gives no value away.
    """
    own = {name: value for name, value in at_first.items() if those.counts(name)}
    marks = {name: _digest([value])[:4] for name, value in sorted(own.items())}
    marks[""] = _digest(f"{name}={value}" for name, value in sorted(own.items()))
    return marks


def other_variables(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The variables that differ, in a few words; empty where none does."""
    if before == now:
        return ""
    names = sorted(before.keys() | now.keys())
    apart = [name for name in names if name and before.get(name) != now.get(name)]
    return f"other variables of the environment: {', '.join(apart) or 'one of them'}"


def is_installed(path: str) -> bool:
    """True for a file of Python or of an installed package, which an installer changes, not a user."""
    if path.startswith((_STANDARD, "<frozen ")):
        return True
    return any(folder in path for folder in _INSTALLED)


def _is_of_terminal(name: str) -> bool:
    return name in _SHELLS_OWN or name in THREADS or name.startswith(_SESSIONS)


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


def _note(name: Any) -> None:
    """Somebody asks for a variable, or goes through all of them."""
    if not (_NOTED and isinstance(name, str | bytes)):
        return
    text = os.fsdecode(name)
    frame, lists = sys._getframe(2), False
    while frame.f_back and frame.f_globals.get("__name__") in _READERS:
        lists = lists or frame.f_code.co_name in _GOES_THROUGH_ALL
        frame = frame.f_back
    by_package = is_installed(frame.f_code.co_filename)
    if lists and frame.f_globals.get("__name__", "").partition(".")[0] in _LISTERS:
        return
    for asked in _NOTED:
        if not lists:
            if not (by_package and text in _SHELLS_OWN):
                asked.names.add(text)
        elif by_package:
            asked.by_package = True
        else:
            asked.by_model = True


def _noting(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that notes its argument before it does its work."""

    def note_first(name: Any) -> Any:
        _note(name)
        return function(name)

    return note_first


def _begin() -> None:
    """From now on it is noted what is asked for."""
    for variables in (os.environ, os.environb):
        for name in ("encodekey", "decodekey"):
            setattr(variables, name, _noting(getattr(variables, name)))


_begin()
