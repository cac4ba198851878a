"""Training and validation never share a row. Standard library only."""

import hashlib
import math

from medicalgpt.errors import DataError
from medicalgpt.records import Record


def key_hash(record: Record) -> int:
    """Return a number that depends on the record's prompt only, the same on every machine."""
    return int.from_bytes(hashlib.sha256(record.key.encode()).digest()[:8], "big")


def hold_out(records: list[Record], percentage: float) -> tuple[list[Record], list[Record]]:
    """Split records into (training, validation): the prompts of the smallest hashes are held out.

    Args:
        percentage: share of the prompts that are held out, in percent; at least one, and never all.

    Raises:
        DataError: all rows share one prompt, so that none can be held out.
    """
    hashes = [key_hash(record) for record in records]
    prompts = sorted(set(hashes))
    num_held = max(1, min(math.ceil(percentage / 100 * len(prompts)), len(prompts) - 1))
    limit = prompts[num_held] if len(prompts) > 1 else prompts[0]
    train = [record for record, value in zip(records, hashes, strict=True) if value >= limit]
    held = [record for record, value in zip(records, hashes, strict=True) if value < limit]
    if not train or not held:
        raise DataError(
            f"{records[0].origin}: all {len(records)} rows share one prompt, so none can be held out; "
            "add rows or use --do_eval False"
        )
    return train, held


def without_shared(records: list[Record], train: list[Record]) -> list[Record]:
    """Return the validation records whose prompt does not occur in training."""
    seen = {key_hash(record) for record in train}
    return [record for record in records if key_hash(record) not in seen]
