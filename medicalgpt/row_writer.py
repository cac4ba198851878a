"""Writes a file of rows beside its place; it gets its name when it is whole. Standard library only."""

import json
import os
from pathlib import Path
from typing import TextIO


class RowWriter:
    """Writes rows beside their file; `publish` gives the file its name, `discard` leaves nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        self.num_rows = 0
        self.file: TextIO | None = None

    def write(self, row: object) -> None:
        """Write one row: a line, or in a .json file an element of the array.

        Raises:
            ValueError: a number or a character that JSON or UTF-8 cannot hold.
        """
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        text.encode()
        self.write_text(text)

    def write_text(self, text: str) -> None:
        """Write one row that is text already."""
        if self.file is None:
            self.file = open(self.partial, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        if self.path.suffix == ".json":
            self.file.write((",\n" if self.num_rows else "[\n") + text)
        else:
            self.file.write(text + "\n")
        self.num_rows += 1

    def publish(self) -> None:
        """Put the rows under the file's name; without any row, a file of an older run goes."""
        if self.file is None:
            self.path.unlink(missing_ok=True)
            return
        if self.path.suffix == ".json":
            self.file.write("\n]\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Remove what was not published."""
        if self.file is not None:
            self.file.close()
            self.partial.unlink(missing_ok=True)
