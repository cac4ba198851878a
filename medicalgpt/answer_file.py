"""A file of prompts → a file of answers, window by window, continued where it was stopped.

An unfinished output has `.partial` behind its name, and what made it stands in `.partial.json`. A window
holds a few batches, sorted by length; batches are dealt to ranks and seeded by their place in the file, so
that the answers depend neither on the number of ranks nor on where a run was stopped.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medicalgpt.checkpoint import PARTIAL
from medicalgpt.data_files import read_rows, read_text_lines
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.generation import Answer, Generator
from medicalgpt.records import parse_prompt
from medicalgpt.row_log import RowLog
from medicalgpt.tokenization import ChatEncoder
from medicalgpt.tool_formats import parse_tool_call
from template import Message

import torch
from tqdm import tqdm

WINDOW = 8  # batches that are sorted by length together


@dataclass(frozen=True)
class Prompt:
    """A row of the input, and what is to be answered."""

    row: dict
    messages: list[Message]
    tools: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Speaker:
    """A model that answers, with the encoder of its format.

    Attributes:
        suffix: of the fields its answers get.
    """

    generator: Generator
    encoder: ChatEncoder
    suffix: str = ""


def read_prompts(path: Path, system_prompt: str | None) -> list[Prompt]:
    """Return the prompts of a .jsonl, .json or .txt file (one prompt a line).

    Raises:
        ConfigError: no such file. DataError: a row without prompt.
    """
    if not path.is_file():
        raise ConfigError(f"--data_file {path} does not exist; expected a .jsonl, .json or .txt file")
    if path.suffix == ".txt":
        lines = read_text_lines(path, RowLog())
        rows: Iterator = (({"prompt": line}, f"{path}:{number}") for line, number in lines if line.strip())
    else:
        rows = read_rows(path)
    system = [] if system_prompt is None else [Message("system", system_prompt)]
    prompts = []
    for row, origin in rows:
        messages, tools = parse_prompt(row, origin)
        prompts.append(Prompt(row, messages if messages[0].role == "system" else [*system, *messages], tools))
    if not prompts:
        raise DataError(f"--data_file {path} holds no prompt")
    return prompts


# ---- the unfinished file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFile:
    """The answers so far.

    Args:
        identity: what the answers depend on; an unfinished file of another identity is refused.
    """

    path: Path
    identity: dict[str, object]

    @property
    def partial(self) -> Path:
        """The unfinished file."""
        return Path(f"{self.path}{PARTIAL}")

    @property
    def record(self) -> Path:
        """Who made it."""
        return Path(f"{self.partial}.json")

    def begin(self, overwrite: bool) -> int:
        """Return how many answers stand in the unfinished file, whose torn last line is cut off.

        Raises:
            ConfigError: it was made from another input, model or flags.
        """
        if not (self.partial.exists() and self.record.exists()):
            return self.begin_anew()
        old = json.loads(self.record.read_text(encoding="utf-8"))
        changed = [
            f"{name}: {old.get(name)} → {value}"
            for name, value in self.identity.items()
            if old.get(name) != value
        ]
        if changed and overwrite:
            return self.begin_anew()
        if changed:
            raise ConfigError(
                f"--output_file {self.path}: {self.partial} was begun differently ({'; '.join(changed)}); "
                "repeat the old command to continue, or use --overwrite True to begin anew"
            )
        content = self.partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(self.partial, "r+b") as file:
                file.truncate(len(whole))
        return whole.count(b"\n")

    def begin_anew(self) -> int:
        """Forget what an earlier run left; nothing is answered yet."""
        self.partial.unlink(missing_ok=True)
        self.record.write_text(json.dumps(self.identity, ensure_ascii=False), encoding="utf-8")
        return 0

    def add(self, rows: Sequence[dict]) -> None:
        """Append answers, on the disk before this returns."""
        with open(self.partial, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the file its name."""
        self.partial.touch()
        os.replace(self.partial, self.path)
        self.record.unlink(missing_ok=True)


