"""The loop of reinforcement learning: prompts dealt to ranks, answers drawn, passes over them, checkpoints.

Everything that is random depends on the seed, the update and the place of an answer in it, and every mean is
one over all ranks: the numbers do not depend on how many ranks share the work, or on where a run was stopped.
"""

import hashlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medicalgpt.arguments import StageArguments
from medicalgpt.backbone import POLICY, VALUE, Backbone, switch_off_dropout
from medicalgpt.base import Base
from medicalgpt.callbacks import ProgressBar, StopOnSignal
from medicalgpt.checkpoint import whole_checkpoint, write_json
from medicalgpt.collator import GroupCollator, on_device
from medicalgpt.errors import ConfigError, RunError, is_main_rank
from medicalgpt.experience import Experience
from medicalgpt.questions import Question, Rollout, in_groups
from medicalgpt.random_states import random_states, set_random_states
from medicalgpt.rank_means import RankMeans
from medicalgpt.rewards import Scorer, ScoreScale, check_scores
from medicalgpt.rl_optimizer import PartOptimizer
from medicalgpt.rollout import Sampler
from medicalgpt.run_record import RunRecord
from medicalgpt.samples import SampleTable, answer_metrics
from medicalgpt.stage import wait_for_ranks

import torch
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

logger = logging.getLogger("medicalgpt")

EVALUATION = -1  # in place of an update's number, for the random numbers of evaluations


def answers_per_update(args: StageArguments, options: Any) -> int:
    """Return how many answers an update draws, over all ranks.

    Raises:
        ConfigError: flags that this loop does not have, or answers that do not come out even.
    """
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ConfigError(f"--optim {args.optim} is not for this stage; expected adamw_torch")
    if args.fp16:
        raise ConfigError("--fp16 True: this stage does not scale its losses; use --bf16, or neither")
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    answers = per_step * options.num_mini_batches
    if answers % options.num_generations:
        raise ConfigError(
            f"--num_generations {options.num_generations} does not divide the {answers} answers of an update"
        )
    if answers // options.num_generations < args.world_size:
        raise ConfigError(
            f"an update has {answers // options.num_generations} prompts for {args.world_size} processes; "
            "raise --gradient_accumulation_steps or lower --num_generations"
        )
    return answers


