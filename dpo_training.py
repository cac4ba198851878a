"""Direct preference optimisation (DPO): the model learns which of two answers is better.

Reads   --train_file_dir   .jsonl/.json pairs
                           {"question", "response_chosen", "response_rejected"[, "system", "history"]}
                           or {"conversations": [… ending with human], "chosen", "rejected"}
Writes  --output_dir       LoRA adapter (or model), tokenizer, run.json, results, logs/, checkpoint-N/
Next    merge_peft_adapter.py, then inference.py

    bash run_dpo.sh
    python dpo_training.py --model_name_or_path merged-sft-qwen-v1 --train_file_dir data/reward

Method: `preference_loss` below. The reference is --model_name_or_path: under LoRA the same weights with the
adapters off (those of --peft_path too), in full fine-tuning a frozen copy. A pair's prompt is computed once
for both answers.
"""

import copy
import math
from dataclasses import dataclass, field

from medicalgpt.arguments import parse_stage
from medicalgpt.base import open_base
from medicalgpt.collator import PairCollator
from medicalgpt.dataset import load_data
from medicalgpt.engine import FlatLM
from medicalgpt.errors import run_script
from medicalgpt.flags import require
from medicalgpt.records import parse_pair
from medicalgpt.row_log import RowLog
from medicalgpt.stage import (
    build_model,
    chat_encoder,
    choose_activation_checkpointing,
    open_run,
    report_data,
    run_training,
    show_pair,
)
from medicalgpt.trainer import StageTrainer

import torch
import torch.nn.functional as F

REFERENCE_LOSSES = ("sigmoid", "hinge", "ipo")
REFERENCE_FREE_LOSSES = ("simpo", "orpo")


@dataclass
class PreferenceArguments:
    """What only DPO has."""

    beta: float = field(default=0.1, metadata={"help": "strength of the preference against the reference"})
    loss_type: str = field(default="sigmoid", metadata={"help": "sigmoid, hinge, ipo, simpo or orpo"})
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "share of pairs assumed to be labelled the wrong way round, 0 to below 0.5 (sigmoid)"
        },
    )
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "margin that simpo asks for, in units of the reward"}
    )

    def __post_init__(self):
        losses = REFERENCE_LOSSES + REFERENCE_FREE_LOSSES
        require(
            self.loss_type in losses,
            f"--loss_type {self.loss_type} is not allowed; expected {', '.join(losses)}",
        )
        require(self.beta > 0, f"--beta {self.beta} is not allowed; expected more than 0")
        require(
            0 <= self.label_smoothing < 0.5,
            f"--label_smoothing {self.label_smoothing} is not allowed; expected 0 to below 0.5",
        )
        require(
            self.label_smoothing == 0 or self.loss_type == "sigmoid",
            f"--label_smoothing belongs to --loss_type sigmoid, not {self.loss_type}; leave it out",
        )


SUFFIXES = (".jsonl", ".json")
DEFAULTS = {
    "output_dir": "outputs-dpo-qwen-v1",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 1.0,
    "learning_rate": 5e-5,
}


