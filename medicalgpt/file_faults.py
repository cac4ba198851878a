"""Names what is wrong with bytes that should be UTF-8 text. Standard library only."""

import codecs
import re

HEAD_BYTES = 4096

NOT_TEXT = {
    b"\x1f\x8b": "gzip data; unpack it first",
    b"BZh": "bzip2 data; unpack it first",
    b"\xfd7zXZ": "xz data; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd data; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it, or name a workbook .xlsx for convert_dataset.py",
    b"PAR1": "a Parquet table; name it .parquet, convert_dataset.py makes rows of it",
    b"\xd0\xcf\x11\xe0": "an old .xls workbook; save it as .xlsx for convert_dataset.py",
    b"%PDF": "a PDF document; extract its text first",
    b"\x89PNG": "a picture, not data",
    b"\xff\xd8\xff": "a picture, not data",
    b"SQLite format 3": "a database, not text; export its rows first",
    b"version https://git-lfs": "a Git LFS pointer, not the data; run git lfs pull",
    b"<!doctype html": "an HTML page, not data; download the file itself",
    b"<html": "an HTML page, not data; download the file itself",
    b"<?xml": "XML, not data; extract its text first",
}

UTF_16_32 = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
HEADING = rb'"?[^{}\[\]":]{1,60}"?'  # of a table's column
SAVE = "save it as UTF-8, or validate_jsonl.py --fix does"


def wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 (with its byte order where no mark tells it), or None."""
    for mark, name in UTF_16_32:
        if head.startswith(mark):
            return name
    if head[:2] in (b"{\0", b"[\0") or head[:2] in (b"\0{", b"\0["):
        return "UTF-16-BE" if head[0] == 0 else "UTF-16-LE"
    sample = head[: len(head) // 2 * 2]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    half = len(sample) // 2
    if half > 3 and max(even, odd) > 0.4 * half and min(even, odd) < 0.05 * half:
        return "UTF-16-BE" if even > odd else "UTF-16-LE"
    return None


def file_fault(head: bytes, suffix: str) -> str | None:
    """Return what a file is that is no UTF-8 text at all, from its first bytes; None when it may be text."""
    wide = wide_encoding(head)
    if wide:
        return f"{wide} text; {SAVE}"
    begin = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for magic, what in NOT_TEXT.items():
        if begin[: len(magic)].lower() == magic.lower():
            return what
    cells = re.split(rb"[,\t]", begin.partition(b"\n")[0].strip())
    if suffix != ".txt" and len(cells) > 1 and all(re.fullmatch(HEADING, cell) for cell in cells):
        return f"a table (CSV or TSV) under the name {suffix}; convert_dataset.py makes rows of it"
    return None


def chinese_encoding(raw: bytes) -> str | None:
    """Return GBK or GB18030 when bytes that are not UTF-8 read as Chinese in it, else None.

    Almost any bytes decode as GBK; most of what is really meant lies in the old, common set GB 2312.
    """
    for name in ("gbk", "gb18030"):
        try:
            wide = [char for char in raw.decode(name) if char > "\x7f"]
        except UnicodeDecodeError:
            continue
        common = "".join(wide).encode("gb2312", "ignore")
        return name.upper() if len(wide) > 1 and len(common) >= 1.2 * len(wide) else None
    return None


def line_fault(raw: bytes, error: UnicodeDecodeError, before: int = 0) -> tuple[str, bool]:
    """Return (what is wrong with a line that is not UTF-8, True when it is in a Chinese encoding).

    Args:
        before: how many characters of the line stand before `raw`.
    """
    read = raw.decode("utf-8", "replace")
    broken = read.count("\ufffd")
    sound = sum(char > "\x7f" for char in read) - broken
    chinese = chinese_encoding(raw)
    if chinese and broken > sound:
        return f"the text is {chinese}, not UTF-8; {SAVE}", True
    byte = raw[error.start]
    column = before + len(raw[: error.start].decode("utf-8", "replace")) + 1
    return (
        f"byte 0x{byte:02x} is not UTF-8 (column {column}: a stray byte or half a character); mend the line",
        False,
    )
