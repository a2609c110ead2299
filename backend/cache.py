"""The folder for what may be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that STAGECUT_CACHE names, else `stagecut` in the user's cache folder: the one that
    XDG_CACHE_HOME names, else ~/.cache. It may be deleted at any time.
    """
    chosen = os.environ.get("STAGECUT_CACHE")
    if chosen:
        return Path(chosen)
    users = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path there counts as none
    base = Path(users) if os.path.isabs(users) else Path.home() / ".cache"
    return base / "stagecut"
