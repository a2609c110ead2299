"""SVG for a page: pictures made elsewhere, without the parts that could run or load something, and a plain
picture of the stages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from xml.etree import ElementTree

from stagecut.ir.errors import InputError
from stagecut.ir.graph import Program, Transfer
from stagecut.ir.outline import modules_of
from stagecut.ir.text.printer import size_text, value_names
from stagecut.ir.types import value_bytes

_DRAWN = frozenset(
    "svg g defs title desc path rect circle ellipse line polyline polygon text tspan style marker "
    "linearGradient radialGradient "
    "stop clipPath pattern use a".split()
)
_LOADS = re.compile(
    r"@import|(?:url|image|image-set|src)\s*\(\s*(?!['\"]?#)|\\", re.IGNORECASE
)
_NAMESPACE = "http://www.w3.org/2000/svg"


def clean_svg(svg: str) -> str:
    """The picture in a form safe for a page: no script, no handler, nothing from another place. Raises
    InputError for text that is no SVG.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise InputError(f"the picture is no SVG: {error}") from None
    if _bare(root.tag) != "svg":
        raise InputError(f"the picture is no SVG: it is a <{_bare(root.tag)}>")
    _clean(root)
    root.set("xmlns", _NAMESPACE)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _bare(name: object) -> str:
    """A tag or an attribute without its namespace."""
    return str(name).rpartition("}")[2]


def _clean(element: ElementTree.Element) -> None:
    element.tag = _bare(element.tag)
    if element.tag == "style" and _LOADS.search("".join(element.itertext())):
        element.text = ""
    kept = {
        _bare(name): item
        for name, item in element.attrib.items()
        if _harmless(_bare(name), item)
    }
    element.attrib.clear()
    element.attrib.update(kept)
    for child in [*element]:
        if _bare(child.tag) in _DRAWN:
            _clean(child)
        else:
            element.remove(child)


def _harmless(name: str, item: str) -> bool:
    if name.lower().startswith("on") or name.lower() in ("src", "base", "target"):
        return False
    return item.startswith("#") if name.lower() == "href" else not _LOADS.search(item)


_WIDE, _HIGH, _GAP, _LEFT = 150, 64, 70, 20


def stage_picture(program: Program) -> str:
    """The stages in a row, with an arc for all values that go from one to another. Stages have the ids
    `stage-0`, ..., arcs a `data-pair`.
    """
    pairs: dict[tuple[int, int], list[Transfer]] = {}
    for t in program.transfers:
        pairs.setdefault((-1 if t.source is None else t.source, t.target), []).append(t)
    reach = max((b - a for a, b in pairs), default=1)
    base = 40 + min(reach, 8) * 24
    width = 2 * _LEFT + (len(program.stages) + 1) * (_WIDE + _GAP)
    head = (
        f'<svg xmlns="{_NAMESPACE}" viewBox="0 0 {width} {base + _HIGH + 30}" '
        'font-family="Helvetica, sans-serif" font-size="12">'
    )
    return "\n".join(
        [head, *_boxes(program, base), *_arcs(program, pairs, base), "</svg>"]
    )


def _x(stage: int) -> int:
    return _LEFT + (stage + 1) * (_WIDE + _GAP)


def _boxes(program: Program, top: int) -> Iterator[str]:
    if any(t.source is None for t in program.transfers):
        yield from _box(
            "inputs", "inputs", f"{len(program.inputs)} of the model", -1, top
        )
    for stage in program.stages:
        modules = ", ".join(modules_of(stage, 2)) or "the model itself"
        yield from _box(
            f"stage-{stage.index}",
            f"stage {stage.index}",
            f"{len(stage.ops)} ops",
            stage.index,
            top,
            modules,
        )


def _box(
    name: str, title: str, second: str, stage: int, top: int, modules: str = ""
) -> Iterator[str]:
    x = _x(stage)
    short = modules if len(modules) <= 24 else modules[:23] + "…"
    yield f'<g class="node" id="{name}"><title>{escape(modules or title)}</title>'
    yield f'<rect x="{x}" y="{top}" width="{_WIDE}" height="{_HIGH}" rx="6" fill="#f4f4f4" stroke="#888"/>'
    for row, line in enumerate((title, second, short)):
        weight = "normal" if row else "bold"
        yield f'<text x="{x + 10}" y="{top + 18 + 17 * row}" font-weight="{weight}">{escape(line)}</text>'
    yield "</g>"


def _arcs(
    program: Program, pairs: dict[tuple[int, int], list[Transfer]], top: int
) -> Iterator[str]:
    names = value_names(program)
    for (source, target), found in pairs.items():
        x = _x(source) + _WIDE
        y = _x(target)
        high = top - 10 - 24 * min(target - source - 1, 8)
        size = size_text(
            sum(value_bytes(t.value.type) or 0 for t in found if t.made is None)
        )
        shown = ", ".join(names[t.value] for t in found)
        near = target == source + 1
        row = top + 22 if near else (top + 3 * high) // 4 - 4
        path = (
            f"M{x} {top + 30}H{y}"
            if near
            else f"M{x - 20} {top}C{x - 20} {high} {y + 20} {high} {y + 20} {top}"
        )
        yield f'<g class="edge" data-pair="{source} {target}"><title>{escape(shown)}</title>'
        yield f'<path d="{path}" fill="none" stroke="#666" stroke-width="{1.5 if near else 1}"/>'
        yield f'<text x="{(x + y) / 2}" y="{row}" text-anchor="middle">{escape(size)}</text></g>'
