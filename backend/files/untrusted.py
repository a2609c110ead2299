"""Files of a folder that may come from a stranger: no links, only regular files, none larger than its
limit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from stagecut.backend.files.manifest import SavedError

MAX_JSON = 64 << 20
"""Bytes of a manifest that are read at most."""
MAX_TEXT = 64 << 20
"""Bytes of IR text that are read at most."""
MAX_HEADER = 64 << 20
"""Bytes of the header of a safetensors file that are read at most."""
_AGAIN = "copy the folder again, or save again"


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
            f"'{path.name}' is missing", where=str(path.parent), hint=_AGAIN
        ) from None
    except OSError as error:
        what = (
            "is a link, which is not followed"
            if error.errno == errno.ELOOP
            else f"cannot be read: {error.strerror}"
        )
        raise SavedError(
            f"'{path.name}' {what}", where=str(path.parent), hint=_AGAIN
        ) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise SavedError(
            f"'{path.name}' is no regular file", where=str(path.parent), hint=_AGAIN
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
            f"'{path.name}' is no text", where=str(path.parent), hint=_AGAIN
        ) from None


def check_tensors(path: Path, digest: str) -> None:
    """Returns when a safetensors file has that digest and a header of reasonable length."""
    with opened(path) as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise SavedError(
                f"the header of '{path.name}' is larger than {MAX_HEADER >> 20} MiB",
                where=str(path.parent),
                hint=_AGAIN,
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
        hint=_AGAIN,
    )


def read_json(path: Path) -> Any:
    """The contents of a JSON file; no key twice, no constant that JSON does not have."""
    try:
        return json.loads(
            read(path, MAX_JSON), object_pairs_hook=_distinct, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise SavedError(
            f"'{path.name}' is no JSON: {str(error)[:200]}",
            where=str(path.parent),
            hint=_AGAIN,
        ) from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def write_json(path: Path, data: Any) -> None:
    """`path` holds `data`, the same bytes for the same data."""
    path.write_text(
        json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
