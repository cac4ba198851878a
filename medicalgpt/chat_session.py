"""A talk with a model: what was said, and the commands that a person types between questions."""

import difflib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt.data_files import read_lines
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.generation import Answer, Generator, coherent
from medicalgpt.records import parse_messages
from medicalgpt.row_log import RowLog
from medicalgpt.tokenization import ChatEncoder
from template import Message

HELP = """\
/help                   this list
/system [TEXT]          show the system prompt, or set it (and begin anew)
/clear                  forget the conversation
/retry                  answer the last question again
/undo                   take the last question and its answer back
/save FILE              write the conversation as a line of training data
/load FILE              go on with a saved conversation
/params [NAME VALUE]    show the settings of generation, or change one
/tokens                 how much of the context is used
/exit                   end (or Ctrl-D); a question that begins with a slash is typed with two"""
LEAST_PROMPT = 8  # tokens that a prompt has room for
RANGES: dict[str, tuple[type, float, float]] = {  # name: type, smallest, largest
    "temperature": (float, 0.0, 10.0),
    "top_p": (float, 1e-6, 1.0),
    "top_k": (int, 1, 1_000_000),
    "repetition_penalty": (float, 1e-6, 10.0),
    "max_new_tokens": (int, 1, 1_000_000),
}


class Refused(Exception):
    """A command or question that cannot be carried out; says why."""


class Ended(Exception):
    """The person wants to leave."""


