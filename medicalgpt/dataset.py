"""From the data flags to training and validation records that share no prompt."""

import hashlib
import json
import os
from dataclasses import dataclass

from medicalgpt.arguments import DataArguments
from medicalgpt.data_files import find_files, fingerprint_files
from medicalgpt.errors import DataError
from medicalgpt.records import Parser, Record, RowLog, hold_out, read_hub_rows, read_records, without_shared


@dataclass
class Data:
    """What a stage learns from and is measured on.

    Attributes:
        files: {file or data set: sha256}.
        log: what happened to rows.
        num_read: training rows read, before any limit.
    """

    train: list[Record]
    validation: list[Record]
    files: dict[str, str]
    log: RowLog
    num_read: int


def load_data(
    args: DataArguments,
    parse: Parser,
    suffixes: tuple[str, ...],
    *,
    do_eval: bool,
    txt_documents: str = "file",
    cache_dir: str | None = None,
) -> Data:
    """Read and check every row.

    Args:
        parse: row → record.
        suffixes: of the files that count.

    Raises:
        ConfigError: a path that does not exist. DataError: a row or file that cannot be used.
    """
    log = RowLog()
    if args.dataset_name:
        records, files = read_dataset(args, parse, log, cache_dir)
    else:
        paths = find_files(args.train_file_dir, suffixes, "--train_file_dir")
        records, files = (
            read_records(paths, parse, log, txt_documents=txt_documents),
            fingerprint_files(paths),
        )
    num_read, validation = len(records), []
    if do_eval and separate_validation(args):
        paths = find_files(args.validation_file_dir, suffixes, "--validation_file_dir")
        read = read_records(paths, parse, log, txt_documents=txt_documents)
        files |= fingerprint_files(paths)
        validation = without_shared(read, records)
        if not validation:
            raise DataError(
                f"--validation_file_dir {args.validation_file_dir}: all {len(read)} prompts occur in the "
                "training data; give other rows, or leave the flag out to hold rows out"
            )
        if len(read) > len(validation):
            log.counts["validation_rows_also_in_training"] = len(read) - len(validation)
    elif do_eval:
        records, validation = hold_out(records, args.validation_split_percentage)
    limit = args.max_train_samples if args.max_train_samples > 0 else None
    eval_limit = args.max_eval_samples if args.max_eval_samples > 0 else None
    return Data(records[:limit], validation[:eval_limit], files, log, num_read)


def separate_validation(args: DataArguments) -> bool:
    """True when validation rows come from a place of their own."""
    own = args.validation_file_dir
    return bool(own) and not (
        args.train_file_dir and os.path.realpath(own) == os.path.realpath(args.train_file_dir)
    )


def read_dataset(
    args: DataArguments, parse: Parser, log: RowLog, cache_dir: str | None
) -> tuple[list[Record], dict[str, str]]:
    """Return the records of a hub data set and a fingerprint of its rows."""
    digest, records = hashlib.sha256(), []
    for row, origin in read_hub_rows(args.dataset_name, args.dataset_config_name, cache_dir):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        record = parse(row, origin, log)
        if record is not None:
            records.append(record)
    if not records:
        raise DataError(f"--dataset_name {args.dataset_name}: no usable row: {'; '.join(log.lines())}")
    return records, {args.dataset_name: digest.hexdigest()}
