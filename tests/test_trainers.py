"""docs/TRAINERS.md: its commands run as they stand there, print what stands there, and train as one process does."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cluster.commands import torchrun
from cluster.matrix import on_ranks
from cluster.ranks import ROOT

PAGE = (ROOT / "docs" / "TRAINERS.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
QUOTED = re.compile(r"# (examples/\w+\.py)\n(.*)", re.DOTALL)
COMMANDS = dict(re.findall(r"```\n\$ (torchrun .*?)\n(.*?)```", PAGE, re.DOTALL))
JOINED = ("torchtitan_pipelining", "ddp_outside")
"""The examples of which no part reads how torchrun started them."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples can be run and imported."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@cache
def printed(command: str, folder: Path | None = None) -> list[str]:
    """The lines that a command of the page prints, `run` being this folder. They have those on the page among them."""
    words = command.replace("--output run", f"--output {folder}").split()
    assert words[:2] == ["torchrun", "--nproc-per-node"]
    if Path(words[3]).stem in JOINED:
        lines = "".join(on_ranks(int(words[2]), _main, Path(words[3]).stem)).splitlines()
    else:
        done = torchrun(int(words[2]), *words[3:])
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
    assert [line for line in COMMANDS[command].splitlines() if line not in lines] == [], lines
    return lines


def _main(example: str) -> str:
    """What an example prints on this rank, which has joined the others already: no process is started for it."""
    sys.path.insert(0, str(ROOT / "examples"))
    import train_gpt  # type: ignore[import-not-found]

    text = io.StringIO()
    own = patch.object(train_gpt, "join", lambda: torch.device("cpu"))
    with own, patch.object(dist, "destroy_process_group"), patch.object(sys, "argv", [example]), redirect_stdout(text):
        import_module(example).main()
    return text.getvalue()


def command(example: str) -> str:
    """The one command of the page with this example."""
    (found,) = (command for command in COMMANDS if f"/{example}.py" in command)
    return found


def numbers(lines: list[str], name: str) -> list[float]:
    """The numbers after a name, one for each line that has it."""
    return [float(number) for line in lines for number in re.findall(rf"\b{name}(?:'?:)? ([\d.]+)", line)]


def test_the_python_on_the_page_runs_or_stands_in_the_example() -> None:
    own = []
    for block in BLOCKS:
        quoted = QUOTED.fullmatch(block)
        if quoted is None:
            own.append(block)
        else:
            assert quoted[2] in (ROOT / quoted[1]).read_text(), f"{quoted[1]} has no longer:\n{quoted[2]}"
    assert len(own) < len(BLOCKS)
    exec("\n".join(own), {"__name__": "page"})


def test_the_trainer_of_hugging_face_resumes_and_ends_as_one_process(tmp_path: Path) -> None:
    """Losses, norms, evaluations and learning rates of eight steps, the second half after a restart, and of two more on three ranks;
    and the model in the end.
    """
    pytest.importorskip("accelerate")
    from trainer_hf import Counting, StagecutTrainer, accuracy, arguments, make_model  # type: ignore[import-not-found]
    from transformers import LlamaForCausalLM, Trainer

    for each in COMMANDS:
        if "trainer_hf" in each:
            printed(each, tmp_path / "ranks")
    _tune(3, tmp_path / "ranks", "--steps", "10", "--resume")
    data = {"train_dataset": Counting(64), "eval_dataset": Counting(16), "compute_metrics": accuracy}
    alone = Trainer(make_model(), arguments(str(tmp_path / "alone"), 10), **data)
    alone.train()
    watched = {"loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy"}
    logs = [_history(tmp_path / where / "checkpoint-10", watched) for where in ("ranks", "alone")]
    assert len(logs[1]) == 15
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    tuned = LlamaForCausalLM.from_pretrained(tmp_path / "ranks" / "tuned-10")
    torch.testing.assert_close(tuned.state_dict(), alone.model.state_dict(), rtol=1e-3, atol=1e-5)
    smooth = arguments(str(tmp_path / "smooth"), 1)
    smooth.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match="the loss is the model's own"):
        StagecutTrainer(None, None, smooth, 2)


