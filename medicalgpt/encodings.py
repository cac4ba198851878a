"""Which encoding a text file has: found by strict decoding of the whole file, a piece at a time.

Standard library only.
"""

import codecs
import re
from pathlib import Path

from medicalgpt.errors import ConfigError, DataError
from medicalgpt.file_faults import HEAD_BYTES, NOT_TEXT, wide_encoding

PIECE = 1 << 20  # bytes
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark begins the same
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NON_ASCII = re.compile(r"[^\x00-\x7f]")


def recognise_encoding(path: Path, chosen: str | None = None) -> str:
    """Return the codec that decodes the whole file: by its mark, else UTF-8, else GB18030 (which holds GBK).

    Args:
        path: a text file.
        chosen: --encoding; it is then only checked.

    Raises:
        ConfigError: there is no codec of the chosen name.
        DataError: the file is empty, no text, or in none of these encodings.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.strip():
        raise DataError(f"{path}:1: the file is empty; remove it or fill it")
    for magic, what in NOT_TEXT.items():
        if head.lstrip().lower().startswith(magic.lower()):
            raise DataError(f"{path}:1: the file is {what}")
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if chosen:
        try:
            codecs.lookup(chosen)
        except LookupError:
            raise ConfigError(f"--encoding {chosen} is not known; expected utf-8, gb18030, …") from None
    if marked == "utf-8-sig" and chosen in (None, "utf-8", "utf8", "UTF-8"):
        chosen = marked  # else the mark would stick to the first column's name
    wide = None if chosen or marked else wide_encoding(head)
    candidates = [name] if (name := chosen or marked or wide) else ["utf-8", "gb18030"]
    faults = []
    for name in candidates:
        fault = decoding_fault(path, name, is_chosen=chosen is not None)
        if fault is None:
            return name
        faults.append(fault)
    others = "".join(f" and {fault.partition(': ')[2]}" for fault in faults[1:])
    expected = " or ".join(candidates)
    raise DataError(f"{path}:{faults[0]}{others}; expected {expected}, or name it with --encoding")


def decoding_fault(path: Path, encoding: str, *, is_chosen: bool = False) -> str | None:
    """Return `line: what` of the first place that does not decode, or None where the whole file does.

    Args:
        is_chosen: the user named the encoding; what decodes is then not doubted.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    line, foreign = 1, ""
    with open(path, "rb") as file:
        while True:
            piece = file.read(PIECE)
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                return f"{line}: byte 0x{error.object[error.start]:02x} does not decode as {encoding}"
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                return f"{line}: a NUL character stands where text is due in {encoding}"
            if encoding == "gb18030" and len(foreign) < 10_000:
                foreign += "".join(NON_ASCII.findall(text))
            line += text.count("\n")
            if not piece:
                break
    common = len(foreign.encode("gb2312", "ignore")) / 2
    if foreign and not is_chosen and common < len(foreign) / 2:
        return "1: would be Chinese of mostly rare characters in gb18030, so it is probably none"
    return None