class RLTrainer:
    """Trains a backbone by updates; a stage says what an update is.

    Args:
        options: the stage's own flags.
        prompts, held_out: of training and evaluation.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        scorer: Scorer,
        args: StageArguments,
        options: Any,
        record: RunRecord,
        base: Base,
        prompts: list[Question],
        held_out: list[Question],
    ):
        self.backbone, self.scorer, self.args, self.options = backbone, scorer, args, options
        self.record, self.tokenizer = record, base.tokenizer
        self.prompts, self.held_out = prompts, held_out
        self.device, self.kl_coef = args.device, options.kl_coef
        self.score_scale = None if options.normalize_scores else ScoreScale()  # measured at the first update
        self.means = RankMeans(args.world_size, args.device)
        self.collate = GroupCollator(padded=backbone.model.padded)
        self.num_rollouts = answers_per_update(args, options)
        switch_off_dropout(backbone)
        self.sampler = Sampler(
            backbone.model,
            stop_ids=base.chat_format.stop_ids(base.tokenizer),
            max_new_tokens=options.max_completion_length,
            temperature=options.temperature,
            batch_size=args.per_device_eval_batch_size,
        )
        self.trained = (POLICY, VALUE) if options.algorithm == "ppo" else (POLICY,)
        backbone.freeze_all_but(*self.trained)
        self.state = TrainerState(
            is_local_process_zero=args.local_process_index == 0, is_world_process_zero=is_main_rank()
        )
        self.prompts_per_update = self.num_rollouts // options.num_generations
        epochs = math.ceil(args.num_train_epochs * len(prompts) / self.prompts_per_update)
        self.state.max_steps = args.max_steps if args.max_steps > 0 else epochs
        self.state.num_train_epochs = math.ceil(self.state.max_steps * self.prompts_per_update / len(prompts))
        self.state.compute_steps(args, self.state.max_steps)
        rates = {POLICY: args.learning_rate, VALUE: options.value_learning_rate or args.learning_rate}
        self.optimizers = {
            name: PartOptimizer(name, backbone.parameters_of(name), rates[name], args, self.state.max_steps)
            for name in self.trained
        }
        self.stop = StopOnSignal()
        callbacks = [report() for report in get_reporting_integration_callbacks(args.report_to)]
        callbacks += [self.stop, *([ProgressBar()] if is_main_rank() else [])]
        self.control = TrainerControl()
        self.callbacks = CallbackHandler(
            [DefaultFlowCallback(), *callbacks], backbone.model, base.tokenizer, None, None
        )
        self.samples = SampleTable(
            options.sample_steps, held_out[: options.num_sample_prompts], Path(args.output_dir)
        )

    @property
    def model(self):
        """The policy."""
        return self.backbone.model

    def update(self, step: int) -> dict[str, float]:
        """Make one update and return its metrics."""
        raise TypeError(f"{type(self).__name__} does not say what an update is")

    def policy_loss(self, experience: Experience, rows: list[int], batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over the tokens of some answers: "loss" (with gradient) and metrics."""
        raise TypeError(f"{type(self).__name__} does not say what the policy's loss is")

    def value_loss(self, experience: Experience, rows: list[int], batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over the tokens of some answers: "loss" (with gradient) and metrics."""
        raise TypeError(f"{type(self).__name__} does not say what the value function's loss is")

    def run(self, checkpoint: str | None) -> dict[str, float]:
        """Train from the start or from a checkpoint, and return the metrics of training."""
        args, state, start = self.args, self.state, time.perf_counter()
        if checkpoint:
            self.load_checkpoint(Path(checkpoint))
        self.control = self.callbacks.on_train_begin(args, state, self.control)
        while state.global_step < state.max_steps and not self.stop.stopped:
            self.samples.show(state.global_step, state.max_steps, self.answer_held_out)
            self.control = self.callbacks.on_step_begin(args, state, self.control)
            rate, begin = self.optimizers[POLICY].learning_rate, time.perf_counter()
            metrics = self.update(state.global_step)
            metrics["update_seconds"] = time.perf_counter() - begin
            state.global_step += 1
            state.epoch = state.global_step * self.prompts_per_update / len(self.prompts)
            for optimizer in self.optimizers.values():
                optimizer.schedule.step()
            self.log(metrics | {"learning_rate": rate})
            self.control = self.callbacks.on_step_end(args, state, self.control)
            if self.control.should_save:
                self.save_checkpoint()
        self.samples.show(state.global_step, state.max_steps, self.answer_held_out)
        self.control = self.callbacks.on_train_end(args, state, self.control)
        return {"train_steps": state.global_step, "train_runtime": time.perf_counter() - start}

    def log(self, metrics: dict[str, float]) -> None:
        """Log to the console, TensorBoard and trainer_state.json."""
        bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
        if bad:
            raise RunError(f"update {self.state.global_step}: {bad} is {metrics[bad]}; nothing more is saved")
        self.state.log_history.append(metrics | {"epoch": self.state.epoch, "step": self.state.global_step})
        self.control = self.callbacks.on_log(self.args, self.state, self.control, dict(metrics))

    # ---- answers -------------------------------------------------------------------------------------------

    def draw(self, step: int) -> tuple[list[int], list[Rollout]]:
        """Draw this rank's answers of an update; each has a place in it and random numbers of its own."""
        k, args = self.options.num_generations, self.args
        # answers to one prompt stay on one rank, where they share it
        places = [p for p in range(self.num_rollouts) if p // k % args.world_size == args.process_index]
        first, count = step * self.prompts_per_update, len(self.prompts)
        numbers = [divmod(first + place // k, count) for place in places]
        orders = {epoch: self.order(epoch) for epoch in {epoch for epoch, _ in numbers}}
        prompts = [self.prompts[orders[epoch][index]] for epoch, index in numbers]
        start = time.perf_counter()
        rollouts = self.answer(prompts, [self.seed(step, place) for place in places])
        self.rollout_seconds = time.perf_counter() - start
        return places, rollouts

    def order(self, epoch: int) -> list[int]:
        """Return the order of the prompts in an epoch."""
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def seed(self, step: int, place: int) -> int:
        """Return the seed of an answer, or of an update's passes."""
        digest = hashlib.sha256(f"{self.args.seed} {step} {place}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def answer(self, prompts: Sequence[Question], seeds: Sequence[int]) -> list[Rollout]:
        """Draw an answer to every prompt."""
        draws = self.sampler([prompt.ids for prompt in prompts], seeds)
        texts = [self.tokenizer.decode(draw.said, skip_special_tokens=True).strip() for draw in draws]
        return [Rollout(*parts) for parts in zip(prompts, draws, texts, strict=True)]

    def scores(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Return the scores of answers, (R,) fp32."""
        scores = self.scorer(rollouts)
        check_scores(scores, rollouts)
        return torch.tensor(scores, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def evaluate_answers(self, rollouts: Sequence[Rollout]) -> Experience:
        """Return log-probabilities of policy and reference, and values, before the first pass."""
        self.backbone.eval()
        parts = defaultdict(list)
        size = self.args.per_device_train_batch_size
        for begin in range(0, len(rollouts), size):
            some = rollouts[begin : begin + size]
            batch = self.batch(some)
            lengths = [len(rollout.draw.ids) for rollout in some]
            parts["logps"] += self.backbone.logps(batch)[0].split(lengths)
            parts["reference_logps"] += self.backbone.reference_logps(batch).split(lengths)
            if VALUE in self.trained:
                parts["values"] += self.backbone.values(batch).split(lengths)
        padded = {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True) for name, values in parts.items()
        }
        lengths = torch.tensor([len(rollout.draw.ids) for rollout in rollouts], device=self.device)
        mask = (torch.arange(padded["logps"].shape[1], device=self.device) < lengths[:, None]).float()
        return Experience(mask, padded["logps"], padded["reference_logps"], padded.get("values"))

    def batch(self, rollouts: Sequence[Rollout]) -> dict:
        """Return the flat batch of some answers with their prompts."""
        return on_device(self.collate(in_groups(rollouts)), self.device)

    # ---- passes --------------------------------------------------------------------------------------------

    def passes(
        self, step: int, places: list[int], rollouts: list[Rollout], experience: Experience
    ) -> dict[str, float]:
        """Make passes of clipped updates over the answers, until the policy is far from what drew them."""
        start, sums, minibatches, tokens = time.perf_counter(), defaultdict(float), 0, 0
        mine = {place: row for row, place in enumerate(places)}
        k, size = self.options.num_generations, self.num_rollouts // self.options.num_mini_batches
        self.backbone.train()
        for turn in range(self.options.num_ppo_epochs):
            generator = torch.Generator().manual_seed(self.seed(step, -1 - turn))
            groups = torch.randperm(self.prompts_per_update, generator=generator)
            order = groups[:, None] * k + torch.arange(k)
            for chosen in order.flatten().split(size):
                rows = [mine[place] for place in chosen.tolist() if place in mine]
                means = self.minibatch(rows, rollouts, experience)
                tokens += sum(rollouts[row].num_tokens for row in rows)
                minibatches += 1
                for name, value in means.items():
                    sums[name] += value
                if means["update_kl"] > self.options.early_stop_kl:
                    break
            else:
                continue
            break
        self.backbone.eval()
        seconds = time.perf_counter() - start
        metrics = {name: value / minibatches for name, value in sums.items()}
        drawn, trained = self.means.sums([sum(len(r.draw.ids) for r in rollouts), tokens])
        return (
            metrics
            | self.explained(experience)
            | {
                "minibatches": minibatches,
                "tokens_per_second_rollout": drawn / self.rollout_seconds,
                "tokens_per_second_update": trained / seconds,
            }
        )

    def minibatch(self, rows: list[int], rollouts: list[Rollout], experience: Experience) -> dict[str, float]:
        """Take one step on some answers, or none where the policy went too far; return means over tokens."""
        size = self.args.per_device_train_batch_size
        (count,) = self.means.sums([experience.mask[rows].sum().item()])
        sums = defaultdict(float)
        losses = {POLICY: self.policy_loss, VALUE: self.value_loss}
        batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        for part in batches:
            batch = self.batch([rollouts[row] for row in part])
            for name in self.trained:
                with self.backbone.using(name):
                    found = losses[name](experience, part, batch)
                    (found.pop("loss") / count).backward()
                for key, value in found.items():
                    sums[key] += value.item()
        keys = self.means.names(sorted(sums))
        totals = dict(zip(keys, self.means.sums([sums[key] for key in keys]), strict=True))
        means = {key: value / count for key, value in totals.items()}
        for name, optimizer in self.optimizers.items():
            norm = optimizer.add_up_and_clip(self.means)
            means[f"{'' if name == POLICY else 'value_'}grad_norm"] = norm
            if means["update_kl"] <= self.options.early_stop_kl:
                optimizer.adam.step()
            optimizer.adam.zero_grad(set_to_none=True)
        return means

    def explained(self, experience: Experience) -> dict[str, float]:
        """Return 1 − Var(return − value) / Var(return) over tokens, where there is a value function."""
        if experience.returns is None:
            return {}
        mask = experience.mask
        rest, whole = (
            self.means.moments(x, mask)[1]
            for x in (experience.returns - experience.values, experience.returns)
        )
        return {"explained_variance": 1 - rest / whole if whole > 0 else 0.0}

    # ---- held-out prompts ----------------------------------------------------------------------------------

    @torch.no_grad()
    def answer_held_out(
        self, places: Sequence[int], adapter: str | None
    ) -> tuple[list[Rollout], torch.Tensor]:
        """Answer held-out prompts with the policy or (None) the reference, always by the same numbers."""
        self.backbone.eval()
        seeds = [self.seed(EVALUATION, place) for place in places]
        with self.backbone.using(adapter):
            rollouts = self.answer([self.held_out[place] for place in places], seeds)
        return rollouts, self.scores(rollouts)

    def evaluate(self) -> dict[str, float]:
        """Return what answers to held-out prompts score, of the reference (…_before) and of the policy.

        Each rank answers its own prompts.
        """
        if not self.held_out:
            return {}
        mine, metrics = range(self.args.process_index, len(self.held_out), self.args.world_size), {}
        for name, adapter in (("_before", None), ("", POLICY)):
            rollouts, scores = self.answer_held_out(mine, adapter)
            found = answer_metrics(rollouts, scores, self.means)
            metrics |= {f"eval_{key}{name}": value for key, value in found.items()}
        metrics["eval_kl"] = self.means.mean(self.distances(rollouts))
        self.log(metrics)
        return metrics

    def distances(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Return each answer's log π − log ref, in nats, (R,)."""
        if not rollouts:  # more ranks than held-out prompts
            return torch.zeros(0, device=self.device)
        experience = self.evaluate_answers(rollouts)
        return ((experience.logps - experience.reference_logps) * experience.mask).sum(1)

    # ---- files ---------------------------------------------------------------------------------------------

    def save_model(self, directory: str, **_: object) -> None:
        """Write the policy's adapter."""
        self.backbone.save_policy(Path(directory))

    def save_checkpoint(self) -> None:
        """Write everything that the next update depends on."""
        output_dir, step = Path(self.args.output_dir), self.state.global_step
        with whole_checkpoint(
            output_dir, step, keep=self.args.save_total_limit, is_main=is_main_rank(), wait=wait_for_ranks
        ) as saving:
            directory = saving / f"checkpoint-{step}"
            if is_main_rank():
                self.backbone.save(directory, with_value=VALUE in self.trained)
                states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
                torch.save(states, directory / "optimizer.pt")
                progress = {"kl_coef": self.kl_coef, "score_scale": asdict(self.score_scale)}
                write_json(directory / "progress.json", progress)
                self.state.save_to_json(str(directory / "trainer_state.json"))
                RunRecord(directory, self.record.content).save()
            torch.save(random_states(), directory / f"random_{self.args.process_index}.pt")
        logger.info("saved checkpoint=%s", output_dir / f"checkpoint-{step}")

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint."""
        self.backbone.load(directory, with_value=VALUE in self.trained)
        states = torch.load(directory / "optimizer.pt", weights_only=True, map_location=self.device)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(states[name])
        progress = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
        self.kl_coef, self.score_scale = progress["kl_coef"], ScoreScale(**progress["score_scale"])
        saved = TrainerState.load_from_json(str(directory / "trainer_state.json"))
        self.state.global_step, self.state.epoch = saved.global_step, saved.epoch
        self.state.log_history = saved.log_history
        set_random_states(torch.load(directory / f"random_{self.args.process_index}.pt", weights_only=True))
