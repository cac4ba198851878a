"""The training loop's guards, metrics, progress and files, over transformers.Trainer."""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from medicalgpt.batches import RankBatches, RankLoader
from medicalgpt.callbacks import ProgressBar, RestoreSums, StopOnSignal
from medicalgpt.checkpoint import whole_checkpoint, write_json
from medicalgpt.errors import RunError, is_main_rank
from medicalgpt.modeling import load_weights
from medicalgpt.run_record import RunRecord

import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

logger = logging.getLogger("medicalgpt")

MAX_SKIPPED_STEPS = 20  # in a row, by the loss scaling of fp16


class StageTrainer(Trainer):
    """Trains a FlatModel on flat batches.

    A stage says what a batch contributes: `batch_sums` returns sums over items (trained tokens, or pairs),
    "loss" among them, and `count_items` how many items a batch has. The loss of a step is the sum over all
    its micro-batches and ranks divided by all their items, so that it does not depend on how the step is
    split.

    Args:
        record: the run that is trained; goes with every checkpoint.
    """

    loss_is_scaled_for_ga = True  # Trainer must not divide by the accumulation again

    def __init__(self, *, record: RunRecord, **kwargs):
        super().__init__(**kwargs)
        self.record = record
        self.saving_dir: Path | None = None
        self.sums: dict[str, float] = defaultdict(float)
        self.clock = time.perf_counter()
        self.skipped_steps = 0
        self.stop = StopOnSignal()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(self.stop)
        if is_main_rank():
            self.add_callback(ProgressBar())

    def run(self, checkpoint: str | None) -> dict[str, float]:
        """Train from the start or from a checkpoint, and return the metrics of training.

        A checkpoint of the last step only lacks what comes after training: the loop would add a step to it.
        """
        if checkpoint:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return {"train_steps": state.global_step}
        result = self.train(resume_from_checkpoint=checkpoint)
        steps = self.state.global_step
        result.metrics.pop("total_flos")  # not counted here
        return dict(result.metrics, train_loss=self._total_loss_scalar / steps, train_steps=steps)

    # ---- what a stage defines ------------------------------------------------------------------------------

    def batch_sums(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over the items of a batch: "loss" (with gradient) and metrics."""
        raise TypeError(f"{type(self).__name__} does not say what its loss is")

    def count_items(self, batch: dict) -> int:
        """Return how many items the loss of a batch is a sum of."""
        raise TypeError(f"{type(self).__name__} does not say what its loss counts")

    def final_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Return the metrics to report, from the means over all items; in training without their loss."""
        return means

    # ---- rows ----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> RankLoader:
        """Return this rank's batches; see `batches`."""
        args = self.args
        batches = RankBatches(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            rank=args.process_index,
            num_ranks=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
        )
        return RankLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the learning-rate schedule, begun one step further on.

        The library's schedules start a warm-up at zero, so that the first step trains nothing. Here step i of
        N takes what the schedule of N + 1 steps has for step i + 1.
        """
        return begun(super().create_scheduler(num_training_steps + 1, optimizer))

    # ---- loss ----------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """Count the items of a step over its micro-batches and ranks."""
        count = torch.tensor(sum(self.count_items(batch) for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        if count == 0:
            raise RunError(f"step {self.state.global_step + 1} has no trained token in any of its rows")
        return count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the step's loss; DDP averages over ranks, hence the factor."""
        sums = self.batch_sums(model, inputs)
        for name, value in sums.items():
            if name != "loss":
                self.sums[name] += value.detach()
        self.sums["items"] += self.count_items(inputs)
        self.sums["tokens"] += inputs["num_tokens"]
        return sums["loss"] / num_items_in_batch * self.args.world_size

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        """Return the gradient norm, and stop before the optimizer step when it is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        finite = math.isfinite(float(grad_norm))
        self.skipped_steps = 0 if finite else self.skipped_steps + 1
        # Loss scaling of fp16 meets infinities now and then, and skips those steps itself.
        if not finite and (not self.args.fp16 or self.skipped_steps > MAX_SKIPPED_STEPS):
            bad = next(
                (
                    name
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None and not parameter.grad.isfinite().all()
                ),
                "the loss",
            )
            raise RunError(
                f"step {self.state.global_step + 1}: the gradient is not finite, first in {bad}; nothing was "
                "changed or saved by this step; lower --learning_rate or look at the data"
            )
        return grad_norm

    # ---- metrics -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log, and the tokens per second of all ranks."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise RunError(
                    f"step {self.state.global_step}: the loss is {logs['loss']}; nothing more is saved"
                )
            sums = self.reduce(self.sums)
            elapsed, self.clock = time.perf_counter() - self.clock, time.perf_counter()
            items, num_tokens = sums.pop("items", 0), sums.pop("tokens", 0)
            logs |= self.final_metrics({name: value / items for name, value in sums.items()})
            logs["tokens_per_second"] = num_tokens / elapsed
            self.sums.clear()
        super().log(logs, start_time)

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        """Add up sums over ranks."""
        if self.args.world_size == 1 or not sums:
            return {name: float(value) for name, value in sums.items()}
        keys = sorted(sums)
        values = torch.tensor(
            [float(sums[key]) for key in keys], dtype=torch.float64, device=self.args.device
        )
        return dict(zip(keys, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: list | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return metrics over all items of the validation rows; each rank takes its own rows once."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        own = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        loader = DataLoader(own, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        start, sums = time.perf_counter(), defaultdict(float, {"items": 0.0, "loss": 0.0})
        self.model.eval()
        for batch in loader if len(own) else [self.data_collator([])]:  # every rank has every metric
            batch = self._prepare_inputs(batch)
            for name, value in self.batch_sums(self.model, batch).items():
                sums[name] += value.item()
            sums["items"] += self.count_items(batch)
        sums = self.reduce(sums)
        items = sums.pop("items")
        means = self.final_metrics({name: value / max(items, 1) for name, value in sums.items()})
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.clock = time.perf_counter()
        return metrics

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: None = None) -> str:
        """Where a checkpoint is being written: beside its place, until it is whole."""
        return str(self.saving_dir or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: None = None) -> None:
        """Write a checkpoint beside its place on all ranks, seal and rename it, then drop what is too old."""
        args, wait = self.args, self.accelerator.wait_for_everyone
        output_dir, step = Path(args.output_dir), self.state.global_step
        with whole_checkpoint(
            output_dir, step, keep=args.save_total_limit, is_main=args.should_save, wait=wait
        ) as directory:
            self.saving_dir = directory
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.saving_dir = None
        logger.info("saved checkpoint=%s", output_dir / f"checkpoint-{step}")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write what is trained: the adapter, or the whole model."""
        if self.args.should_save:
            self.model.lm.save_pretrained(output_dir, save_embedding_layers="auto")
            (Path(output_dir) / "README.md").unlink(missing_ok=True)
            RunRecord(Path(output_dir), self.record.content).save()
        if self.is_in_train:
            write_json(
                self.progress_file(output_dir),
                {
                    "tr_loss": self._tr_loss.item(),
                    "total_loss": self._total_loss_scalar,
                    "last_logged": self._globalstep_last_logged,
                    "sums": {k: float(v) for k, v in self.sums.items()},
                },
            )

    def progress_file(self, checkpoint: str) -> Path:
        """Where a rank keeps what it has summed up since the last log."""
        return Path(checkpoint) / f"progress_{self.args.process_index}.json"

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Put a checkpoint's weights into the model."""
        load_weights(self.model.lm, Path(resume_from_checkpoint))
        progress = json.loads(self.progress_file(resume_from_checkpoint).read_text(encoding="utf-8"))
        self.add_callback(RestoreSums(self, progress))


def begun(scheduler: torch.optim.lr_scheduler.LRScheduler) -> torch.optim.lr_scheduler.LRScheduler:
    """Begin a learning-rate schedule one step further on; see `StageTrainer.create_scheduler`."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.lr_lambdas = [one_step_on(schedule) for schedule in scheduler.lr_lambdas]
        groups = scheduler.optimizer.param_groups
        for group, base, schedule in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * schedule(0)
        scheduler._last_lr = [group["lr"] for group in groups]
    return scheduler


def one_step_on(schedule: Callable[[int], float]) -> Callable[[int], float]:
    """Return a schedule one step further on; a plain function, which a checkpoint does not carry."""
    return lambda step: schedule(step + 1)


class LanguageModelTrainer(StageTrainer):
    """Next-token prediction (PT and SFT): the items are trained tokens."""

    def batch_sums(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Return the negative log-likelihood of the batch, − Σ log p(token | before), in nats."""
        return {"loss": -model(**batch).sum()}

    def count_items(self, batch: dict) -> int:
        """Return the number of trained tokens."""
        return len(batch["target_ids"])

    def final_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Add the perplexity per trained token."""
        return means | ({"perplexity": math.exp(min(means["loss"], 700))} if "loss" in means else {})
