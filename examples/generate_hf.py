"""Generates with a model of Hugging Face that is cut into stages, one on each rank.

torchrun --nproc-per-node 2 examples/generate_hf.py --model FOLDER --prompt "Once upon a time"
torchrun --nproc-per-node 2 examples/generate_hf.py --model FOLDER --random --length 128    # no weights
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stagecut import Generator


class Progress:
    """A bar that counts steps on standard error, as a streamer of transformers."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = -1  # the prompt comes first
        self.first = 0.0
        self.last = 0.0

    @property
    def seconds_a_step(self) -> float:
        """Between the first token and the last one: without the prefill."""
        return (self.last - self.first) / max(1, self._done - 1)

    def put(self, _: Any) -> None:
        self._done += 1
        self.last = time.perf_counter()
        if self._done == 1:
            self.first = self.last
        filled = 30 * max(0, self._done) // self._steps
        sys.stderr.write(f"\r[{'#' * filled:30}] {max(0, self._done)}/{self._steps}")
        sys.stderr.flush()

    def end(self) -> None:
        sys.stderr.write("\n")


def main() -> None:
    options = _options()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = (
        torch.device("cuda", local)
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = AutoConfig.from_pretrained(options.model)
    dtype = getattr(torch, options.dtype)
    with torch.device("meta"):  # no rank ever holds the whole model
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = Generator(
        model,
        group=dist.group.WORLD,
        device=device,
        checkpoint=None if options.random else options.model,
    )
    tokenizer = None if options.random else AutoTokenizer.from_pretrained(options.model)
    call = _call(options, config, tokenizer, device)
    call |= {"max_new_tokens": options.new, "cache_implementation": options.cache}
    call |= {"do_sample": options.sample, "pad_token_id": 0, "eos_token_id": None}
    generator.generate(**call)  # cuts the model, and reads the weights
    torch.manual_seed(0)
    progress = Progress(options.new)
    start = time.perf_counter()
    # streamers take one row
    streams = dist.get_rank() == 0 and options.batch == 1
    tokens = generator.generate(**call, streamer=progress if streams else None)
    seconds = time.perf_counter() - start
    if dist.get_rank() == 0:
        rate = options.batch * options.new / seconds
        print(f"{rate:.1f} tokens/s, {1000 * seconds / options.new:.2f} ms a step")
        if streams:
            print(f"{1000 * progress.seconds_a_step:.2f} ms a step without the prefill")
        for row in tokens:
            print(row.tolist() if tokenizer is None else tokenizer.decode(row))
    dist.destroy_process_group()


def _call(
    options: argparse.Namespace, config: Any, tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    if tokenizer is not None:
        rows = [options.prompt] * options.batch
        return dict(tokenizer(rows, return_tensors="pt").to(device))
    torch.manual_seed(0)
    shape = (options.batch, options.length)
    ids = torch.randint(1, config.get_text_config().vocab_size, shape, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder of Hugging Face")
    parser.add_argument("--random", action="store_true", help="random weights and ids")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--length", type=int, default=128, help="of a random prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--cache", choices=("static", "dynamic"), default="static")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
