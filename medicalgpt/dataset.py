"""From the data flags to training and validation records that share no prompt."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from medicalgpt.arguments import DataArguments, StageFlags
from medicalgpt.data_files import find_files, fingerprint_files
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.holdout import hold_out, without_shared
from medicalgpt.records import Parser, Record, read_records
from medicalgpt.row_log import RowLog

from huggingface_hub import HfApi, constants

logger = logging.getLogger("medicalgpt")


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
    flags: StageFlags, parse: Parser, suffixes: tuple[str, ...], *, txt_documents: str = "file"
) -> Data:
    """Read and check every row.

    Args:
        parse: row → record.
        suffixes: of the files that count.

    Raises:
        ConfigError: a path that does not exist. DataError: a row or file that cannot be used.
    """
    args, do_eval, cache_dir, log = flags.data, flags.run.do_eval, flags.model.cache_dir, RowLog()
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
    elif do_eval and len({record.key for record in records}) == 1:
        logger.warning(
            "warning: all rows have one prompt (or there is one text), so none is held out and nothing is "
            "evaluated; --txt_documents blank splits a text at blank lines"
        )
        flags.run.do_eval, flags.run.eval_strategy = False, "no"
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


def read_hub_rows(name: str, config: str | None, cache_dir: str | None) -> Iterator[tuple[dict, str]]:
    """Yield (row, `name[index]`) of a hub data set's train split.

    Raises:
        ConfigError: the data set cannot be had.
    """
    from datasets import load_dataset  # noqa: PLC0415  (a second that a local file need not pay)

    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(
                name, timeout=10
            )  # answers at once where load_dataset would try for half a minute
        rows = load_dataset(name, config, split="train", cache_dir=cache_dir)
    except Exception as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ConfigError(
            f"--dataset_name {name} cannot be loaded: {first}; with no hub, download the files and "
            "give --train_file_dir"
        ) from None
    for index, row in enumerate(rows):
        yield {key: value for key, value in row.items() if value is not None}, f"{name}[{index}]"
