"""The examples run as their docstrings say: as commands, on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """`command` on so many processes of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
    return subprocess.run(launch, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("ranks", "command", "said"),
    [
        (2, "examples/train_gpt.py --schedule 1f1b --steps 3 --microbatches 2 --compare", "after 3 steps, as in one process"),
        (2, "examples/finetune_hf.py --steps 2 --microbatches 2", "step   1: loss"),
    ],
)
def test_an_example_runs(ranks: int, command: str, said: str) -> None:
    done = torchrun(ranks, *command.split())
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert "Warning: `isinstance(treespec" not in done.stderr


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
