"""The optimizer of one part of a backbone (policy or value function) with its learning-rate schedule."""

import math
from typing import Any

from medicalgpt.arguments import StageArguments
from medicalgpt.errors import RunError
from medicalgpt.rank_means import RankMeans
from medicalgpt.trainer import begun

import torch
from transformers import get_scheduler


class PartOptimizer:
    """AdamW on one part; its schedule goes on once per update, however many steps that has.

    Args:
        name: of the part, for messages.
        max_steps: updates of the run.
    """

    def __init__(
        self,
        name: str,
        parameters: list[torch.nn.Parameter],
        learning_rate: float,
        args: StageArguments,
        max_steps: int,
    ):
        self.name, self.parameters, self.max_norm = name, parameters, args.max_grad_norm or math.inf
        self.adam = torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        warmup = args.get_warmup_steps(max_steps)
        self.schedule = begun(get_scheduler(args.lr_scheduler_type, self.adam, warmup, max_steps + 1))

    @property
    def learning_rate(self) -> float:
        """The rate of this update's steps."""
        return self.schedule.get_last_lr()[0]

    def add_up_and_clip(self, means: RankMeans) -> float:
        """Add the gradient up over ranks, clip it to --max_grad_norm, and return its norm before.

        Raises:
            RunError: it is not finite.
        """
        for parameter in self.parameters:
            if parameter.grad is None:  # a rank without answers
                parameter.grad = torch.zeros_like(parameter)
            means.add_up(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm).item()
        if not math.isfinite(norm):
            raise RunError(
                f"the gradient of {self.name} is not finite; nothing was changed by this step; lower "
                "--learning_rate"
            )
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {"adam": self.adam.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self.adam.load_state_dict(state["adam"])
        self.schedule.load_state_dict(state["schedule"])
