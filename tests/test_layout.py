"""Where pictures have their parts: no line runs through the text of an edge, and what is between two boxes of a frame stays in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from stagecut import Pipe, pipeline
from stagecut.backend.pictures.dot import to_svg
from stagecut.backend.pictures.render import PURE

SVG = "{http://www.w3.org/2000/svg}"
NARROW = 0.45
"""A letter is at least so wide, of the size of its font: no text is taken for longer than it is."""


@dataclass(frozen=True)
class Box:
    """From left and top to right and bottom."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, numbers: list[float]) -> Box:
        """The box around points, of which the numbers are x and y in turn."""
        xs, ys = numbers[::2], numbers[1::2]
        return cls(min(xs), min(ys), max(xs), max(ys))

    def holds(self, x: float, y: float) -> bool:
        """True where the point is inside."""
        return self.left <= x <= self.right and self.top <= y <= self.bottom

    def has(self, other: Box) -> bool:
        """True where all of the other box is inside."""
        return self.holds(other.left, other.top) and self.holds(other.right, other.bottom)


@dataclass
class Layout:
    """The boxes of nodes and frames by title, and of each edge its nodes, the points of its line and the boxes of its texts."""

    nodes: dict[str, Box] = field(default_factory=dict)
    frames: dict[str, Box] = field(default_factory=dict)
    edges: list[tuple[str, list[tuple[float, float]], list[tuple[str, Box]]]] = field(default_factory=list)

    @classmethod
    def of(cls, svg: str) -> Layout:
        """The layout that Graphviz has given to a picture."""
        found = cls()
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
            kinds = group.get("class", "").split()
            title = "".join(t.text or "" for t in group.findall(f"{SVG}title"))
            if "edge" in kinds:
                lines = [point for path in group.iter(f"{SVG}path") for point in _points(_numbers(path.attrib["d"]))]
                found.edges.append((title, lines, [_text(text) for text in group.iter(f"{SVG}text")]))
            elif "node" in kinds:
                found.nodes[title] = _box(group)
            elif "cluster" in kinds:
                found.frames[title] = _box(group)
        return found

    def crossed(self) -> list[tuple[str, str]]:
        """The texts of edges that a line runs through, with that edge."""
        texts = [text for _, _, texts in self.edges for text in texts]
        return [(text, title) for title, line, _ in self.edges for text, box in texts if any(box.holds(*point) for point in line)]

    def left(self) -> list[tuple[str, str]]:
        """The edges between two nodes of a frame that leave it, with their line or with a text."""
        out = []
        for title, line, texts in self.edges:
            ends = [self.nodes[name] for name in title.split("->")]
            for frame, box in self.frames.items():
                stays = all(box.holds(*point) for point in line) and all(box.has(text) for _, text in texts)
                if all(map(box.has, ends)) and not stays:
                    out.append((title, frame))
        return out


def _numbers(text: str) -> list[float]:
    return [*map(float, re.findall(r"-?\d+\.?\d*", text))]


def _points(numbers: list[float]) -> list[tuple[float, float]]:
    """Points on a line of Bézier curves."""
    ends = [*zip(numbers[::2], numbers[1::2], strict=True)]
    points = []
    for first in range(0, len(ends) - 3, 3):
        for step in range(21):
            t = step / 20
            weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
            x, y = (sum(w * end[i] for w, end in zip(weights, ends[first:], strict=False)) for i in (0, 1))
            points.append((x, y))
    return points


def _box(group: ElementTree.Element) -> Box:
    for shape in group.iter():
        if shape.tag == f"{SVG}ellipse":
            x, y, rx, ry = (float(shape.attrib[name]) for name in ("cx", "cy", "rx", "ry"))
            return Box(x - rx, y - ry, x + rx, y + ry)
        outline = shape.get("d") or shape.get("points")
        if outline is not None:
            return Box.around(_numbers(outline))
    raise AssertionError("nothing is drawn")


def _text(element: ElementTree.Element) -> tuple[str, Box]:
    shown = "".join(element.itertext())
    size, x, y = (float(element.attrib[name]) for name in ("font-size", "x", "y"))
    assert element.get("text-anchor") == "start"
    return shown, Box(x, y - 0.7 * size, x + NARROW * size * len(shown), y)


@cache
def whisper() -> Pipe:
    """A weight of the decoder's beginning and end is tied, and the encoder's output is used by both and returned."""
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=200, d_model=64, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=50, max_target_positions=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    call = {"input_features": torch.zeros(2, 16, 100), "labels": torch.ones(2, 10, dtype=torch.long), "use_cache": False}
    return pipeline(model, mb_kwargs=call, stages=4, check=None)


class Block(nn.Module):
    """Narrow boxes in a frame, and values with long texts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.mlp(self.norm(x))
        return out


@cache
def blocks() -> Pipe:
    """Equal blocks."""
    return pipeline(nn.Sequential(*(Block() for _ in range(4))), (torch.zeros(2, 32, 64),), stages=2, check=None)


class Attention(nn.Module):
    """Boxes wider than those beside it, so that what goes past them bends."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 32, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(y.transpose(1, 2).reshape(2, 32, 64))
        return out


class Layer(Block):
    """Attention in front of the mlp, each with a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.first = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.attention(self.first(x)))


@cache
def layers() -> Pipe:
    """Layers that have more than one way around their modules."""
    return pipeline(nn.Sequential(*(Layer() for _ in range(2))), (torch.zeros(2, 32, 64),), stages=2, check=None)


@pytest.mark.parametrize("model", [whisper, blocks, layers])
@pytest.mark.parametrize(
    "view",
    [{}, {"level": "modules", "stage": 1}, {"level": "modules"}, {"level": "ops", "stage": 0}, {"level": "ops", "stage": 1}],
    ids=str,
)
def test_lines_keep_off_texts_and_in_their_frames(model: Any, view: dict[str, Any]) -> None:
    layout = Layout.of(to_svg(model().program, **view, renderer=PURE))
    assert layout.edges
    assert layout.crossed() == []
    assert layout.left() == []


def test_what_this_sees() -> None:
    """A line through a text, and an edge that leaves its frame, are found."""
    words = '<text text-anchor="start" font-size="10" x="{}" y="50">%value : f32[2,4]</text>'
    node = '<g class="node"><title>{}</title><polygon points="0,{} 10,{} 10,{} 0,{}"/></g>'
    nodes = node.format("a", 0, 0, 10, 10) + node.format("b", 90, 90, 100, 100)
    frame = '<g class="cluster"><title>f</title><path d="M0,0C0,0 60,100 60,100"/></g>'
    edge = '<g class="edge"><title>a-&gt;b</title><path d="M{0},10C{0},40 {0},60 {0},90"/>{1}</g>'
    pictures = [(30, words.format(0)), (5, words.format(6)), (5, ""), (90, "")]
    found = []
    for x, text in pictures:
        layout = Layout.of(f'<svg xmlns="http://www.w3.org/2000/svg">{frame}{nodes}{edge.format(x, text)}</svg>')
        found.append((len(layout.crossed()), len(layout.left())))
    assert found == [(1, 1), (0, 1), (0, 0), (0, 1)]
    assert all(a != b for a, b in pairwise(found))
