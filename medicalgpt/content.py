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


INVISIBLE_FOUND = "zero_width_characters"  # the reason in a log
INVISIBLE = str.maketrans(dict.fromkeys(ZERO_WIDTH))


def is_blank(text: str) -> bool:
    """True when nothing can be seen of a text."""
    visible = text.strip()
    return not visible or (visible[0] in ZERO_WIDTH and not visible.translate(INVISIBLE).strip())


def has_invisible(text: str) -> bool:
    """True when a text holds zero-width characters."""
    return not text.isascii() and any(char in text for char in ZERO_WIDTH)


def check_content(text: str, label: str, origin: str) -> str:
    """Return a text that is fit to train on.

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
    return text


def check_fields(row: dict, kind: str, origin: str, log: RowLog) -> None:
    """Check every text of the fields that are trained on; a row with zero-width characters is counted."""
    fields = CONTENT_FIELDS[kind]
    if any([check_value(value, name, origin) for name, value in row.items() if name in fields]):
        log.add(INVISIBLE_FOUND, origin)


def check_value(value: object, label: str, origin: str) -> bool:
    """Check every text in a JSON value; True when one holds zero-width characters."""
    if isinstance(value, str):
        return has_invisible(check_content(value, label, origin))
    if isinstance(value, list):
        return any([check_value(item, f"{label}[{index}]", origin) for index, item in enumerate(value)])
    if isinstance(value, dict):
        return any([check_value(item, f"{label}.{name}", origin) for name, item in value.items()])
    return False
