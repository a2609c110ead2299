"""The site of the documentation in a browser, from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, browser

ROOT = Path(__file__).parent.parent
WORKER = "addEventListener('message', event => postMessage(event.data + 1));"
PAGE = """<!doctype html>
<body>
<script src="worker-in-frame.js"></script>
<script>
  const answers = [];
  const worker = new Worker("worker.js");
  worker.addEventListener("message", event => answers.push(event.data));
  worker.postMessage(1);  // before the worker is there
  setTimeout(() => worker.postMessage(2), 200);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_from_the_disk_has_a_worker_for_the_search(tmp_path: Path) -> None:
    script = (ROOT / "docs" / "assets" / "iframe-worker.js").read_text(encoding="utf-8")
    (tmp_path / "worker-in-frame.js").write_text(script, encoding="utf-8")
    (tmp_path / "worker.js").write_text(WORKER, encoding="utf-8")
    (tmp_path / "index.html").write_text(PAGE, encoding="utf-8")
    with browser() as page:
        page.open(tmp_path / "index.html")
        page.wait("answers.length === 2")
        assert page.run("answers") == [2, 3]
        assert page.errors == []


def test_the_site_loads_nothing_from_elsewhere() -> None:
    """The plugin for sites on the disk would load its worker from another host, unless the list has one of this name."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "polyfills: [assets/iframe-worker.js]" in config
    assert "- offline" in config
