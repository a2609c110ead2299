"""The common parts of all DOT pictures: text that DOT reads literally, ids, pens, colours, a legend."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import graphviz

from stagecut.ir.graph import Namer, Op, Program, StateEntry, Value
from stagecut.ir.text.printer import fqn_text, size_text
from stagecut.ir.types import TensorType, value_bytes

BACKSLASH = "\u2216\u2060"
"""A replacement for the backslash: dot reads backslashes as escapes, once or twice, wherever they stand. No
other text here has the second character.
"""

INK = "#1d252c"
GREY = "#66707a"
TIED = "#b35c00"
WRITTEN = "#a33a3a"
PENS = {
    "inside": {"style": "solid", "color": "#5d6b78"},
    "send": {"style": "solid", "color": "#3f5468"},
    "relay": {"style": "dashed", "color": "#3f5468"},
    "feed": {"style": "dotted", "color": "#2c6b50"},
    "recompute": {"style": "dashed", "color": "#8a63a8", "arrowhead": "odot"},
    # without weight it bends no other edge; without a rank of its own it would run through their texts
    "tied": {"style": "bold", "color": TIED, "dir": "none", "weight": "0"},
}
"""Route of a value, or another kind of edge -> how it is drawn."""
_DOTTED = 1.8
"""The width of the thinnest dotted line that is seen."""

MEANING = {
    "send": "sent to the next stage",
    "relay": "relayed: each stage hands it on",
    "feed": "input, fed to the stage",
    "recompute": "computed again by the stage",
    "tied": "tied parameter, replicated",
}

_SAMPLES = {
    "send": "<B>&#8212;&#8212;&gt;</B>",
    "relay": "<B>&#8211; &#8211; &gt;</B>",
    "feed": "<B>&#183; &#183; &#183; &gt;</B>",
    "recompute": "<B>&#8211; &#8211; o</B>",
    "tied": "<B>&#8212;&#8212;&#8212;</B>",
}

_SPACE = '<TD WIDTH="8"></TD>'

_NODE = {
    "shape": "box",
    "style": "rounded,filled",
    "fillcolor": "white",
    "color": "#7d8790",
    "fontsize": "11",
    "margin": "0.12,0.07",
}
# one name: renderers without fonts know how wide it is, and take a list for Times
_FONT = {
    "fontname": "Helvetica",
    "fontcolor": INK,
}
_ROUND = {
    "shape": "ellipse",
    "fontsize": "10",
    "margin": "0.04,0.02",
}
INPUT = _ROUND | {"fillcolor": "#e9f0f8"}
OUTPUT = _ROUND | {"fillcolor": "#e8f3ea"}


class Ids:
    """Gives every part of one picture an id of its own: a kind, a dash, and a name reduced to letters,
    digits, `_` and `.`.
    """

    def __init__(self) -> None:
        self._namers: dict[str, Namer] = {}

    def __call__(self, kind: str, name: str = "") -> str:
        namer = self._namers.setdefault(kind, Namer())
        unique = namer(bare(name), "model")
        return f"{kind}-{unique}"

    def edge(self, name: str, head: str) -> str:
        """`value-NAME` for the first edge of a value, `value-NAME-to-HEAD` for those after it."""
        first = f"value-{bare(name)}"
        namer = self._namers.setdefault("edge", Namer())
        if namer(first) == reduced(first):
            return first
        return self(f"{first}-to", head)


def bare(name: str) -> str:
    """A printed name without its mark, in characters an id may have."""
    return reduced(name.lstrip("%@"))


def reduced(name: str) -> str:
    """`name` in the characters that a Namer leaves."""
    if not name:
        return name
    return Namer()(name, "_")


def tip_text(text: str) -> str:
    """A DOT string for a tooltip that shows `text`, even when it looks like markup."""
    printable = _printable(text)
    escaped = printable.replace("&", "&amp;")
    in_one_line = escaped.replace("\n", "&#10;")
    shown: str = graphviz.nohtml(in_one_line)
    return shown


def rich(*lines: tuple[str, str], align: str = "LEFT") -> str:
    """A label of lines, each a text and its look: `b` bold, `n` normal, `s` small and grey, else a colour."""
    rows: list[str] = []
    for text, look in lines:
        cell = _look(text, look)
        rows.append(f'<TR><TD ALIGN="{align}">{cell}</TD></TR>')
    return _table(rows, pad=1)


def beside_line(*lines: tuple[str, str]) -> str:
    """A label of lines as `rich` makes it, for an edge: it touches neither its own edge nor the next one."""
    rows: list[str] = []
    for text, look in lines:
        cell = _look(text, look)
        rows.append(f'<TR>{_SPACE}<TD ALIGN="LEFT">{cell}</TD>{_SPACE}</TR>')
    return _table(rows, pad=2)


def _table(rows: list[str], pad: int) -> str:
    return (
        '<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" '
        f'CELLPADDING="{pad}">'
        f"{''.join(rows)}"
        "</TABLE>>"
    )


def _look(text: str, look: str) -> str:
    in_one_line = _printable(text).replace("\n", " ")
    shown = html.escape(in_one_line) or " "
    if look == "b":
        return f"<B>{shown}</B>"
    if look == "n":
        return shown
    color = look
    if look == "s":
        color = GREY
    return f'<FONT POINT-SIZE="9" COLOR="{color}">{shown}</FONT>'


def _printable(text: str) -> str:
    """`text` without control characters and backslashes."""
    shown: list[str] = []
    for char in text:
        if char.isprintable() or char == "\n":
            shown.append(char)
        else:
            shown.append("\ufffd")
    return "".join(shown).replace("\\", BACKSLASH)


def short(text: str, most: int = 48) -> str:
    """`text`, cut in its middle where it is longer than `most`."""
    if len(text) <= most:
        return text
    tail = most // 3
    head = most - tail - 1
    return f"{text[:head]}…{text[-tail:]}"


def canvas(name: str, title: str, tooltip: str) -> graphviz.Digraph:
    """An empty picture from top to bottom."""
    look = {
        "rankdir": "TB",
        "ranksep": "0.35",
        "nodesep": "0.3",
        "pad": "0.2",
        "labelloc": "t",
        "labeljust": "l",
        "fontsize": "14",
    }
    graph = graphviz.Digraph(name, graph_attr=look | _FONT, node_attr=_NODE | _FONT)
    graph.attr("edge", **_FONT, fontsize="10", arrowsize="0.7")
    graph.attr(label=rich((title, "n")), id=name, tooltip=tip_text(tooltip))
    return graph


def pen(kind: str, sizes: Iterable[int | None]) -> dict[str, str]:
    """The look of an edge of a kind. The width grows with the bytes: 1 point up to 1 KiB, more where it is
    dotted, and wider for each factor of ten above.
    """
    total = sum(size or 0 for size in sizes)
    kib = max(total, 1024) / 1024
    growth = 0.45
    if kind == "inside":
        growth = 0.25
    thin = _DOTTED if kind == "feed" else 1
    width = thin + growth * math.log10(kib)
    return PENS[kind] | {"penwidth": f"{width:.2f}"}


def legend(graph: graphviz.Digraph, name: str, kinds: Iterable[str]) -> None:
    """A box that says what the kinds of edges mean."""
    cell = '<TD ALIGN="LEFT"><FONT POINT-SIZE="9" COLOR="{}">{}</FONT></TD>'
    drawn = set(kinds)
    rows: list[str] = []
    for kind, meaning in MEANING.items():
        if kind in drawn:
            sample = cell.format(PENS[kind]["color"], _SAMPLES[kind])
            text = cell.format(GREY, meaning)
            rows.append(f"<TR>{sample}{_SPACE}{text}</TR>")
    if not rows:
        return
    node = f"legend-{name}"
    graph.node(
        node,
        _table(rows, 2),
        id=node,
        tooltip="legend",
        color="#d5dade",
        margin="0.05,0.03",
    )


def type_text(value: Value) -> str:
    """A value's type without strides, device and gradient."""
    if not isinstance(value.type, TensorType):
        return str(value.type)
    shape = ",".join(map(str, value.type.shape))
    return f"{value.type.dtype}[{shape}]"


