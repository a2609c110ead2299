"""Commands on several ranks, as torchrun runs them. They are forked like other ranks: torchrun imports all anew for each."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from cluster.matrix import wait
from cluster.ranks import ROOT, forked


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """What `torchrun --nproc-per-node RANKS COMMAND` does in the working directory, on one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        for stream in streams:
            stream.touch()
        processes = forked(ranks, partial(_enter, list(command), streams, os.getcwd(), os.environ | _joined(ranks)))
        wait(processes)
        status = max(abs(process.exitcode or 0) for process in processes)
        return subprocess.CompletedProcess(command, status, *(stream.read_text() for stream in streams))


def _joined(ranks: int) -> dict[str, str]:
    """The variables by which ranks of one machine meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}


def _enter(command: list[str], streams: list[Path], folder: str, variables: dict[str, str], rank: int, ranks: int) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.chdir(folder)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).absolute().parent), str(ROOT)]
    torch.set_num_threads(1)
    runpy.run_path(command[0], run_name="__main__")
