"""Hooks of the site: pages of the root are pages of the site, and links to code are text there."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Page of the root -> its place in the site."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the site, with the pages of the root."""
    for page, place in ROOT_PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links that lead somewhere in the site."""
    homes = {place: source for source, place in ROOT_PAGES.items()}
    uri = page.file.src_uri
    source = PurePosixPath(homes.get(uri, f"docs/{uri}"))

    def moved(link: re.Match[str]) -> str:
        mark, label, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        path, _, anchor = target.partition("#")
        place = _place(normpath(str(source.parent / path)))
        if place is None or not place.rpartition("/")[2]:
            return f"{label}"
        up = "../" * (len(PurePosixPath(uri).parts) - 1)
        end = f"#{anchor}" if anchor else ""
        return f"{mark}[{label}]({up}{place}{end})"

    return _LINK.sub(moved, markdown)


def _place(path: str) -> str | None:
    """Where a file of the repository is in the site; None where it is not."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path.startswith("docs/") and (ROOT / path).is_file():
        return path.removeprefix("docs/")
    return None