def bytes_of(values: Iterable[Value]) -> list[int | None]:
    """The bytes of each value."""
    return [value_bytes(value.type) for value in values]


def total_text(values: Iterable[Value]) -> str:
    """The bytes of all values together, with a `+` after them where a size is dynamic."""
    sizes = bytes_of(values)
    numbers = [size for size in sizes if size is not None]
    if sizes and not numbers:
        return "dynamic"
    text = size_text(sum(numbers))
    if len(numbers) < len(sizes):
        text += "+"
    return text


def value_tip(value: Value, name: str) -> str:
    """The tooltip of a value: name, type, bytes, and where it is made."""
    lines = [f"{name} : {value.type}", total_text([value])]
    if isinstance(value.owner, Op):
        place = _place(value.owner)
        if place:
            lines.append(place)
    return "\n".join(lines)


def _place(op: Op) -> str:
    """The origin of an op, as errors show it. The file stands without its folder, as in text, so that a
    picture is the same wherever the model and torch are installed.
    """
    where = op.where()
    if op.loc is None:
        return where
    path = op.loc.file
    return PurePath(path).name + where.removeprefix(path)


def some(names: Sequence[str], noun: str, most: int = 3) -> str:
    """The first names, and how many more there are of what the noun says."""
    parts = [short(name) for name in names[:most]]
    if len(names) > most:
        parts.append(more_text(len(names) - most, noun))
    return ", ".join(parts)