def _tune(ranks: int, folder: Path, *options: str) -> None:
    done = torchrun(ranks, "examples/trainer_hf.py", "--output", str(folder), *options)
    assert done.returncode == 0, done.stderr


def test_the_trainer_of_hugging_face_trains_in_bfloat16_as_one_process(tmp_path: Path) -> None:
    """Under autocast, as far as its rounding lets: samples are in other micro-batches."""
    pytest.importorskip("accelerate")
    from trainer_hf import Counting, accuracy, arguments, make_model
    from transformers import Trainer

    _tune(2, tmp_path / "ranks", "--steps", "4", "--bf16")
    data = {"train_dataset": Counting(64), "eval_dataset": Counting(16), "compute_metrics": accuracy}
    logs = []
    for bf16 in (True, False):
        alone = Trainer(make_model(), arguments(str(tmp_path / str(bf16)), 4, bf16), **data)
        alone.train()
        logs.append(_history(tmp_path / str(bf16) / "checkpoint-4", {"loss", "grad_norm", "eval_loss"}))
    ranks = _history(tmp_path / "ranks" / "checkpoint-4", {"loss", "grad_norm", "eval_loss"})
    for one, other in zip(ranks, logs[0], strict=True):
        assert one == pytest.approx(other, rel=2**-7)
    assert ranks != logs[1]  # which is not rounded


def _history(folder: Path, names: set[str]) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: log[name] for name in sorted(names & log.keys())} for log in history]


def test_prepare_pippy_gives_every_rank_the_output_of_the_model() -> None:
    pytest.importorskip("accelerate")
    lines = printed(command("accelerate_pippy"))
    assert sum("[2, 16, 64], difference" in line for line in lines) == 2
    assert max(numbers(lines, "difference")) < 1e-5


def test_lightning_trains_as_one_process() -> None:
    pytest.importorskip("lightning")
    lines = printed(command("lightning_manual"))
    from torch.utils.data import DataLoader
    from trainer_hf import Counting, make_model

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    torch.manual_seed(1)
    for batch in DataLoader(Counting(32), 8, shuffle=True):
        parts = [model(**{name: item.chunk(4)[i] for name, item in batch.items()}).loss for i in range(4)]
        loss = torch.stack(parts).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), norm.item()]
    assert numbers(lines, "loss") == pytest.approx(losses[::2], abs=2e-4)
    assert numbers(lines, "norm") == pytest.approx(losses[1::2], abs=2e-4)


def test_torchtitans_parts_are_initialised_and_train_as_one_model_that_was_built_on_the_cpu() -> None:
    lines = printed(command("torchtitan_pipelining"))
    from torchtitan_pipelining import Decoder, batch, loss_fn  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = Decoder()
    for layer in model.layers.values():
        with torch.no_grad():
            layer.reset_parameters()  # the buffer, which draws nothing

    def loss(step: int) -> Any:
        tokens = torch.cat([batch(step, replica) for replica in range(2)])
        return loss_fn(model(tokens[:, :-1]), tokens[:, 1:], 128)[0]

    assert numbers(lines, "loss") == pytest.approx(_trained(model, loss, 1e-2, None), abs=2e-4)


def test_ddp_around_stages_trains_as_one_process() -> None:
    lines = printed(command("ddp_outside"))
    from ddp_outside import batch  # type: ignore[import-not-found]
    from train_gpt import GPT, loss_of

    torch.manual_seed(0)
    model = GPT()

    def loss(step: int) -> Any:
        tokens = torch.cat([batch(step, replica) for replica in range(2)])
        return loss_of(model(tokens[:, :-1]), tokens[:, 1:])

    assert numbers(lines, "loss") == pytest.approx(_trained(model, loss, 3e-3, 1.0), abs=2e-4)


def _trained(model: Any, loss_of_step: Any, rate: float, most: float | None) -> list[float]:
    """The losses of three steps in one process."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    losses = []
    for step in range(3):
        loss = loss_of_step(step)
        loss.backward()
        if most is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_every_example_of_the_page_is_run_here() -> None:
    names = {re.findall(r"examples/(\w+)\.py", command)[0] for command in COMMANDS}
    assert len(COMMANDS) == 6
    assert names == {"trainer_hf", "accelerate_pippy", "lightning_manual", "torchtitan_pipelining", "ddp_outside"}
