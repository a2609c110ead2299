"""Fine-tunes a Llama with the Trainer of transformers, one stage on each process that torchrun starts.

torchrun --nproc-per-node 2 examples/trainer_hf.py --output run
torchrun --nproc-per-node 2 examples/trainer_hf.py --output run --steps 8 --resume

`StagecutTrainer` is to be copied: Trainer's own loop, arguments, callbacks and logs, with a driver for the
step. On GPUs where there are any, else on CPUs.
"""

import argparse

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from train_gpt import join
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from stagecut import Driver, Pipe, checkpoint, pipeline


class StagecutTrainer(Trainer):
    """Trainer of a pipe of `model`. Every rank sees every batch, which the driver divides.

    A model that takes any keyword divides its loss by `num_items_in_batch`: trace it with that tensor.
    """

    def __init__(
        self, model, pipe: Pipe, args, n_microbatches, schedule="1F1B", **rest
    ):
        if args.label_smoothing_factor or rest.get("compute_loss_func"):
            raise ValueError("the loss is the model's own: trace another in forward")
        args.average_tokens_across_devices = False  # the ranks see the same tokens
        piped = pipe.module()
        piped._is_accelerate_prepared = True  # no DistributedDataParallel around it
        super().__init__(piped, args, **rest)
        self.decayed = {*self.get_decay_parameter_names(model)}
        by_token = self.model_accepts_loss_kwargs
        if not by_token and args.gradient_accumulation_steps > 1:
            raise ValueError("the loss is a mean: take more micro-batches instead")
        self.driver = Driver(
            pipe,
            schedule,
            n_microbatches,
            lambda output: output.loss,
            device=args.device,
            scale_grads=not by_token,
        )

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = lambda loader, **_: prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True
        )
        self.accelerator.gather_for_metrics = lambda data, **_: data
        self.gather_function = self.accelerator.gather_for_metrics
        self.accelerator.clip_grad_norm_ = lambda _, *norm: self.driver.clip_grad_norm_(
            *norm
        )

    def _move_model_to_device(self, model, device):
        """The driver moves the stages of its rank."""

    def create_optimizer(self, model=None):
        """Trainer's optimizer, of the parameters of this rank."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        own, groups = {*self.driver.parameters()}, []
        for weight_decay, decayed in ((self.args.weight_decay, True), (0.0, False)):
            named = self.model.named_parameters()
            named = [(n, p) for n, p in named if p in own and p.requires_grad]
            params = [p for n, p in named if (n in self.decayed) is decayed]
            groups.append({"params": params, "weight_decay": weight_decay})
        self.optimizer = kind(groups, **options)
        self.driver.attach(self.optimizer)
        return self.optimizer

    def run(self, how, inputs, num_items_in_batch):
        if self.model_accepts_loss_kwargs:
            inputs["num_items_in_batch"] = num_items_in_batch
        with self.accelerator.autocast():
            return how(**inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.driver.train()
        inputs = self._prepare_inputs(inputs)
        _, losses = self.run(self.driver.step, inputs, num_items_in_batch)
        return losses.batch.to(self.args.device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        output, losses = self.run(self.driver.eval, inputs, count)
        if prediction_loss_only:
            return losses.batch, None, None
        logits = [output.logits if self.driver.is_last else None]
        dist.broadcast_object_list(logits, src=self.driver.placement[-1])
        return losses.batch, logits[0], inputs["labels"]

    def save_model(self, output_dir=None, _internal_call=False):
        """A folder for `from_pretrained`. Every rank writes its stages."""
        folder = output_dir or f"{self.args.output_dir}/model"
        checkpoint.save_pretrained(self.driver, folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir):
        extra = {"scheduler": self.lr_scheduler.state_dict()}
        optimizer = self.optimizer.optimizer  # accelerate has wrapped it
        checkpoint.save(self.driver, optimizer, f"{output_dir}/pipeline", extra)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The weights come with the optimizer."""

    def _load_optimizer_and_scheduler(self, folder):
        if folder is not None:
            optimizer = self.optimizer.optimizer
            extra = checkpoint.load(self.driver, optimizer, f"{folder}/pipeline")
            self.lr_scheduler.load_state_dict(extra["scheduler"])

    def _load_best_model(self):
        self._load_optimizer_and_scheduler(self.state.best_model_checkpoint)


class Counting(torch.utils.data.Dataset):
    """Sequences that count in threes; the first words of some are not labelled."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (7 * index + 3 * torch.arange(16)) % 64
        labels = tokens.clone()
        labels[: index % 4] = -100
        return {"input_ids": tokens, "labels": labels}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same on every process
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def arguments(folder: str, steps: int, bf16: bool = False) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        bf16=bf16,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def accuracy(predictions) -> dict[str, float]:
    right = predictions.predictions[:, :-1].argmax(-1) == predictions.label_ids[:, 1:]
    return {"accuracy": right[predictions.label_ids[:, 1:] != -100].mean()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="a folder")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument(
        "--resume", action="store_true", help="from the last checkpoint"
    )
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    args = parser.parse_args()

    device = join()
    model = make_model()
    ids = torch.zeros(8 // args.microbatches, 16, dtype=torch.long)
    example = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(1.0)}
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        pipe = pipeline(model, (), example, stages=dist.get_world_size())
    trainer = StagecutTrainer(
        model,
        pipe,
        arguments(args.output, args.steps, args.bf16),
        args.microbatches,
        train_dataset=Counting(64),
        eval_dataset=Counting(16),
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(f"{args.output}/tuned-{trainer.state.global_step}")
    dist.barrier()  # torch may abort in a process that leaves while others still talk to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