def more_text(count: int, noun: str) -> str:
    """`1 more value`, `2 more values`."""
    return f"{count} more {_noun(noun, count)}"


def count_of(count: int, noun: str) -> str:
    """`1 op`, `2 ops`."""
    return f"{count} {_noun(noun, count)}"


def spans(numbers: Iterable[int]) -> str:
    """Numbers as a short text: `1-3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts: list[str] = []
    for first, last in runs:
        text = f"{first}"
        if last > first:
            text += f"-{last}"
        texts.append(text)
    return ", ".join(texts)


def outputs_text(program: Program, places: Iterable[int]) -> str:
    """`output 0: logits`, or `outputs 1-2: hidden`; without names where the model's result has none."""
    numbers = sorted(set(places))
    names = dict(enumerate(program.output_names))
    told: list[str] = []
    for number in numbers:
        name = names.get(number, "")
        if name not in ("", f"[{number}]"):
            told.append(name)
    noun = _noun("output", len(numbers))
    text = f"{noun} {spans(numbers)}"
    if not told:
        return text
    return f"{text}: {some(told, 'output')}"


def stages_text(numbers: Iterable[int]) -> str:
    """`stage 3`, or `stages 1-3, 5`."""
    distinct = set(numbers)
    noun = _noun("stage", len(distinct))
    return f"{noun} {spans(distinct)}"


def _noun(noun: str, count: int) -> str:
    """The noun, in the plural unless it is one."""
    if count == 1:
        return noun
    return f"{noun}s"


def is_tied(entry: StateEntry) -> bool:
    """True for a tensor of several names or of several stages."""
    return len(entry.names) > 1 or len(entry.stages) > 1


def state_lines(
    states: Iterable[StateEntry], written: set[Value], stage: int | None
) -> list[tuple[str, str]]:
    """A line for each tied tensor of a part of a stage, and one line for all that the part writes."""
    lines: list[tuple[str, str]] = []
    names: list[str] = []
    for entry in states:
        if is_tied(entry):
            lines.append((f"tied {_tied(entry, stage)}", TIED))
        if entry.value in written:
            names.append(fqn_text(entry.name))
    if len(lines) > 4:
        lines[3:] = [(more_text(len(lines) - 3, "tied tensor"), TIED)]
    if names:
        lines.append((f"writes {some(names, 'tensor', 1)}", WRITTEN))
    return lines


def _tied(entry: StateEntry, stage: int | None) -> str:
    others = [other for other in entry.stages if other != stage]
    shown = entry.names[:2]
    parts = [short(fqn_text(name)) for name in shown]
    rest = len(entry.names) - len(shown)
    if rest:
        parts.append(more_text(rest, "name"))
    names = " = ".join(parts)
    if not others:
        return names
    return f"{names}, also in {stages_text(others)}"
