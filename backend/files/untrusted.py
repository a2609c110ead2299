"""Files of a folder that may come from a stranger: no links, only regular files, none larger than its
limit.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from stagecut.ir.errors import StagecutError

MAX_JSON = 64 << 20
"""Bytes of a manifest that are read at most."""
MAX_TEXT = 64 << 20
"""Bytes of IR text that are read at most."""
MAX_HEADER = 64 << 20
"""Bytes of the header of a safetensors file that are read at most."""
SAVE_AGAIN = "copy the folder again, or save again"


class SavedError(StagecutError):
    """A saved pipe is missing, damaged or of another format, or a pipe cannot be saved."""

    __module__ = "stagecut"


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """The regular file at `path`. Raises SavedError for a link and for anything that is not there."""
    try:
        number = os.open(
            path,
            os.O_RDONLY
            | getattr(os, "O_NOFOLLOW", 0)
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0),
        )
    except FileNotFoundError:
        raise SavedError(
            f"'{path.name}' is missing", where=str(path.parent), hint=SAVE_AGAIN
        ) from None
    except OSError as error:
        what = (
            "is a link, which is not followed"
            if error.errno == errno.ELOOP
            else f"cannot be read: {error.strerror}"
        )
        raise SavedError(
            f"'{path.name}' {what}", where=str(path.parent), hint=SAVE_AGAIN
        ) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise SavedError(
            f"'{path.name}' is no regular file", where=str(path.parent), hint=SAVE_AGAIN
        )
    with os.fdopen(number, "rb") as file:
        yield file


def read(path: Path, most: int) -> bytes:
    """The contents of a file of at most `most` bytes."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise SavedError(
            f"'{path.name}' is larger than {most >> 20} MiB", where=str(path.parent)
        )
    return content


def read_text(path: Path, digest: str) -> str:
    """The text of a file with that digest."""
    content = read(path, MAX_TEXT)
    if hashlib.sha256(content).hexdigest() != digest:
        raise differs(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise SavedError(
            f"'{path.name}' is no text", where=str(path.parent), hint=SAVE_AGAIN
        ) from None


def check_tensors(path: Path, digest: str) -> None:
    """Returns when a safetensors file has that digest and a header of reasonable length."""
    with opened(path) as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise SavedError(
                f"the header of '{path.name}' is larger than {MAX_HEADER >> 20} MiB",
                where=str(path.parent),
                hint=SAVE_AGAIN,
            )
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise differs(path)


def digest_of(path: Path) -> str:
    """The sha256 of a file of our own."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differs(path: Path) -> SavedError:
    """The error for a file that is not the one that was saved."""
    return SavedError(
        f"'{path.name}' is not what was saved: its sha256 differs",
        where=str(path.parent),
        hint=SAVE_AGAIN,
    )
