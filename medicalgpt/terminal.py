"""The terminal of the chat: lines that a person types or a pipe brings, and answers as they come."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from medicalgpt.chat_session import COMMANDS

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

HISTORY_FILE = Path("~/.cache/medicalgpt/chat_history")
DIM, NORMAL = "\x1b[2m", "\x1b[0m"
# What a terminal would obey instead of showing it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_rich() -> bool:
    """True where a person sits at a terminal that can more than print lines."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """Writes answers at once; dims what stands between <think> and </think>; no control character gets out.

    Args:
        dims: the terminal knows dimmed text.
        opens: an answer begins inside a thought.
    """

    MARKS = ("<think>", "</think>")

    def __init__(self, *, dims: bool, opens: bool = False):
        self.dims = dims
        self.opens = opens
        self.held = ""
        self.is_dim = False

    def begin(self) -> None:
        """An answer begins."""
        self.held = ""
        if self.dims and self.opens:
            self.turn(True)

    def write(self, text: str) -> None:
        """Write a piece of an answer."""
        if not self.dims:
            self.out(text)
            return
        text = self.held + text
        for part in re.split("(</?think>)", text[: len(text) - self.partial_mark(text)]):
            if part == "<think>":
                self.turn(True)
            self.out(part)
            if part == "</think>":
                self.turn(False)
        self.held = text[len(text) - self.partial_mark(text) :]

    def end(self) -> None:
        """An answer ends: nothing stays held back or dimmed."""
        self.out(self.held)
        self.held = ""
        if self.is_dim:
            self.turn(False)

    def partial_mark(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a mark."""
        return max(
            (n for mark in self.MARKS for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0
        )

    def turn(self, is_dim: bool) -> None:
        """Dim what follows, or not."""
        self.is_dim = is_dim
        sys.stdout.write(DIM if is_dim else NORMAL)

    @staticmethod
    def out(text: str) -> None:
        """Write text without waiting for the line's end."""
        sys.stdout.write(CONTROL.sub("\ufffd", text))
        sys.stdout.flush()


class AnswerInterrupt:
    """Ctrl-C ends an answer while one is being written, and the program otherwise."""

    def __init__(self):
        self.answering = False
        self.asked = False
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, *_) -> None:
        """Note the signal, or end the program."""
        if not self.answering:
            raise KeyboardInterrupt
        self.asked = True

    def is_asked(self) -> bool:
        """Return whether the answer is to end."""
        return self.asked


def enter_sends() -> KeyBindings:
    """Return keys: Enter sends, Alt-Enter begins a new line."""
    keys = KeyBindings()
    keys.add("enter")(send)
    keys.add("escape", "enter")(new_line)
    return keys


def send(event: KeyPressEvent) -> None:
    """Send what was typed."""
    event.current_buffer.validate_and_handle()


def new_line(event: KeyPressEvent) -> None:
    """Begin a new line."""
    event.current_buffer.insert_text("\n")


def open_history() -> FileHistory | InMemoryHistory:
    """Return the history of typed lines, kept in a file of the person's own where that can be."""
    path = HISTORY_FILE.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def lines() -> Iterator[str]:
    """Yield questions and commands until the end of input. Ctrl-C drops a line."""
    if is_rich():
        words = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
        session: PromptSession = PromptSession(
            history=open_history(),
            key_bindings=enter_sends(),
            multiline=True,
            completer=words,
            complete_while_typing=False,
            enable_suspend=True,
        )
        ask = session.prompt
    else:
        ask = ask_plainly
    while True:
        try:
            line = ask("\nQuestion: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            continue
        if line.strip():
            yield line


def ask_plainly(prompt: str) -> str:
    """Read a line as any program does."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
