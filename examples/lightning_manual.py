"""Trains a Llama with Lightning, one stage on each process that torchrun starts.

torchrun --nproc-per-node 2 examples/lightning_manual.py

Manual optimization: Lightning has the loop, the data and the logs, a driver runs the step. To Lightning each
process is on its own. On GPUs where there are any, else on CPUs.
"""

import os

import lightning
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from train_gpt import join
from trainer_hf import Counting, make_model

from stagecut import Driver, pipeline


class Pipelined(lightning.LightningModule):
    """A pipe that Lightning trains. Every rank sees every batch."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.driver = driver

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.driver.parameters(), 1e-2)
        self.driver.attach(optimizer)
        return optimizer

    def training_step(self, batch, index):
        self.driver.train()
        _, losses = self.driver.step(**batch)
        self.log("norm", self.driver.clip_grad_norm_(0.5))
        self.log("loss", losses.batch)
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch, index):
        _, losses = self.driver.eval(**batch)
        self.log("val_loss", losses.batch, batch_size=len(batch["input_ids"]))


class Printed(lightning.Callback):
    """Every rank has the losses; the first one prints them."""

    def on_train_batch_end(self, trainer, *_):
        print({n: round(v.item(), 4) for n, v in trainer.callback_metrics.items()})


def main() -> None:
    device = join()
    ids = torch.zeros(2, 16, dtype=torch.long)
    example = {"input_ids": ids, "labels": ids}
    pipe = pipeline(make_model(), (), example, stages=dist.get_world_size())
    driver = Driver(pipe, "1F1B", 4, lambda output: output.loss, device=device)

    first = dist.get_rank() == 0
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=[int(os.environ["LOCAL_RANK"])] if device.type == "cuda" else 1,
        max_steps=4,
        val_check_interval=2,
        callbacks=[Printed()] if first else [],
        logger=False,
        enable_checkpointing=False,  # checkpoint.save(driver, ...) instead
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(1)  # the same batches on every process
    trainer.fit(
        Pipelined(driver),
        DataLoader(Counting(32), 8, shuffle=True),
        DataLoader(Counting(16), 8),
    )
    dist.barrier()  # torch may abort in a process that leaves while others still talk to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
