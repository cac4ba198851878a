r"""Reward modelling (RM): the model learns to give the better of two answers the higher score.

Reads   --train_file_dir   .jsonl/.json pairs
                           {"question", "response_chosen", "response_rejected"[, "system", "history"]}
                           or {"conversations": [… ending with human], "chosen", "rejected"}
                           either with "margin", a number, where some pairs are clearer than others
Writes  --output_dir       LoRA adapter with score head (or model), tokenizer, run.json, results, logs/,
                           checkpoint-N/
Next    ppo_training.py --reward_model_path, or merge_peft_adapter.py

    bash run_rm.sh
    python reward_modeling.py --model_name_or_path merged-sft-qwen-v1 --train_file_dir data/reward
    python reward_modeling.py --model_name_or_path merged-sft-qwen-v1 --peft_path outputs-rm-qwen-v1 \
        --score_file answers.jsonl

Method: `pair_loss` below, on scores that a linear head reads off the last token of an answer (its stop,
whatever the padding token is). A pair's prompt is computed once for both answers. --score_file trains
nothing: it writes the score of every line's answer (see `medicalgpt.scoring`).
"""

from dataclasses import dataclass, field

from medicalgpt.arguments import parse_stage
from medicalgpt.base import open_base
from medicalgpt.collator import PairCollator
from medicalgpt.dataset import load_data
from medicalgpt.errors import run_script
from medicalgpt.flags import parse_arguments, require
from medicalgpt.records import parse_pair
from medicalgpt.row_log import RowLog
from medicalgpt.scoring import JudgeArguments, score_file, separate_pad_token
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

ALIKE = 0.1  # lengths that differ by less than this share of the longer one are called alike


@dataclass
class RewardArguments:
    """What only reward modelling has."""

    center_rewards_coefficient: float = field(
        default=0.0,
        metadata={"help": "weight of (chosen + rejected)², which keeps scores around 0, e.g. 0.01; 0: none"},
    )

    def __post_init__(self):
        require(
            self.center_rewards_coefficient >= 0,
            f"--center_rewards_coefficient {self.center_rewards_coefficient} is not allowed; expected 0 or "
            "more",
        )


SUFFIXES = (".jsonl", ".json")
DEFAULTS = {
    "output_dir": "outputs-rm-qwen-v1",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-4,
}


def pair_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor, center_coefficient: float = 0.0
) -> torch.Tensor:
    """Return − log σ(r_w − r_l − m) + c (r_w + r_l)² of every pair, (P,).

    Bradley–Terry as in arXiv:2203.02155, eq. 1; m: the margin of arXiv:2307.09288, eq. 2; c centres the
    scores, which the first term leaves free (arXiv:2312.09244).

    Args:
        chosen, rejected, margins: scores and margins, (P,) fp32.
    """
    return -F.logsigmoid(chosen - rejected - margins) + center_coefficient * (chosen + rejected) ** 2


class RewardTrainer(StageTrainer):
    """Reward modelling: the items are pairs."""

    def __init__(self, *, center_coefficient: float, **kwargs):
        super().__init__(**kwargs)
        self.center_coefficient = center_coefficient

    def batch_sums(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over pairs: loss, ranked right, margin, scores; ranked right by length as well."""
        scores = model(**batch).view(-1, 2)  # (P, 2): chosen, rejected
        losses = pair_loss(*scores.unbind(1), batch["margins"], self.center_coefficient)
        lengths = batch["sequence_index"].bincount(minlength=scores.numel()).view(-1, 2)
        margins = scores[:, 0] - scores[:, 1]
        right = (margins.sign() + 1) / 2  # a tie is half right
        sums = {
            "loss": losses.sum(),
            "accuracy": right.sum(),
            "margin": margins.sum(),
            "score": scores.sum() / 2,
            "score_squared": (scores**2).sum() / 2,
        }
        for name, where in by_length(lengths).items():
            sums |= {f"pairs_{name}": where.sum(), f"right_{name}": right[where].sum()}
        return sums

    def count_items(self, batch: dict) -> int:
        """Return the number of pairs."""
        return batch["num_sequences"] // 2

    def final_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Add the spread of the scores, and the accuracy by length: a reward for length shows there.

        `accuracy_chosen_longer` far above `accuracy_rejected_longer` means that the model pays for length.
        """
        metrics = {name: means[name] for name in ("loss", "accuracy", "margin", "score") if name in means}
        metrics["score_std"] = max(means["score_squared"] - means["score"] ** 2, 0) ** 0.5
        for name in ("chosen_longer", "rejected_longer", "alike"):
            if means[f"pairs_{name}"]:
                metrics[f"accuracy_{name}"] = means[f"right_{name}"] / means[f"pairs_{name}"]
                metrics[f"share_{name}"] = means[f"pairs_{name}"]
        return metrics


def by_length(lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return which pairs have the longer chosen answer, the longer rejected one, two alike, (P,) bool each.

    Args:
        lengths: tokens of the answers, (P, 2), chosen then rejected.
    """
    alike = lengths.min(1).values > (1 - ALIKE) * lengths.max(1).values
    longer = lengths[:, 0] > lengths[:, 1]
    return {"chosen_longer": longer & ~alike, "rejected_longer": ~longer & ~alike, "alike": alike}


def main(argv: list[str]) -> None:
    """Train, or continue training, as the flags say; or score a file."""
    if any(arg.partition("=")[0] == "--score_file" for arg in argv):
        score_file(*parse_arguments(argv, (JudgeArguments,), __doc__, {}))
        return

    # 1. Flags
    flags = parse_stage(argv, RewardArguments, __doc__, DEFAULTS)

    # 2. Data: every row is read and checked before a model is looked at
    data = load_data(flags, parse_pair, SUFFIXES)
    base = open_base(flags)
    separate_pad_token(base.tokenizer, base.chat_format)

    # 3. The run: new, to be continued, or done
    record = open_run("rm", flags, base, data)
    if record is None:
        return

    # 4. Pairs → ids
    encoder = chat_encoder(flags, base)
    train = encoder.encode_pairs(data.train, data.log)
    validation = encoder.encode_pairs(data.validation, RowLog())
    report_data(data, train, validation, flags.run)
    show_pair(base.tokenizer, train[0])

    # 5. Model: a score head in place of the vocabulary
    model = build_model(flags, base, max_length=flags.chat.model_max_length, scores=True)
    model.config.pad_token_id = base.tokenizer.pad_token_id
    choose_activation_checkpointing(model, flags.run, train)

    # 6. Train, evaluate, save
    trainer = RewardTrainer(
        model=model,
        args=flags.run,
        record=record,
        data_collator=PairCollator(padded=model.padded),
        train_dataset=train,
        eval_dataset=validation,
        center_coefficient=flags.own.center_rewards_coefficient,
    )
    run_training(trainer, record, base)


if __name__ == "__main__":
    run_script(main, resumable=True)
