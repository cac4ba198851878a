"""What happens beside the training loop: signals, progress, and sums that outlive an interruption."""

import os
import signal
import sys
import time

from medicalgpt.errors import is_main_rank

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback


class RestoreSums(TrainerCallback):
    """Puts back what was summed up since the last log: a resumed run logs what an uninterrupted one logs."""

    def __init__(self, trainer: Trainer, progress: dict):
        self.trainer, self.progress = trainer, progress

    def on_train_begin(self, args, state, control, **_):
        """Restore after the loop has set its own sums to zero."""
        trainer, progress = self.trainer, self.progress
        trainer._tr_loss += progress["tr_loss"]
        trainer._total_loss_scalar = progress["total_loss"]
        trainer._globalstep_last_logged = progress["last_logged"]
        trainer.sums.update(progress["sums"], tokens=0)  # their time is not known
        trainer.clock = time.perf_counter()


class StopOnSignal(TrainerCallback):
    """First SIGTERM or Ctrl-C: a whole checkpoint after the step, on all ranks. A second exits at once."""

    def __init__(self):
        self.signal: int | None = None
        self.at = 0.0
        self.stopped = False

    def on_train_begin(self, args, state, control, **_):
        """Catch the signals from here on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, _) -> None:
        """Note a signal; a second one ends the process. torchrun passes Ctrl-C on: twice at once is once."""
        alone = "RANK" not in os.environ
        if self.signal is not None and time.monotonic() - self.at > (0.05 if alone else 1.0):
            os._exit(130)
        if self.signal is None:
            self.signal, self.at = number, time.monotonic()
            if is_main_rank():
                sys.stderr.write(
                    f"\n{signal.Signals(number).name}: saving a checkpoint at the end of this step; "
                    "once more exits at once\n"
                )

    def on_step_end(self, args, state, control, **_):
        """Let all ranks decide together, then save and stop."""
        asked = torch.tensor(int(self.signal is not None), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            self.stopped = True
            control.should_save = control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """A bar with the last loss and the real tokens per second, and a line per log."""

    SHOWN = ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "tokens_per_second")

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **_):
        """Open the bar where the run stands."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
            desc="training",
        )

    def on_step_end(self, args, state, control, **_):
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        """Print what was logged, `name=value`."""
        if self.bar is None or "train_runtime" in logs:
            return
        shown = [
            name for name in (*self.SHOWN, *logs) if name in logs and name not in ("epoch", "eval_runtime")
        ]
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", tok_s=f"{logs['tokens_per_second']:.0f}")
        line = " ".join(f"{name}={logs[name]:.6g}" for name in dict.fromkeys(shown))
        tqdm.write(f"step={state.global_step} {line}", file=sys.stderr)

    def on_train_end(self, args, state, control, **_):
        """Close the bar."""
        self.bar.close()
        self.bar = None