def preference_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    lengths: torch.Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (losses, chosen rewards, rejected rewards), one of each per pair.

    With π the policy, ref the reference, w the chosen and l the rejected answer, and
    Δ = [log π(w) − log ref(w)] − [log π(l) − log ref(l)]:

        sigmoid  − (1−ε) log σ(βΔ) − ε log σ(−βΔ)     arXiv:2305.18290, eq. 7; ε: label smoothing (cDPO)
        hinge    max(0, 1 − βΔ)                        arXiv:2305.10425 (SLiC)
        ipo      (Δ̄ − 1/(2β))²                         arXiv:2310.12036, eq. 17; Δ̄: log-ratios per token
        simpo    − log σ(β(log π̄(w) − log π̄(l)) − γ)   arXiv:2405.14734, eq. 6; log π̄: per token
        orpo     − log π̄(w) − β log σ(log odds ratio)  arXiv:2403.07691, eqs. 6–7; odds: π̄ / (1 − π̄)

    Args:
        policy_logps, ref_logps: summed log-probabilities of the answers, (P, 2), chosen then rejected, in
            nats; the reference's are None for simpo and orpo.
        lengths: trained tokens of the answers, (P, 2).
    """
    mean = policy_logps / lengths  # (P, 2)
    if loss_type in REFERENCE_LOSSES:
        log_ratios = policy_logps - ref_logps
        rewards = beta * log_ratios
        delta = log_ratios[:, 0] - log_ratios[:, 1]  # (P,)
        if loss_type == "sigmoid":
            losses = -(1 - label_smoothing) * F.logsigmoid(beta * delta) - label_smoothing * F.logsigmoid(
                -beta * delta
            )
        elif loss_type == "hinge":
            losses = F.relu(1 - beta * delta)
        else:
            per_token = log_ratios / lengths
            losses = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2
    else:
        rewards = beta * mean
        if loss_type == "simpo":
            losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - simpo_gamma)
        else:
            log_odds = mean - log1mexp(mean)
            losses = -mean[:, 0] - beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
    return losses, rewards[:, 0].detach(), rewards[:, 1].detach()


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − eˣ) for x < 0, stable at both ends (Mächler 2012)."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


class PreferenceTrainer(StageTrainer):
    """Preference optimisation: the items are pairs.

    Args:
        preference: the stage's flags.
        reference: a frozen copy of the model, for full fine-tuning with a loss that needs a reference.
    """

    def __init__(self, *, preference: PreferenceArguments, reference: FlatLM | None, **kwargs):
        super().__init__(**kwargs)
        self.preference = preference
        self.reference = reference

    def answer_logps(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """Return the summed log-probability of every answer, (P, 2): chosen, rejected."""
        logps = model(**batch)  # (N,)
        sums = torch.zeros(batch["num_sequences"], device=logps.device, dtype=logps.dtype)
        return sums.index_add(0, batch["sequence_index"], logps).view(-1, 2)

    @torch.no_grad()
    def reference_logps(self, batch: dict) -> torch.Tensor | None:
        """Return what the reference gives the answers, (P, 2), or None for a loss without reference."""
        if self.preference.loss_type in REFERENCE_FREE_LOSSES:
            return None
        model = self.reference if self.reference is not None else self.model
        was_training = model.training
        model.eval()  # no dropout in the reference
        try:
            if self.reference is not None:
                return self.answer_logps(model, batch)
            with model.lm.disable_adapter():
                return self.answer_logps(model, batch)
        finally:
            model.train(was_training)

    def batch_sums(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over pairs: loss, rewards, their margin, and how many pairs are ranked right."""
        lengths = batch["sequence_index"].bincount(minlength=batch["num_sequences"]).clamp(min=1).view(-1, 2)
        options = self.preference
        ref_logps = self.reference_logps(batch)
        losses, chosen, rejected = preference_loss(
            self.answer_logps(model, batch),
            ref_logps,
            lengths,
            loss_type=options.loss_type,
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            simpo_gamma=options.simpo_gamma,
        )
        margins = chosen - rejected
        return {
            "loss": losses.sum(),
            "rewards_chosen": chosen.sum(),
            "rewards_rejected": rejected.sum(),
            "margin": margins.sum(),
            "accuracy": ((margins.sign() + 1) / 2).sum(),  # a tie is half right
        }

    def count_items(self, batch: dict) -> int:
        """Return the number of pairs."""
        return batch["num_sequences"] // 2


def frozen_copy(model: FlatLM, loss_type: str) -> FlatLM | None:
    """Return the reference of a model that is trained in full, or None where none is needed."""
    if model.has_adapters or loss_type in REFERENCE_FREE_LOSSES:
        return None
    reference = FlatLM(copy.deepcopy(model.lm), autocast_dtype=model.autocast_dtype).eval()
    reference.padded = model.padded
    return reference.requires_grad_(False)


def main(argv: list[str]) -> None:
    """Train, or continue training, as the flags say."""
    # 1. Flags
    flags = parse_stage(argv, PreferenceArguments, __doc__, DEFAULTS)

    # 2. Data: every row is read and checked before a model is looked at
    data = load_data(flags, parse_pair, SUFFIXES)
    base = open_base(flags)

    # 3. The run: new, to be continued, or done
    record = open_run("dpo", flags, base, data)
    if record is None:
        return

    # 4. Pairs → ids and labels
    encoder = chat_encoder(flags, base)
    train = encoder.encode_pairs(data.train, data.log)
    validation = encoder.encode_pairs(data.validation, RowLog())
    report_data(data, train, validation, flags.run)
    show_pair(base.tokenizer, train[0])

    # 5. Model
    model = build_model(flags, base, max_length=flags.chat.model_max_length)
    choose_activation_checkpointing(model, flags.run, train)

    # 6. Train, evaluate, save
    trainer = PreferenceTrainer(
        model=model,
        args=flags.run,
        record=record,
        data_collator=PairCollator(padded=model.padded),
        train_dataset=train,
        eval_dataset=validation,
        preference=flags.own,
        reference=frozen_copy(model, flags.own.loss_type),
    )
    run_training(trainer, record, base)


if __name__ == "__main__":
    run_script(main, resumable=True)
