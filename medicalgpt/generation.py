"""Answers from a model: settings, stop tokens, batches, and an interruptible stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medicalgpt.tokenization import ChatFormat

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import TextStreamer

# For models that bring no sampling settings: they end answers instead of repeating themselves.
SAFE_SETTINGS = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.15}


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        finish_reason: "stop" (the model ended it), "length" (max_new_tokens), or "interrupted".
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_response_tokens: int


class Interrupted(StoppingCriteria):
    """Ends a generation when `asked()` says so."""

    def __init__(self, asked: Callable[[], bool]):
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        """Return one flag per row, (B,)."""
        return torch.full((input_ids.shape[0],), self.asked(), dtype=torch.bool, device=input_ids.device)


class PrintStream(TextStreamer):
    """Passes text on as soon as it cannot change any more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece; white space before an answer is not part of it."""
        text = text if self.begun else text.lstrip()
        self.begun |= bool(text)
        self.write(text)


def generation_settings(model: PreTrainedModel, flags: dict[str, object]) -> dict[str, object]:
    """Return the settings of `generate`: flags, over the model's own sampling settings, over safe ones.

    Args:
        flags: do_sample, temperature, top_p, top_k, repetition_penalty, max_new_tokens; None: not given.
    """
    default = GenerationConfig()
    own = {
        name: getattr(model.generation_config, name)
        for name in SAFE_SETTINGS
        if getattr(model.generation_config, name) not in (None, getattr(default, name))
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = (own or SAFE_SETTINGS) | given
    if settings.get("temperature") == 0 or settings.get("do_sample") is False:  # greedy
        settings = {
            name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")
        }
        settings["do_sample"] = False
    elif "temperature" in given:
        settings["do_sample"] = True
    return settings


class Generator:
    """Answers prompts in one chat format.

    Args:
        settings: what `generation_settings` returns.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        settings: dict[str, object],
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stop_ids = chat_format.stop_ids(tokenizer)
        self.thought = chat_format.template.thought
        self.stop_texts = [stop for stop in chat_format.stops if stop not in tokenizer.get_vocab()]
        self.settings = settings
        # What the model's own configuration says about sampling would come back for every setting left out
        # here.
        model.generation_config = GenerationConfig()

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        write: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """Answer a batch of prompts, given as ids.

        Args:
            write: takes the text of a single prompt's answer as it comes.
            interrupted: asked after every token; True ends the answers.
        """
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]
        input_ids = torch.tensor(
            [[pad] * (width - len(ids)) + ids for ids in prompts], device=self.model.device
        )
        mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self.model.device
        )
        stops = {"stop_strings": self.stop_texts, "tokenizer": self.tokenizer} if self.stop_texts else {}
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            eos_token_id=self.stop_ids,
            pad_token_id=pad,
            streamer=PrintStream(self.tokenizer, write) if write else None,
            stopping_criteria=StoppingCriteriaList([Interrupted(interrupted)]),
            **self.settings,
            **stops,
        )
        return [
            self.finish(len(prompt), row[width:].tolist(), interrupted())
            for prompt, row in zip(prompts, output, strict=True)
        ]

    def finish(self, num_prompt_tokens: int, ids: list[int], was_interrupted: bool) -> Answer:
        """Cut an answer at its stop and say how it ended."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        stop_text = next((stop for stop in self.stop_texts if stop in text), None)
        if stop_text:
            text = text[: text.index(stop_text)]
        reason = "stop" if end is not None or stop_text else "interrupted" if was_interrupted else "length"
        if self.thought:  # an empty one says nothing
            text = text.removeprefix("\n\n".join(self.thought).rstrip())
        length = len(ids) if end is None else end + 1
        while end is None and length and ids[length - 1] == self.tokenizer.pad_token_id:
            length -= 1  # rows of a batch that ended before the longest are filled up
        return Answer(text.strip(), reason, num_prompt_tokens, length)
