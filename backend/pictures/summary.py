"""A pipe on one screen: which modules each stage runs, its parameters, what crosses, and what is tied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import prod

from stagecut.backend.pictures.drawing import count_of, some, stages_text, total_text
from stagecut.backend.pictures.stages import homes_of, modules_text
from stagecut.backend.tables import count_text, table
from stagecut.ir.graph import Program, Stage, StateEntry, Value

HEAD = ("stage", "parameters", "receives", "sends", "runs")
MOST_STAGES = 24
"""More stages than this do not fit on a screen; those in the middle are left out."""
FURTHER = (
    "bytes of one micro-batch; pipe.ir() is the program, pipe.report() what it costs"
)
MOST_TIED = 4
_PICTURE_STYLE = "background: white; overflow-x: auto; padding: 4px"
CROSSING_ROUTES = ("send", "relay")


@dataclass(frozen=True)
class Summary:
    """A pipe in a screen, as text and as HTML. `title` names the model, `rows` has the cells of each
    stage, under HEAD; `lines` say what is tied, and what else a reader should know.
    """

    title: str
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        rows = [HEAD, *_shortened(self.rows)]
        return "\n".join([self.title, table(rows, left=(len(HEAD) - 1,)), *self.lines])

    def to_html(self, picture: str = "") -> str:
        """The table as HTML, with a picture (an SVG) under it."""
        head = _html_row("th", HEAD)
        body = "".join(_html_row("td", row) for row in _shortened(self.rows))
        lines = "".join(f"<div>{escape(line)}</div>" for line in self.lines)
        drawn = ""
        if picture:
            svg = picture[max(picture.find("<svg"), 0) :]
            drawn = f'<div style="{_PICTURE_STYLE}">{svg}</div>'
        title = f"<strong>{escape(self.title)}</strong>"
        return f"<div>{title}<table>{head}{body}</table>{lines}{drawn}</div>"


def summary(
    program: Program, mode: str, notes: Sequence[str] = (), basis: Sequence[str] = ()
) -> Summary:
    """The summary of a linked program that is in `mode`: "train" or "eval". basis: for what its cuts were
    searched, lines.
    """
    homes = homes_of(program)
    last = len(program.stages) - 1
    rows: list[tuple[str, ...]] = []
    for stage in program.stages:
        received = crossing(program, stage.index - 1)
        sent = crossing(program, stage.index)
        rows.append(
            (
                str(stage.index),
                count_text(_elements(stage)),
                total_text(received) if stage.index else "-",
                total_text(sent) if stage.index < last else "-",
                ", ".join(modules_text(program, stage, homes)),
            )
        )
    elements = sum(map(_size, _parameters(program.state)))
    total = count_text(elements)
    stages = count_of(len(program.stages), "stage")
    title = f"{program.name} in {stages}, {mode} mode, {total} parameters"
    lines = [*_tied_lines(program), *basis, *_note_lines(notes)]
    if any(cell.endswith("+") for row in rows for cell in row[2:4]):
        lines.append("a + stands for values whose sizes vary")
    lines.append(FURTHER)
    return Summary(title, tuple(rows), tuple(lines))


def crossing(program: Program, stage: int) -> list[Value]:
    """The values that go forward from a stage to the next one, each once however many stages read it, with
    those that are only handed on.
    """
    values: dict[Value, None] = {}
    for transfer in program.transfers:
        if transfer.route not in CROSSING_ROUTES:
            continue
        if (transfer.source or 0) <= stage < transfer.target:
            values[transfer.value] = None
    return list(values)


def _parameters(state: Sequence[StateEntry]) -> list[StateEntry]:
    return [entry for entry in state if entry.kind == "param"]


def _elements(stage: Stage) -> int:
    return sum(_size(entry) for entry in _parameters(list(stage.state)))


def _size(entry: StateEntry) -> int:
    shape = getattr(entry.type, "shape", ())
    return prod(dim if isinstance(dim, int) else 0 for dim in shape)


def _tied_lines(program: Program) -> Iterator[str]:
    """A line for each parameter or buffer of several stages, and one for those that do not fit."""
    shared = [entry for entry in program.state if len(entry.stages) > 1]
    for entry in shared[:MOST_TIED]:
        names = " = ".join(entry.names)
        how = f" ({entry.share})" if entry.share else ""
        yield f"tied: {names} in {stages_text(entry.stages)}{how}"
    rest = [entry.name for entry in shared[MOST_TIED:]]
    if rest:
        yield f"tied: {some(rest, 'tensor')}"


def _note_lines(notes: Sequence[str]) -> Iterator[str]:
    if not notes:
        return
    asking = sum("\n  try: " in note for note in notes)
    todo = f"{asking} with something to do" if asking else "with nothing to do"
    yield f"{count_of(len(notes), 'note')} in pipe.notes, {todo}"


def _shortened(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows, with one row for those in the middle where they are many."""
    if len(rows) <= MOST_STAGES:
        return list(rows)
    kept = MOST_STAGES // 2
    first = rows[:kept]
    last = rows[1 - kept :]
    hidden = len(rows) - len(first) - len(last)
    return [*first, ("...", "", "", "", f"{hidden} stages more"), *last]


def _html_row(tag: str, cells: Sequence[str]) -> str:
    style = ' style="text-align: left"'
    marked = [
        f"<{tag}{style if cell is cells[-1] else ''}>{escape(cell)}</{tag}>"
        for cell in cells
    ]
    return f"<tr>{''.join(marked)}</tr>"
