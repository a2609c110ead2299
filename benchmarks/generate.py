"""Time per token of Llamas that generate: transformers alone, one stage on one card, two stages on two cards.

torchrun --nproc-per-node 2 benchmarks/generate.py --device cuda
torchrun --nproc-per-node 2 benchmarks/generate.py --small    # tiny models on CPUs, to try the script

Weights are random and in bf16. A request has a prompt of 128 tokens, and 64 are generated, one row at a time,
greedily. `ms` is the time of a request over its tokens, the median of three; `of generate` is over that of
transformers' own `generate` on one card. `tokens/s` is that of eight such requests, in so many lanes.
"""

import argparse
import cProfile
import gc
import os
import pstats
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from stagecut import Generator

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "3B": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "vocab_size": 512,
}
STATIC = {"cache_implementation": "static"}


class Bench:
    """A Llama, and how it is timed."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.rank = dist.get_rank()
        self.device = torch.device(
            options.device, self.rank if options.device == "cuda" else None
        )
        shape = SHAPES[name] | (SMALL if options.small else {})
        self.config = LlamaConfig(**shape, tie_word_embeddings=name != "8B")
        self.config.eos_token_id = None
        torch.manual_seed(1)
        self.prompts = [
            torch.randint(self.config.vocab_size, (1, 128))
            for _ in range(options.requests)
        ]
        self.base = 0.0

    def model(self, device: torch.device | str) -> Any:
        """The model with its random weights, the same on all devices of a kind."""
        torch.manual_seed(0)
        with torch.device(device):
            dtype = (
                getattr(torch, self.options.dtype)
                if self.options.device == "cuda"
                else torch.float32
            )
            torch.set_default_dtype(dtype)
            model = LlamaForCausalLM(self.config).eval()
            torch.set_default_dtype(torch.float32)
        return model

    def ways(self) -> list[dict[str, bool]]:
        """What `Generator` is asked for."""
        graphs = self.options.device == "cuda"
        known = {"graphs": False, "compiled": True}
        return [
            {"cuda_graphs": graphs, "compile": known[way]} for way in self.options.ways
        ]

    def row(self, way: str, generate: Callable[..., Any], **more: Any) -> torch.Tensor:
        """Prints the time of a token; the tokens of the request."""
        wish = {
            "max_new_tokens": self.options.new,
            "do_sample": False,
            "pad_token_id": 0,
        } | more
        taken = []
        for _ in range(2 + self.options.repeats):
            begin = self.now()
            tokens = generate(self.prompts[0].to(self.device), **wish)
            taken.append(self.now() - begin)
        ms = 1e3 * median(taken[2:]) / self.options.new
        self.base = self.base or ms
        self.print(
            f"{way:44}{ms:>8.2f}{ms / self.base:>14.3f}   first {taken[0]:.1f} s, second {taken[1]:.1f} s"
        )
        if self.options.profile:
            self.profile(lambda: generate(self.prompts[0].to(self.device), **wish))
        return tokens

    def profile(self, run: Callable[[], Any]) -> None:
        """Prints where the host of the last rank spends its time."""
        profile = cProfile.Profile()
        profile.enable()
        run()
        profile.disable()
        if self.rank == dist.get_world_size() - 1 or dist.get_rank() == 0:
            pstats.Stats(profile).sort_stats("tottime").print_stats(28)

    def lanes(self, way: str, generator: Generator, lanes: int) -> None:
        """Prints the tokens a second of all requests."""
        generator.lanes = lanes
        wish = {
            "max_new_tokens": self.options.new,
            "do_sample": False,
            "pad_token_id": 0,
        } | STATIC
        requests = [
            wish | {"input_ids": prompt.to(self.device)} for prompt in self.prompts
        ]
        rates = []
        for _ in range(1 + self.options.repeats):
            begin = self.now()
            generator.generate_all(requests)
            rates.append(len(requests) * self.options.new / (self.now() - begin))
        self.print(f"{way:44}{median(rates[1:]):>8.1f} tokens/s in {lanes} lanes")

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def print(self, line: str) -> None:
        if self.rank == 0:
            print(f"{self.name:4}{line}", flush=True)


def on_one_card(bench: Bench) -> torch.Tensor:
    """The rows of one card, and of two cards by accelerate; the tokens."""
    model = bench.model(bench.device)
    bench.row("generate", model.generate)
    expected = bench.row(
        "generate, static cache, not compiled",
        model.generate,
        disable_compile=True,
        **STATIC,
    )
    for way in bench.ways():
        generator = Generator(model, stages=1, max_length=192, **way)
        tokens = bench.row(f"one stage {_text(way)}", generator.generate, **STATIC)
        bench.print(
            f"{int((tokens == expected).sum())} of {expected.numel()} tokens are those of generate"
        )
        bench.lanes(f"one stage {_text(way)}", generator, 1)
        del generator
        _clean()
    if bench.options.device_map:
        _over_two_cards(bench, model)
    return expected


def _over_two_cards(bench: Bench, model: Any) -> None:
    from accelerate import dispatch_model

    half = bench.config.num_hidden_layers // 2
    places = {f"model.layers.{n}": int(n >= half) for n in range(2 * half)}
    places |= {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.norm": 1,
        "lm_head": 1,
    }
    if bench.config.tie_word_embeddings:
        places["lm_head"] = 0
    bench.row(
        "generate, device_map over two cards", dispatch_model(model, places).generate
    )


def on_two_ranks(bench: Bench, expected: torch.Tensor | None) -> None:
    group = dist.group.WORLD
    for way in bench.ways():
        model = bench.model("meta" if bench.options.meta else bench.device)
        generator = Generator(
            model, group=group, device=bench.device, max_length=192, **way
        )
        dist.barrier()
        tokens = bench.row(f"two stages {_text(way)}", generator.generate, **STATIC)
        if expected is not None and not bench.options.meta:
            bench.print(
                f"{int((tokens == expected).sum())} of {expected.numel()} tokens are those of generate"
            )
        for lanes in bench.options.lanes:
            bench.lanes(f"two stages {_text(way)}", generator, lanes)
        bench.print(generator.report().replace("\n", " | "))
        del generator, model
        _clean()


def _text(way: dict[str, Any]) -> str:
    return " ".join(name for name, wished in way.items() if wished)


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["1B", "8B"])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--requests", type=int, default=8, help="of the rows with lanes"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=["graphs", "compiled"],
        default=["graphs", "compiled"],
        help="CUDA graphs of stages as they are, or compiled",
    )
    parser.add_argument(
        "--device-map", action="store_true", help="two cards by accelerate too"
    )
    parser.add_argument(
        "--profile", action="store_true", help="where hosts spend their time too"
    )
    parser.add_argument("--dtype", default="bfloat16", help="on GPUs")
    parser.add_argument(
        "--meta",
        action="store_true",
        help="each rank makes the weights of its stage alone",
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
    )
    hosts = dist.new_group(backend="gloo")
    if dist.get_rank() == 0:
        card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        print(
            f"{dist.get_world_size()} x {card}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}"
        )
        print(f"{'':4}{'way':44}{'ms':>8}{'of generate':>14}")
    for name in options.shapes:
        bench = Bench(name, options)
        expected = on_one_card(bench) if dist.get_rank() == 0 else None
        _clean()
        dist.barrier(hosts)
        on_two_ranks(bench, expected)
        _clean()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
