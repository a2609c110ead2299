"""Trains an unmodified Llama of Hugging Face with its own loss, one stage on each process that torchrun
starts.

torchrun --nproc-per-node 4 examples/finetune_hf.py

On GPUs where there are any, else on CPUs. The weights are random: put `from_pretrained` in the place of the
config for real ones.
"""

import argparse

import torch
import torch.distributed as dist
from train_gpt import join
from transformers import LlamaConfig, LlamaForCausalLM

from stagecut import Driver, SplitPoint, pipeline

MICRO_BATCH, LENGTH, VOCABULARY = 2, 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--schedule", default="1F1B", help="a schedule of torch.distributed.pipelining"
    )
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    device = join()
    torch.manual_seed(0)  # the same model and the same batches on every process
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)

    stages = dist.get_world_size()
    cuts = {
        f"model.layers.{config.num_hidden_layers * i // stages}": SplitPoint.BEGINNING
        for i in range(1, stages)
    }
    example = torch.zeros(MICRO_BATCH, LENGTH, dtype=torch.long)
    pipe = pipeline(
        model, mb_kwargs={"input_ids": example, "labels": example}, split_spec=cuts
    )
    driver = Driver(
        pipe,
        args.schedule,
        args.microbatches,
        lambda output: output.loss,
        device=device,
    )
    optimizer = torch.optim.AdamW(driver.parameters(), 3e-3)
    driver.attach(
        optimizer
    )  # the embedding and the head are one parameter on two processes

    for step in range(args.steps):
        start = torch.randint(VOCABULARY, (MICRO_BATCH * args.microbatches, 1))
        tokens = (
            start + 3 * torch.arange(LENGTH)
        ) % VOCABULARY  # something to learn: it counts in threes
        _, losses = driver.step(input_ids=tokens, labels=tokens)
        optimizer.step()
        optimizer.zero_grad()
        if driver.is_last and (step % 5 == 0 or step == args.steps - 1):
            print(
                f"step {step:3}: loss {torch.stack(losses).mean().item():.4f}",
                flush=True,
            )
    dist.barrier()  # torch may abort in a process that leaves while others still talk to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
