"""Answers from a model: settings, stop tokens, batches, and an interruptible stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medicalgpt.tokenization import ChatFormat
from template import Template

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
        text: what is said, without the thought before it.
        thought: what was thought; "" where the format has no thoughts or this one is empty.
        finish_reason: "stop" (the model ended it), "length" (max_new_tokens), or "interrupted".
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_response_tokens: int
    thought: str = ""


class Interrupted(StoppingCriteria):
    """Ends a generation when `asked()` says so."""

    def __init__(self, asked: Callable[[], bool]):
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        """Return one flag per row, (B,)."""
        return torch.full((input_ids.shape[0],), self.asked(), dtype=torch.bool, device=input_ids.device)


class PrintStream(TextStreamer):
    """Passes text on as soon as it cannot change any more, and is no beginning of a stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], stops: Sequence[str] = ()
    ):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.stops = stops
        self.begun = self.ended = False
        self.held = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece; white space before an answer is not part of it."""
        if self.ended:
            return
        text = self.held + text
        found = [text.index(stop) for stop in self.stops if stop in text]
        self.ended = bool(found)
        keep = min(found) if found else len(text) - (0 if stream_end else self.may_be_stop(text))
        self.held = text[keep:]
        text = text[:keep] if self.begun else text[:keep].lstrip()
        self.begun |= bool(text)
        self.write(text)

    def may_be_stop(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a stop string."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


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
    return coherent((own or SAFE_SETTINGS) | given, "temperature" in given)


def coherent(settings: dict[str, object], has_temperature: bool) -> dict[str, object]:
    """Return settings without those that greedy decoding ignores; a given temperature means sampling."""
    if settings.get("temperature") == 0 or settings.get("do_sample") is False:  # greedy
        unread = ("temperature", "top_p", "top_k")
        return {name: value for name, value in settings.items() if name not in unread} | {"do_sample": False}
    return settings | ({"do_sample": True} if has_temperature else {})


def split_thought(text: str, template: Template) -> tuple[str, str]:
    """Return (thought, answer) of what a model wrote."""
    if not template.thought:
        return "", text.strip()
    head, mark, answer = text.rpartition("</think>")
    if mark:
        return head.split("<think>")[-1].strip(), answer.strip()
    if template.prompt_thought == "open" or text.lstrip().startswith("<think>"):  # cut while it was thinking
        return text.split("<think>")[-1].strip(), ""
    return "", text.strip()


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
        self.template = chat_format.template
        self.stop_ids = chat_format.stop_ids(tokenizer)
        self.stop_texts = [stop for stop in chat_format.stops if stop not in tokenizer.get_vocab()]
        tool_marks = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "<|python_tag|>"])
        self.special_ids = set(tokenizer.all_special_ids) - set(tool_marks)
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
            write: takes the text of a single prompt's answer as it comes, thought and all.
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
            streamer=PrintStream(self.tokenizer, write, self.stop_texts) if write else None,
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
        shown = [i for i in ids[:end] if i not in self.special_ids]
        text = self.tokenizer.decode(shown, skip_special_tokens=False)
        found = [text.index(stop) for stop in self.stop_texts if stop in text]
        text = text[: min(found)] if found else text
        ended = end is not None or bool(found)
        reason = "stop" if ended else "interrupted" if was_interrupted else "length"
        length = len(ids) if end is None else end + 1
        while end is None and length and ids[length - 1] == self.tokenizer.pad_token_id:
            length -= 1  # rows of a batch that ended before the longest are filled up
        thought, said = split_thought(text, self.template)
        return Answer(said, reason, num_prompt_tokens, length, thought)
