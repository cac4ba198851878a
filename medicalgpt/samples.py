"""Held-out prompts, answered by the reference and by the policy as it is: a table now and then, scores."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from medicalgpt.backbone import POLICY
from medicalgpt.errors import is_main_rank
from medicalgpt.questions import Question, Rollout
from medicalgpt.rank_means import RankMeans

import torch

# answers held-out prompts, given by their places, with the policy's adapter or none, and scores the answers
Answer = Callable[[Sequence[int], str | None], tuple[list[Rollout], torch.Tensor]]
logger = logging.getLogger("medicalgpt")


class SampleTable:
    """Logs the table and appends it to logs/samples.jsonl of the output directory.

    Args:
        every: updates between tables.
        questions: what is answered: the first of the held-out prompts.
    """

    def __init__(self, every: int, questions: Sequence[Question], output_dir: Path):
        self.every, self.questions, self.logs = every, questions, output_dir / "logs"
        self.before: list[tuple[str, float]] | None = None

    def show(self, step: int, last_step: int, answer: Answer) -> None:
        """Log the table if it is due; rank 0 answers alone."""
        due = step % self.every == 0 or step == last_step
        if not (self.questions and due and is_main_rank()):
            return
        if self.before is None:
            self.before = self.answers(answer, None)
        now = self.answers(answer, POLICY)
        rows = [
            {
                "step": step,
                "prompt": question.chat.messages[-1].content,
                "before": before,
                "score_before": score_before,
                "now": text,
                "score": score,
            }
            for question, (before, score_before), (text, score) in zip(
                self.questions, self.before, now, strict=True
            )
        ]
        for row in rows:
            logger.info(
                "sample step=%d prompt: %s\n  before (%.3g): %s\n  now    (%.3g): %s",
                step,
                one_line(row["prompt"]),
                row["score_before"],
                one_line(row["before"]),
                row["score"],
                one_line(row["now"]),
            )
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.logs / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def answers(self, answer: Answer, adapter: str | None) -> list[tuple[str, float]]:
        """Return the answers of the policy or (None) the reference with their scores."""
        rollouts, scores = answer(range(len(self.questions)), adapter)
        return [(rollout.text, score) for rollout, score in zip(rollouts, scores.tolist(), strict=True)]


def answer_metrics(rollouts: Sequence[Rollout], scores: torch.Tensor, means: RankMeans) -> dict[str, float]:
    """Return score, length and share of ended answers, over all ranks."""
    lengths = torch.tensor([float(len(rollout.draw.ids)) for rollout in rollouts])
    ended = torch.tensor([float(rollout.draw.ended) for rollout in rollouts])
    return {
        "score": means.mean(scores),
        "score_std": means.std(scores),
        "response_length": means.mean(lengths),
        "ended": means.mean(ended),
    }


def one_line(text: str, limit: int = 300) -> str:
    """Return a text on one line, in at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
