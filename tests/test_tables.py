"""Tables: columns stand under one another, whatever the cells hold."""

from __future__ import annotations

import pytest

from stagecut.backend.tables import count_text, table, time_text


def test_columns_are_aligned() -> None:
    assert table([("pass", "ops"), ("canonicalize", "7"), ("route", "100")]) == "pass          ops\ncanonicalize    7\nroute         100"
    assert table([("a", "b", ""), ("10", "20", "x y")], left=(1, 2)) == " a  b\n10  20  x y"


@pytest.mark.parametrize("cell", ["[bold]%x[/bold]", ":smile:", "@" + "a" * 100_000, "[/]"])
def test_cells_are_no_markup(cell: str) -> None:
    """Names of the user's are shown as they are, and never folded."""
    first, second = table([("name", "size"), (cell, "1")]).splitlines()
    assert second.split() == [cell, "1"]
    assert len(second) == max(len(cell), len("name")) + len("  size")
    assert len(first) == len(second)


def test_no_rows_are_no_lines() -> None:
    assert table([]) == ""


def test_numbers_have_no_power_of_ten() -> None:
    assert [time_text(seconds) for seconds in (0, 9.996e-4, 0.0123456, 999.6, 1234)] == ["0 us", "1000 us", "12.3 ms", "1000 s", "1230 s"]
    assert [count_text(number) for number in (0, 999, 1125, 999_900, 3e15)] == ["0", "999", "1.12 k", "1000 k", "3 P"]
