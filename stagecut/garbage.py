"""Garbage is collected seldom while a model is cut: what a trace makes is kept, and Python would look through
all of it again and again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = 50_000
"""So many more objects are there before Python looks for garbage among the newest."""


@contextmanager
def collected_seldom() -> Iterator[None]:
    """While open, Python looks for garbage less often. Where the user has turned that off, it stays off."""
    often = gc.get_threshold()
    if 0 < often[0] < SELDOM:
        gc.set_threshold(SELDOM, *often[1:])
    try:
        yield
    finally:
        gc.set_threshold(*often)
