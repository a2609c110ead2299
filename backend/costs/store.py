"""Measured seconds, kept on disk, so that a second search on the same device costs nothing.

They lie in `cache_folder()`, which may be deleted at any time. A key has all that decides a measurement: the
device, the version of torch, the ops, the form in which they run, the loss.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from functools import partial
from types import CodeType, FunctionType
from typing import Any
from uuid import uuid4

import torch

from stagecut.backend.cache import cache_folder
from stagecut.backend.costs.runtime import Parts, Timing
from stagecut.backend.ranks.wrapped import around

_HERE = uuid4().hex
"""This process."""

_TABLE = "create table if not exists seconds (key text primary key, value text)"


def key_of(device: torch.device, *parts: object) -> str:
    """A digest of what decides a measurement on a device."""
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    everything = "\n".join([name, torch.__version__, *map(str, parts)])
    return hashlib.sha256(everything.encode()).hexdigest()


def form_of(function: Any) -> str:
    """A text for a function of the user's: it differs where its code does, or what it takes from where it was
    made, and is the same in every process unless that is an object without a text of its own.
    """
    if isinstance(function, FunctionType):
        name = f"{function.__module__}.{function.__qualname__}"
        return f"{name} {_code_text(function.__code__)} {_text(around(function))}"
    if isinstance(function, partial):
        return f"{form_of(function.func)} {_text((function.args, function.keywords))}"
    return _text(function)


def _code_text(code: CodeType) -> str:
    constants = [
        _code_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _text(value: object) -> str:
    """The text of a value. One with an address is worth nothing in another process."""
    text = repr(value)
    return f"{text} in {_HERE}" if " at 0x" in text else text


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
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "costs.sqlite", timeout=10)
    connection.execute(_TABLE)
    return connection
