"""Where an answer's score comes from: a reward adapter on the same base, another reward model, a function."""

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medicalgpt.arguments import StageFlags
from medicalgpt.backbone import Backbone
from medicalgpt.checkpoint import fingerprint, sha256
from medicalgpt.collator import GroupCollator, on_device
from medicalgpt.errors import ConfigError, ModelError, RunError, first_line
from medicalgpt.questions import Rollout, in_groups
from medicalgpt.rank_means import RankMeans
from medicalgpt.records import Message, Pair
from medicalgpt.run_record import check_base, recorded_template
from medicalgpt.scoring import Judge, check_is_reward_model, load_judge

import torch


class Scorer(Protocol):
    """Gives answers their scores."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the score of every answer."""


@dataclass(frozen=True)
class AdapterScorer:
    """A reward adapter on the policy's own base.

    The very ids that were drawn are scored, closed by the stop token that answers were trained with: where
    else a score is read, nothing was trained.
    """

    backbone: Backbone
    batch_size: int
    stop_id: int

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the score of every answer."""
        collate = GroupCollator(padded=self.backbone.model.padded)
        scores: list[float] = []
        for begin in range(0, len(rollouts), self.batch_size):
            batch = collate(in_groups(rollouts[begin : begin + self.batch_size], self.stop_id))
            scores += self.backbone.scores(on_device(batch, self.backbone.lm.device)).tolist()
        return scores


@dataclass(frozen=True)
class JudgeScorer:
    """A reward model with a base, tokenizer and chat format of its own: it reads the answer's text."""

    judge: Judge
    batch_size: int

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the score of every answer; a question too long for the reward model is NaN."""
        pairs = []
        for rollout in rollouts:
            chat, answer = rollout.prompt.chat, Message("assistant", rollout.text or " ")
            pairs.append(Pair(tuple(chat.messages), answer, answer, chat.origin, chat.tools))
        scores = self.judge.score(pairs, self.batch_size)
        return [math.nan if score is None else score for score in scores]


class FunctionScorer:
    """A Python function `reward(prompt, response)` → number.

    It gets by name what it has parameters for: `prompt` (the last question), `response` (the answer's text),
    `messages` (the whole conversation as role and content), `response_ids`, `ended`.
    """

    def __init__(self, function: Callable[..., float]):
        self.function = function
        self.names = list(inspect.signature(function).parameters)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the score of every answer."""
        scores = []
        for rollout in rollouts:
            messages = rollout.prompt.chat.messages
            known = {
                "prompt": messages[-1].content,
                "response": rollout.text,
                "messages": [{"role": m.role, "content": m.content} for m in messages],
                "response_ids": rollout.draw.ids,
                "ended": rollout.draw.ended,
            }
            try:
                value = self.function(**{name: known[name] for name in self.names})
                scores.append(float(value))
            except Exception as error:
                raise RunError(
                    f"--reward_function: {self.function.__name__} failed on {rollout.prompt.chat.origin}: "
                    f"{first_line(error)}"
                ) from error
        return scores

    @classmethod
    def load(cls, name: str) -> "FunctionScorer":
        """Load FILE.py:NAME.

        Raises:
            ConfigError: no such file or function, or one with other parameters.
        """
        path, _, function_name = name.rpartition(":")
        allowed = "expected FILE.py:NAME"
        if not path.endswith(".py") or not Path(path).is_file():
            raise ConfigError(f"--reward_function {name}: there is no file {path or name}; {allowed}")
        spec = importlib.util.spec_from_file_location("reward_function", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(
                f"--reward_function {name}: {path} cannot be run: {first_line(error)}"
            ) from None
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ConfigError(f"--reward_function {name}: {path} has no function {function_name}; {allowed}")
        names = set(inspect.signature(function).parameters)
        unknown = names - {"prompt", "response", "messages", "response_ids", "ended"}
        if unknown:
            raise ConfigError(
                f"--reward_function {name}: takes {', '.join(sorted(unknown))}; allowed are prompt, "
                "response, messages, response_ids, ended"
            )
        return cls(function)


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of the first update's scores: scores are learned from in these.

    The penalties of PPO then mean the same with every reward model (arXiv:1909.08593, section 2.2).
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: torch.Tensor, means: RankMeans) -> "ScoreScale":
        """Measure the scores of answers, (R,) on every rank; equal ones only lose their mean."""
        mean, std = means.mean(scores), means.std(scores)
        return cls(mean, std if std > 1e-6 * max(1.0, abs(mean)) else 1.0)  # rounding has a spread, too

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores in standard deviations from the mean, (R,)."""
        return (scores - self.mean) / self.std


def make_scorer(
    backbone: Backbone,
    reward_dir: Path | None,
    function: FunctionScorer | None,
    flags: StageFlags,
    *,
    stop_id: int,
) -> Scorer:
    """Return what scores answers: a function, a reward model of its own, or the backbone's reward adapter.

    Args:
        stop_id: the token that answers were trained to end with.
    """
    batch_size = flags.run.per_device_eval_batch_size
    if function is not None:
        return function
    if reward_dir is None:
        return AdapterScorer(backbone, batch_size, stop_id)
    judge = load_judge(Path(reward_dir), None, max_length=flags.chat.model_max_length)
    return JudgeScorer(judge, batch_size)


def check_scores(scores: Sequence[float], rollouts: Sequence[Rollout]) -> None:
    """Refuse scores that are no numbers.

    Raises:
        RunError: names the first prompt.
    """
    for score, rollout in zip(scores, rollouts, strict=True):
        if not math.isfinite(score):
            raise RunError(
                f"the score of the answer to {rollout.prompt.chat.origin} is {score}; nothing was trained on "
                "it; check the reward model or function"
            )


def shares_base(reward_dir: Path, sft_dir: Path, template: str) -> bool:
    """Return whether a reward model is an adapter for the policy's base, which then carries both.

    Raises:
        ModelError: it is an adapter of another base or chat format, or no reward model.
    """
    if not (reward_dir / "adapter_config.json").is_file():
        check_is_reward_model(reward_dir, None)
        return False
    check_is_reward_model(sft_dir, reward_dir)
    if not check_base(reward_dir, sft_dir):
        raise ModelError(
            f"{reward_dir} has no run.json, so nobody knows its base; merge it (merge_peft_adapter.py) and "
            "give the merged reward model"
        )
    trained = recorded_template(reward_dir)
    if trained != template:
        raise ModelError(
            f"{reward_dir} was trained with template {trained}, the policy has {template}; use one for both"
        )
    return True


def reward_identity(reward_dir: Path | None, function: str | None) -> dict[str, str]:
    """Return the fingerprint of what gives the scores."""
    if reward_dir is not None:
        return {"reward model": fingerprint(reward_dir)}
    return {"reward function": f"{sha256(Path(function.rpartition(':')[0]))} {function.rpartition(':')[2]}"}
