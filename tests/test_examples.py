"""The examples run as their docstrings say: as commands, on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cluster.commands import torchrun
from cluster.ranks import ROOT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_torchrun_starts_an_example() -> None:
    """In new processes, as a user does. The others are forked."""
    command = ["examples/train_gpt.py", "--schedule", "1f1b", "--steps", "3", "--microbatches", "2", "--compare"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    done = subprocess.run(launch, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "after 3 steps, as in one process" in _ran(done)


def test_an_example_of_transformers_runs() -> None:
    done = torchrun(2, "examples/finetune_hf.py", "--steps", "2", "--microbatches", "2")
    assert "step   1: loss" in _ran(done)


def _ran(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed; it had no error and did not warn of what torch does."""
    assert done.returncode == 0, done.stderr
    assert "Warning: `isinstance(treespec" not in done.stderr
    return done.stdout


def test_generate_hf_reads_a_folder_stage_by_stage(tmp_path: Path) -> None:
    """Two ranks say what the model says in one process."""
    transformers.logging.set_verbosity_error()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3, **size)).eval()
    model.save_pretrained(tmp_path)
    words = WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    command = ["examples/generate_hf.py", "--model", str(tmp_path), "--prompt", "w5 w9 w12", "--new", "6", "--dtype", "float32"]
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr
    expected = model.generate(torch.tensor([[5, 9, 12]]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert " ".join(f"w{number}" for number in expected[0].tolist()) in done.stdout
    assert "tokens/s" in done.stdout
    assert "6/6" in done.stderr
