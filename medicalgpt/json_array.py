"""Reads the values of a JSON array of any size in a stream. Standard library only."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from medicalgpt.errors import DataError
from medicalgpt.file_faults import line_fault
from medicalgpt.json_values import BLANKS, DECODER, decoder_says, reason

MAX_ROW_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
LONGEST_WORD = 12  # characters of -Infinity or \\ud83d\\ude00, which a chunk's end may part


def utf8_chunks(path: Path) -> Iterator[str]:
    """Yield a file's text piece by piece.

    Raises:
        DataError: a byte that is not UTF-8, or a NUL, with its line; what stands before was yielded.
    """
    line, before, pending = 1, 0, b""
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while True:
            chunk = file.read(CHUNK_BYTES)
            raw, fault = pending + chunk, None
            try:
                text, used = codecs.utf_8_decode(raw, "strict", not chunk)
            except UnicodeDecodeError as error:
                text, used, fault = raw[: error.start].decode(), error.start, error
            if "\0" in text:
                number = line + text.count("\n", 0, text.index("\0"))
                raise DataError(f"{path}:{number}: a NUL character; remove it")
            yield text
            line += text.count("\n")
            before = len(text) - text.rfind("\n") - 1 + (0 if "\n" in text else before)
            pending = raw[used:]
            if fault:
                bad = pending.partition(b"\n")[0]
                what, _ = line_fault(bad, UnicodeDecodeError("utf-8", bad, 0, 1, fault.reason), before)
                raise DataError(f"{path}:{line}: {what}")
            if not chunk:
                return


class ArrayReader:
    """A window that slides over the text of a JSON array.

    Attributes:
        text: what is in memory. position: the next character. line: its line.
        ended: nothing follows behind `text`.
    """

    def __init__(self, path: Path, chunks: Iterator[str] | None = None, decoder: json.JSONDecoder = DECODER):
        self.path, self.decoder = path, decoder
        self.chunks = chunks or utf8_chunks(path)
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def read_more(self) -> None:
        """Forget what is behind the position, and read on."""
        self.text = self.text[self.position :]
        self.position = 0
        chunk = next(self.chunks, None)
        self.ended = chunk is None
        self.text += chunk or ""

    def move(self, end: int) -> None:
        """Go on to a place in the text."""
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def peek(self) -> str:
        """Return the next character that is no white space, or an empty string at the end."""
        while True:
            self.move(BLANKS.match(self.text, self.position).end())
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def fault(self, what: str) -> DataError:
        """Return a refusal of what stands at the position."""
        return DataError(f"{self.path}:{self.line}: {what}")

    def values(self) -> Iterator[tuple[object, str, str]]:
        """Yield (value, its text, `file:line`).

        Raises:
            DataError: what is wrong with the array.
        """
        first = self.peek()
        if not first:
            raise DataError(f"{self.path}:1: the file is blank; remove it or fill it")
        if first != "[":
            raise self.fault("a .json file must hold one array of objects; name it .jsonl if it is lines")
        self.move(self.position + 1)
        while self.peek() != "]":
            origin = f"{self.path}:{self.line}"
            value, end = self.decode(origin)
            yield value, self.text[self.position : end], origin
            self.move(end)
            if self.peek() == ",":
                self.move(self.position + 1)
                if self.peek() == "]":
                    raise self.fault("a comma before the end of the array; remove it")
            elif self.peek() != "]":
                raise self.fault("expected ',' or ']' after a row; the file may be cut off")
        self.move(self.position + 1)
        if self.peek():
            raise self.fault("text after the end of the array; remove it, or name the file .jsonl")

    def decode(self, origin: str) -> tuple[object, int]:
        """Return (the value at the position, where it ends), reading on until it is whole."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                at_end = error.pos >= len(self.text.rstrip()) or error.msg.startswith("Unterminated string")
                near_end = at_end or error.pos >= len(self.text) - LONGEST_WORD
                if self.ended or not near_end:
                    line = self.line + self.text.count("\n", self.position, error.pos)
                    cut = "the file is cut off" if at_end else "broken JSON"
                    raise DataError(
                        f"{self.path}:{line}: {cut}: {decoder_says(error)} this place; mend it"
                    ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{origin}: {reason(error)}; mend it") from None
            else:
                border = LONGEST_WORD if isinstance(value, int | float) else 1  # 1 of 1.5 is no end
                if end + border <= len(self.text) or self.ended:
                    return value, end
            if len(self.text) - self.position > MAX_ROW_BYTES:
                raise DataError(f"{origin}: a row of more than {MAX_ROW_BYTES >> 20} MiB; split it")
            self.read_more()