# ---- answering ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The processes that answer together."""

    rank: int = 0
    world_size: int = 1

    def gather(self, mine: dict[int, list[Answer]]) -> dict[int, list[Answer]]:
        """Return the answers of all ranks."""
        if self.world_size == 1:
            return mine
        every: list[dict] = [{}] * self.world_size
        torch.distributed.all_gather_object(every, mine)
        return {index: answers for part in every for index, answers in part.items()}


def batch_seed(seed: int, *place: int) -> int:
    """Return the seed of a batch, from its place in the file."""
    return int.from_bytes(hashlib.sha256(repr((seed, *place)).encode()).digest()[:4], "big")


@dataclass(frozen=True)
class FileAnswerer:
    """Answers prompts with one or two models.

    Args:
        num_answers: answers per prompt.
    """

    speakers: Sequence[Speaker]
    batch_size: int
    num_answers: int
    seed: int
    ranks: Ranks

    def answer_file(self, prompts: Sequence[Prompt], output: OutputFile | None, num_done: int) -> None:
        """Answer the prompts that are not answered yet; `output` is None on ranks that write nothing."""
        size, num_tokens, begun = WINDOW * self.batch_size, 0, time.perf_counter()
        bar = tqdm(
            total=len(prompts),
            initial=num_done,
            unit="prompt",
            file=sys.stderr,
            desc="answering",
            disable=output is None,
        )
        with bar:
            for begin in range(num_done // size * size, len(prompts), size):
                window = prompts[begin : begin + size]
                rows = self.answer_window(window, begin)
                new = rows[max(0, num_done - begin) :]
                if output is not None:
                    output.add(new)
                num_tokens += sum(count_tokens(row) for row in rows)
                bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - begun):.1f} tokens/s")
                bar.update(len(new))

    def answer_window(self, window: Sequence[Prompt], begin: int) -> list[dict]:
        """Return the rows of one window with their answers, in input order."""
        rows = [dict(prompt.row) for prompt in window]
        for speaker in self.speakers:
            encoded = [speaker.encoder.encode_prompt(p.messages, p.tools)[0] for p in window]
            order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: len(encoded[i]))
            mine: dict[int, list[Answer]] = {}
            batches = [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
            for number, batch in enumerate(batches):
                if number % self.ranks.world_size != self.ranks.rank:
                    continue
                torch.manual_seed(batch_seed(self.seed, begin, number))
                asked = [encoded[i] for i in batch for _ in range(self.num_answers)]
                answers = speaker.generator.answer(asked)
                for k, i in enumerate(batch):
                    mine[i] = answers[k * self.num_answers : (k + 1) * self.num_answers]
            answered = self.ranks.gather(mine)
            for i, prompt in enumerate(window):
                fields = answer_fields(answered.get(i), speaker.encoder.max_length, bool(prompt.tools))
                rows[i] |= {name + speaker.suffix: value for name, value in fields.items()}
        return rows


def count_tokens(row: dict) -> int:
    """Return how many tokens a row's answers have."""
    count = row.get("num_response_tokens") or 0
    return sum(count) if isinstance(count, list) else count


def answer_fields(answers: list[Answer] | None, limit: int, has_tools: bool) -> dict[str, object]:
    """Return what the answers add to their row; lists where there are several."""
    if answers is None:
        message = f"the prompt is longer than {limit} tokens"
        return {"response": None, "finish_reason": "error", "error": message}
    columns: dict[str, list] = {
        "response": [answer.text for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "num_prompt_tokens": [answer.num_prompt_tokens for answer in answers],
        "num_response_tokens": [answer.num_response_tokens for answer in answers],
    }
    if any(answer.thought for answer in answers):
        columns["thinking"] = [answer.thought for answer in answers]
    if has_tools:
        columns["tool_calls"] = [
            [{"name": call.name, "arguments": call.arguments} for call in parse_tool_call(answer.text)]
            for answer in answers
        ]
    columns["num_prompt_tokens"] = columns["num_prompt_tokens"][:1] * len(answers)
    return columns if len(answers) > 1 else {name: values[0] for name, values in columns.items()}
