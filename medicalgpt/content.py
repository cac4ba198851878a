"""What a text that is trained on may not hold. Standard library only."""

import re

from medicalgpt.errors import DataError
from medicalgpt.row_log import RowLog

# What makes control tokens of models, and no prose. A text that holds one was cut from a rendered prompt.
CONTROL_TEXT = re.compile(
    r"<\|[A-Za-z]\w{0,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|<eo[ahm]>|\[/?INST\]|<</?SYS>>"
)
ZERO_WIDTH = ("\u200b", "\u2060", "\ufeff")  # not the joiners, which shape emoji and scripts
CONVERSATION_FIELDS = {"conversations", "messages", "instruction", "input", "system", "history", "tools"}
CONTENT_FIELDS = {
    "text": {"text"},
    "chat": CONVERSATION_FIELDS | {"output"},
    "pair": CONVERSATION_FIELDS | {"question", "response_chosen", "response_rejected", "chosen", "rejected"},
}


INVISIBLE = str.maketrans(dict.fromkeys(ZERO_WIDTH))


def is_blank(text: str) -> bool:
    """True when nothing can be seen of a text."""
    visible = text.strip()
    return not visible or (visible[0] in ZERO_WIDTH and not visible.translate(INVISIBLE).strip())


def check_content(text: str, label: str, origin: str, log: RowLog) -> str:
    """Return a text that is fit to train on; zero-width characters stay, and are counted.

    Raises:
        DataError: it holds a NUL or a control token of some model.
    """
    if "\0" in text:
        raise DataError(f"{origin}: {label}: holds a NUL character; remove it")
    if "<" in text or "INST]" in text:
        found = CONTROL_TEXT.search(text)
        if found:
            raise DataError(
                f"{origin}: {label}: holds the marker {found[0]!r}, which belongs to chat formats and not to "
                "text; remove it"
            )
    if not text.isascii() and any(char in text for char in ZERO_WIDTH):
        log.add("zero_width_characters", origin)
    return text


def check_fields(row: dict, kind: str, origin: str, log: RowLog) -> None:
    """Check every text of the fields that are trained on; see `check_content`."""
    for name, value in row.items():
        if name in CONTENT_FIELDS[kind]:
            check_value(value, name, origin, log)


def check_value(value: object, label: str, origin: str, log: RowLog) -> None:
    """Check every text in a JSON value."""
    if isinstance(value, str):
        check_content(value, label, origin, log)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_value(item, f"{label}[{index}]", origin, log)
    elif isinstance(value, dict):
        for name, item in value.items():
            check_value(item, f"{label}.{name}", origin, log)
