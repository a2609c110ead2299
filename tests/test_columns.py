"""Columns: every text can be had back from its hunks, and lines are aligned by what they define."""

from __future__ import annotations

import time
from itertools import pairwise

from helpers import CASES
from hypothesis import given
from hypothesis import strategies as st

from stagecut.backend.page.columns import Columns, align, columns_of

LINES = st.lists(
    st.sampled_from(["%a = x()", "%a = y()", "%b = x()", "}", "  }", "holds @w", "    %c, %d = f(%a)", "stage 0 {"]), max_size=12
)


def texts_of(made: Columns) -> list[str]:
    """The texts again, as the page makes them."""
    texts: list[str] = []
    old: list[int] = []
    for column in made.columns:
        new: list[int] = []
        at = 0
        for kind, what in column.hunks:
            ids = [] if isinstance(what, int) else [id for first, count in _pairs(what) for id in range(first, first + count)]
            new += old[at : at + what] if kind == "=" and isinstance(what, int) else ids
            at += len(ids) if kind == "~" else what if isinstance(what, int) else 0
        assert at == len(old)
        indents = [width for width, count in _pairs(column.indents) for _ in range(count)]
        texts.append("".join(f"{' ' * width}{made.lines[line]}\n" for width, line in zip(indents, new, strict=True)))
        old = new
    return texts


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@given(st.lists(LINES, min_size=1, max_size=4))
def test_texts_come_back(all_lines: list[list[str]]) -> None:
    texts = ["".join(f"{line}\n" for line in lines) for lines in all_lines]
    assert texts_of(columns_of([("pass", text, 0.0) for text in texts])) == texts


def test_cases_come_back() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(CASES.glob("*.ir"))]
    assert texts_of(columns_of([("pass", text, 0.0) for text in texts])) == texts


def test_a_line_that_gains_a_word_is_a_changed_line() -> None:
    before = "program @P phase=traced {\n  %a = f(%x) : f32[4]\n  %b = g(%a) : f32[4]\n}\n"
    made = columns_of([("input", before, 0), ("infer", before.replace("%x) : f32[4]", "%x) : f32[4] grad"), 0.1)])
    assert made.columns[1].hunks == [("=", 1), ("~", [4, 1]), ("=", 2)]
    assert made.lines[4] == "%a = f(%x) : f32[4] grad"


def test_what_only_moves_to_the_right_is_no_change() -> None:
    made = columns_of(
        [("input", "program @P {\n  %a = f()\n}\n", 0), ("partition", "program @P {\n  stage 0 {\n    %a = f()\n  }\n}\n", 0)]
    )
    assert [kind for kind, _ in made.columns[1].hunks] == ["=", "+", "=", "+"]


def test_an_unchanged_text_costs_one_hunk() -> None:
    made = columns_of([("input", "a\nb\n", 0), ("nothing", "a\nb\n", 0)])
    assert [column.changed for column in made.columns] == [True, False]
    assert made.columns[1].hunks == [("=", 2)]
    assert len(made.lines) == 2


@given(st.lists(st.integers(0, 6)), st.lists(st.integers(0, 6)))
def test_pairs_rise_and_are_equal(a: list[int], b: list[int]) -> None:
    old, new = [str(i) for i in a], [str(i) for i in b]
    pairs = align(old, new)
    assert all(old[i] == new[j] for i, j in pairs)
    assert all(p[0] < q[0] and p[1] < q[1] for p, q in pairwise(pairs))


def test_long_texts_are_aligned_in_no_time() -> None:
    old = [f"%v{i}" for i in range(40_000)]
    new = [name for i, name in enumerate(old) if i % 3] + ["}"] * 20_000
    start = time.process_time()
    assert len(align(old, new)) == 26_666
    assert len(align(["}"] * 30_000, ["{"] * 30_000 + ["}"] * 30_000)) == 30_000
    assert time.process_time() - start < 5
