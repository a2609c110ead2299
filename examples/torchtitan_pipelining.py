"""A `pipelining_fn` for torchtitan: stages of stagecut, sharded by FSDP2, each initialised on its rank.

torchrun --nproc-per-node 4 examples/torchtitan_pipelining.py

`pipeline_stagecut` has the signature that torchtitan 0.3 asks for in ModelSpec(pipelining_fn=...), and does
with the parts what `pipeline_llm` does. `main` stands in for its trainer: it makes the same calls in the same
order, on two pipelines of two ranks.
"""

import argparse
import inspect
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor
from train_gpt import join

from stagecut import SplitPoint, pipeline


def pipeline_stagecut(
    model,
    *,
    parallel_dims,
    training,
    parallelism,
    compile_config,
    ac_config,
    dump_folder,
    device,
    model_config,
    parallelize_fn,
    loss_fn,
):
    """(schedule, the parts of this rank, has the first stage, has the last stage), all on meta."""
    mesh = parallel_dims.get_mesh("pp")
    kind = get_schedule_class(parallelism.pipeline_parallel_schedule)
    single = issubclass(kind, PipelineScheduleSingle)
    stages = mesh.size() if single else 2 * mesh.size()
    microbatch = parallelism.pipeline_parallel_microbatch_size
    tokens = torch.empty(microbatch, training.seq_len, dtype=torch.long, device="meta")
    layers = [*model.layers]
    cuts = [layers[len(layers) * i // stages] for i in range(1, stages)]
    pipe = pipeline(
        model,
        (tokens,),
        split_spec={f"layers.{name}": SplitPoint.BEGINNING for name in cuts},
    )
    rank = mesh.get_local_rank()
    indices = [*range(rank, stages, mesh.size())]
    if kind.__name__ in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV"):
        indices = [rank, stages - 1 - rank]
    built, parts = [], []
    for index in indices:
        stage = pipe.build_stage(index, device, mesh.get_group())
        part = parallelize_fn(
            pipe.stages[index],
            parallel_dims=parallel_dims,
            training=training,
            parallelism=parallelism,
            compile_config=compile_config,
            ac_config=ac_config,
            dump_folder=dump_folder,
        )
        part.init_weights = partial(initialise, pipe, index, device)
        stage.submod = part
        built.append(stage)
        parts.append(part)
    schedule = kind(
        built[0] if single else built,
        n_microbatches=training.local_batch_size // microbatch,
        loss_fn=lambda *args, **kwargs: loss_fn(*args, **kwargs)[0],
        scale_grads=False,
    )
    return (
        schedule,
        parts,
        any(stage.is_first for stage in built),
        any(stage.is_last for stage in built),
    )


def initialise(pipe, index, device, buffer_device=None):
    """As torchtitan's init_weights, with the model's own code. The same seed on every rank."""
    pipe.initialize(index, device=device, seed=torch.initial_seed() % 2**32)


def parallelize(stage, *, parallel_dims, **_):
    """FSDP2 around each layer and the stage. torchtitan's own asks for attributes that a stage may lack."""
    options = {"mesh": parallel_dims.get_mesh("fsdp")}
    for layer in stage.get_submodule("layers").children():
        fully_shard(layer, **options)
    fully_shard(stage, **options)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by all tokens
            module.set_force_sum_reduction_for_comms(True)  # for gloo
    return stage


# --- a model and a trainer, as torchtitan has them ----------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(width), nn.Linear(width, width)
        self.register_buffer("decay", torch.empty(length, length), persistent=False)

    def reset_parameters(self) -> None:
        """What the layer has of its own: a buffer that no checkpoint holds."""
        places = torch.arange(len(self.decay), dtype=torch.float)
        self.decay.copy_((places[:, None] - places).clamp(min=0).mul(-0.3).exp().tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.decay @ self.norm(x) / len(self.decay)
        return x + torch.tanh(self.mlp(mixed))


class Decoder(nn.Module):
    def __init__(self, words: int = 64, width: int = 16, length: int = 8) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(words, width)
        layers = {str(i): Layer(width, length) for i in range(4)}
        self.layers = nn.ModuleDict(layers)
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.lm_head(self.norm(x))


def loss_fn(logits, labels, valid_tokens):
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / valid_tokens, {}


def batch(step: int, replica: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + replica)
    return torch.randint(64, (8, 9), generator=generator)


def run(schedule, microbatches, has_first, has_last, losses, valid_tokens):
    """One step, called as torchtitan calls it; torch up to 2.13 takes a whole batch."""
    arguments = {"losses": losses, "return_outputs": False}
    inputs = [(tokens[:, :-1],) for tokens in microbatches]
    targets = [tokens[:, 1:] for tokens in microbatches]
    if "arg_mbs" in inspect.signature(schedule.step).parameters:
        schedule.step(
            arg_mbs=inputs if has_first else None,
            kwarg_mbs=[{} for _ in microbatches],
            target_mbs=targets if has_last else None,
            loss_kwargs={"valid_tokens": valid_tokens},
            **arguments,
        )
        return
    whole = torch.cat([tokens for (tokens,) in inputs])
    target = torch.cat(targets) if has_last else None
    schedule.step(*((whole,) if has_first else ()), target=target, **arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedule", default="Interleaved1F1B")
    args = parser.parse_args()
    device = join()
    torch.manual_seed(0)
    mesh = init_device_mesh(
        device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("fsdp", "pp")
    )
    valid_tokens = 8 * 8 * mesh["fsdp"].size()
    with torch.device("meta"):
        model = Decoder()
    schedule, parts, has_first, has_last = pipeline_stagecut(
        model,
        parallel_dims=SimpleNamespace(get_mesh=lambda name: mesh[name]),
        training=SimpleNamespace(local_batch_size=8, seq_len=8),
        parallelism=SimpleNamespace(
            pipeline_parallel_schedule=args.schedule,
            pipeline_parallel_microbatch_size=2,
        ),
        compile_config=None,
        ac_config=None,
        dump_folder="",
        device=device,
        model_config=None,
        parallelize_fn=parallelize,
        loss_fn=partial(loss_fn, valid_tokens=valid_tokens),
    )
    del model
    for part in parts:
        part.to_empty(device=device)
        with torch.no_grad():
            part.init_weights(buffer_device=None)
        part.train()
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    for step in range(3):
        tokens = batch(step, mesh["fsdp"].get_local_rank()).to(device)
        losses = [] if has_last else None
        run(schedule, tokens.chunk(4), has_first, has_last, losses, valid_tokens)
        optimizer.step()
        optimizer.zero_grad()
        if has_last:
            loss = torch.stack(losses).sum()
            dist.all_reduce(loss, group=mesh["fsdp"].get_group())
            if mesh["fsdp"].get_local_rank() == 0:
                sharded = sum(isinstance(p, DTensor) for p in parameters)
                print(
                    f"step {step}: loss {loss.item():.4f}, {sharded} sharded parameters"
                )
    dist.barrier()  # torch may abort in a process that leaves while others still talk to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