@dataclass
class Session:
    """One model's side of a talk.

    Args:
        write: takes the text of an answer as it comes.
        notice: takes lines about the talk.
        interrupted: asked after every token; True ends the answer.
    """

    generator: Generator
    encoder: ChatEncoder
    write: Callable[[str], None]
    notice: Callable[[str], None]
    interrupted: Callable[[], bool] = lambda: False
    system: str | None = None
    history: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """The conversation with its system prompt."""
        return [*([] if self.system is None else [Message("system", self.system)]), *self.history]

    @property
    def context(self) -> int:
        """Room for prompt and answer, in tokens."""
        return self.encoder.max_length + self.generator.settings["max_new_tokens"]

    def ask(self, question: str) -> Answer:
        """Answer a question; what outgrows the context loses its oldest turns.

        Raises:
            Refused: the question alone is longer than the context leaves room for.
        """
        self.history.append(Message("user", question))
        ids, dropped = self.encoder.encode_prompt(self.messages)
        if ids is None:
            self.history.pop()
            raise Refused("the question is longer than the context leaves room for; ask a shorter one")
        if dropped:
            self.notice(f"(the oldest {dropped} questions no longer fit and are forgotten)")
            self.history = self.history[2 * dropped :]
        begun = time.perf_counter()
        (answer,) = self.generator.answer([ids], write=self.write, interrupted=self.interrupted)
        seconds = time.perf_counter() - begun
        self.history.append(Message("assistant", answer.text))
        self.write("\n")
        ended = {"length": ", cut at max_new_tokens", "interrupted": ", interrupted"}
        self.notice(
            f"({answer.num_response_tokens} tokens, {answer.num_response_tokens / seconds:.1f} tokens/s"
            f"{ended.get(answer.finish_reason, '')})"
        )
        return answer

    # ---- commands ------------------------------------------------------------------------------------------

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash.

        Raises:
            Refused: no such command, or it cannot be done. Ended: /exit.
        """
        name, _, rest = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 2)
            hint = f"did you mean {' or '.join('/' + n for n in near)}? " if near else ""
            raise Refused(f"/{name} is no command; {hint}/help lists them")
        COMMANDS[name](self, rest.strip())

    def show_help(self, rest: str) -> None:
        """Carry out `/help`."""
        self.notice(HELP)

    def set_system(self, rest: str) -> None:
        """Carry out `/system [TEXT]`."""
        if not rest:
            self.notice("the template's own" if self.system is None else self.system)
            return
        self.system, self.history = rest, []
        self.notice("system prompt set; the conversation begins anew")

    def clear(self, rest: str) -> None:
        """Carry out `/clear`."""
        self.history = []
        self.notice("forgotten")

    def take_back(self) -> str:
        """Remove the last question and its answer; return the question."""
        if not self.history:
            raise Refused("nothing was asked yet")
        begin = max(index for index, message in enumerate(self.history) if message.role == "user")
        question = self.history[begin].content
        del self.history[begin:]
        return question

    def undo(self, rest: str) -> None:
        """Carry out `/undo`."""
        self.notice(f"taken back: {self.take_back()}")

    def retry(self, rest: str) -> None:
        """Carry out `/retry`."""
        self.ask(self.take_back())

    def save(self, rest: str) -> None:
        """Carry out `/save FILE`."""
        if not rest:
            raise Refused("/save needs a file's name")
        if not self.history:
            raise Refused("nothing was said yet")
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": names[m.role], "value": m.content} for m in self.messages]}
        try:
            with open(rest, "x", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise Refused(f"{rest} exists; give another name") from None
        except OSError as error:
            raise Refused(f"{rest}: {error.strerror}") from None
        self.notice(f"saved: {rest}")

    def load(self, rest: str) -> None:
        """Carry out `/load FILE`."""
        if not rest:
            raise Refused("/load needs a file's name")
        try:
            messages = parse_messages(*next(read_lines(Path(rest), RowLog())))
        except OSError as error:
            raise Refused(f"{rest}: {error.strerror}") from None
        except DataError as error:
            raise Refused(str(error)) from None
        has_system = messages[0].role == "system"
        self.system = messages[0].content if has_system else None
        self.history = messages[has_system:]
        if self.history[-1].role != "assistant":
            self.history.pop()
        self.notice(f"loaded: {sum(m.role == 'user' for m in self.history)} questions")

    def params(self, rest: str) -> None:
        """Carry out `/params [NAME VALUE]`."""
        if not rest:
            self.notice(
                "\n".join(f"{name} {value}" for name, value in sorted(self.generator.settings.items()))
            )
            return
        name, _, text = rest.partition(" ")
        if name not in RANGES:
            raise Refused(f"{name} cannot be set; choose from {', '.join(RANGES)}")
        kind, smallest, largest = RANGES[name]
        try:
            value = kind(text)
        except ValueError:
            raise Refused(f"{name} {text!r} is not allowed; expected {kind.__name__}") from None
        limit = self.context - LEAST_PROMPT if name == "max_new_tokens" else largest
        if not smallest <= value <= limit:
            raise Refused(f"{name} {value} is not allowed; expected {smallest:g} to {limit:g}")
        context = self.context
        changed = {name: value} | ({"do_sample": value > 0} if name == "temperature" else {})
        self.generator.settings = coherent(self.generator.settings | changed, name == "temperature")
        self.encoder.set_room(context - self.generator.settings["max_new_tokens"])
        self.notice(f"{name} {value}")

    def tokens(self, rest: str) -> None:
        """Carry out `/tokens`."""
        used = 0
        if self.history:
            turns = self.encoder.encode_turns([self.messages])[0]
            used = sum(len(turn.ids) for turn in turns)
        self.notice(
            f"{used} of {self.context} tokens of context, "
            f"{self.generator.settings['max_new_tokens']} of them kept free for an answer"
        )

    def leave(self, rest: str) -> None:
        """Carry out `/exit`."""
        raise Ended


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "help": Session.show_help,
    "system": Session.set_system,
    "clear": Session.clear,
    "retry": Session.retry,
    "undo": Session.undo,
    "save": Session.save,
    "load": Session.load,
    "params": Session.params,
    "tokens": Session.tokens,
    "exit": Session.leave,
}


def check_params(settings: dict[str, object]) -> None:
    """Refuse settings out of their ranges.

    Raises:
        ConfigError: names the flag.
    """
    for name, (_, smallest, largest) in RANGES.items():
        value = settings.get(name)
        if value is not None and not smallest <= value <= largest:
            raise ConfigError(f"--{name} {value} is not allowed; expected {smallest:g} to {largest:g}")
