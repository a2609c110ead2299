"""Measured seconds, kept on disk, so that a second search on the same device costs nothing.

They lie in the folder that STAGECUT_CACHE names, else in ~/.cache/stagecut; the folder may be deleted at any
time. A key has all that decides a measurement: the device, the version of torch, the ops, the form in which
they run, the loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from stagecut.backend.costs.runtime import Parts, Timing

_TABLE = "create table if not exists seconds (key text primary key, value text)"


def key_of(device: torch.device, *parts: object) -> str:
    """A digest of what decides a measurement on a device."""
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    everything = "\n".join([name, torch.__version__, *map(str, parts)])
    return hashlib.sha256(everything.encode()).hexdigest()


def form_of(function: Any) -> str:
    """A text for a function of the user's that is equal in every process, and differs where its code does."""
    code = getattr(function, "__code__", None)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    if not isinstance(code, CodeType):
        return name
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    return f"{name} {code.co_code.hex()} {constants} {code.co_names}"


def read(key: str) -> Timing[float] | None:
    """The seconds under a key; None where there are none, or where the folder cannot be read."""
    try:
        with closing(_connect()) as connection:
            query = "select value from seconds where key = ?"
            row = connection.execute(query, (key,)).fetchone()
    except (OSError, sqlite3.Error):
        return None
    if row is None:
        return None
    device, host = json.loads(row[0])
    return Timing(Parts(*device), Parts(*host))


def write(key: str, timing: Timing[float]) -> None:
    """The seconds are under the key, where the folder can be written."""
    try:
        with closing(_connect()) as connection, connection:
            row = key, json.dumps(timing)
            connection.execute("insert or replace into seconds values (?, ?)", row)
    except (OSError, sqlite3.Error):
        return


def _connect() -> sqlite3.Connection:
    default = Path.home() / ".cache" / "stagecut"
    folder = Path(os.environ.get("STAGECUT_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "costs.sqlite", timeout=10)
    connection.execute(_TABLE)
    return connection
