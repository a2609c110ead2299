"""Options of dump-ir that say nothing where they stand are refused, and messages speak of options."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from stagecut.tools.dump_ir.main import main, parser
from stagecut.tools.dump_ir.options import RULES, misuse, named, spelled

MISUSED = [
    ("m.py:f --config a=1", "--config needs a SOURCE hf:NAME"),
    ("m.py:f --meta", "--meta needs a SOURCE hf:NAME"),
    ("m.pt2 --batch 2", "--batch needs a SOURCE hf:NAME"),
    ("- --length 16", "--length needs a SOURCE hf:NAME"),
    ("m.ir --leaf a", "--leaf needs a SOURCE in Python"),
    ("m.pt2 --leaf a", "--leaf needs a SOURCE in Python"),
    ("m.py:f --trust", "--trust needs a SOURCE FILE.pt2"),
    ("- --interactive", "--interactive reads lines from standard input"),
    ("m.py:f --interactive --report", "--report does not go with --interactive"),
    ("m.py:f --interactive --bisect", "--bisect does not go with --interactive"),
    ("m.py:f --unfold --format json", "--unfold needs --format text"),
    ("m.ir --no-cache", "--no-cache needs a model"),
    ("m.py:f --against n.py:f --format svg", "--format does not go with --against"),
    ("- --against -", "--against - reads standard input"),
    ("m.py:f --stages 2 --split-at a", "--split-at does not go with --stages"),
    ("m.py:f --device H100", "--device needs --stages, --report, --timeline or --format html"),
    ("m.py:f --schedule GPipe --stats", "--schedule needs --stages"),
    ("m.py:f --microbatches 8 --format svg", "--microbatches needs --stages"),
    ("m.ir --bisect", "--bisect needs passes to run"),
    ("m.py:f --diff --passes=", "--diff needs passes to run"),
    ("m.py:f --bisect --stats", "--stats does not go with --bisect"),
    ("m.py:f --bisect --format json", "--format does not go with --bisect"),
    ("m.py:f --print-after all --only stage=1", "--only does not go with --print-after on standard output: -o DIR writes both"),
    ("m.py:f --print-before all --format svg", "--format does not go with --print-before"),
    ("m.py:f --diff --format json", "--format does not go with --diff"),
    ("m.py:f --stats --format json", "--format does not go with --stats"),
    ("m.py:f --time --report", "--report does not go with --time"),
    ("m.py:f --trace-value x --level ops", "--level does not go with --trace-value"),
    ("m.py:f --trace-param x --timeline --format svg", "--format does not go with --trace-param"),
    ("m.py:f --report --timeline --format svg", "--timeline does not go with --report"),
    ("m.py:f --timeline", "--timeline needs --format svg or --format json"),
    ("m.py:f --report --format dot", "--report needs --format text, json or svg"),
    ("m.ir --roles", "--roles needs a model"),
    ("m.py:f --roles --format json", "--roles needs --format text, and no --only"),
    ("m.py:f --roles --only stage=1", "--roles needs --format text, and no --only"),
    ("m.py:f --roles --report", "--roles needs --format text, and no --only"),
    ("m.py:f --stats --roles", "--roles does not go with --stats"),
    ("m.py:f --report --only stage=1", "--only shows a part of the program"),
    ("m.py:f --format html --only stage=1", "--only shows a part of the program"),
    ("m.py:f --only stage=1 --only stage=2", "--only takes one stage=N and one scope=NAME"),
    ("m.py:f --only scope=a --format svg", "--only takes a stage=N for a picture"),
    ("m.py:f --level ops", "--level needs --format dot or svg"),
    ("m.py:f --depth 1 --format json", "--depth needs --format dot or svg"),
    ("m.py:f --level stages --only stage=1 --format svg", "--level takes modules or ops next to --only"),
    ("m.py:f --depth 1 --format svg", "--depth needs --level modules, --level ops or --only stage=N"),
]

USED = [
    "hf:llama --config a=1 --meta --batch 2 --length 4 --leaf a",
    "m.pt2 --trust --no-cache",
    "m.py:f --report --device A100 --schedule GPipe --microbatches 4",
    "m.ir --report --format svg --device A100",
    "m.py:f --format html --device A100",
    "m.py:f --stages 2 --schedule GPipe --bisect",
    "m.py:f --diff --stats --time --format text",
    "m.py:f --diff --stats --format html -o out",
    "m.ir --passes all --check-each --diff",
    "m.ir --stats",
    "m.py:f --interactive --stages 2 --device A100",
    "m.py:f --roles",
    "m.py:f --timeline --format json",
    "m.py:f --only stage=1 --only scope=a --format json",
    "m.py:f --only stage=1 --format svg --depth 1",
    "m.py:f --level ops --depth 1 --format dot",
    "m.py:f --bisect -o out",
    "m.ir --against hf:llama --config a=1 --only stage=1 --no-source -o out",
]


def options_of(command: str) -> Namespace:
    """The options as main has them."""
    options = parser().parse_args(command.split())
    options.named = named(parser(), command.split())
    return options


@pytest.mark.parametrize(("command", "why"), MISUSED)
def test_what_would_be_ignored_is_refused_in_one_line(command: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"dump-ir: error: {why}")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("command", USED)
def test_what_applies_is_not_refused(command: str) -> None:
    assert misuse(options_of(command)) is None


def test_every_rule_is_broken_by_one_of_these() -> None:
    told = {misuse(options_of(command)) for command, _ in MISUSED}
    assert [rule.says for rule in RULES if not any(why and why.endswith(rule.says) for why in told)] == []


def test_given_is_what_was_named_even_if_it_is_the_default() -> None:
    assert named(parser(), ["m.py:f"]) == set()
    assert named(parser(), ["m.py:f", "--device", "H100", "--split-at", "a", "-o", "out"]) == {"device", "split_at", "directory"}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("or keep the submodule that does it whole, leaf_modules=[...]; the", "or keep the submodule that does it whole, --leaf NAME; the"),
        ("keep the module whole: leaf_modules=['a.b']", "keep the module whole: --leaf a.b"),
        ("run all passes, or level='modules'", "run all passes, or --level modules"),
        ("install Graphviz: ...; to_dot needs no program", "install Graphviz: ...; --format dot needs no program"),
        ("stages=1 to stages=12", "--stages 1 to --stages 12"),
        ("did you mean 'CPU'? a Device(...) describes any other", "did you mean 'CPU'?"),
    ],
)
def test_messages_speak_of_options(said: str, wanted: str) -> None:
    assert spelled(said) == wanted


def test_a_refused_model_is_told_of_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "branches.py"
    path.write_text(
        "import torch\n"
        "class Branches(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "def make():\n"
        "    return Branches(), (torch.ones(2),), {}\n"
    )
    assert main([f"{path}:make"]) == 1
    shown = capsys.readouterr().err
    assert "leaf_modules" not in shown
    assert len(shown.splitlines()) == 3  # torch's own log and graph are not there
