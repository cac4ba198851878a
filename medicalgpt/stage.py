"""The steps that every stage takes in the same way: open the run, build the model, report, train, publish."""

import itertools
import logging
import os
import shutil
import time
from pathlib import Path

from medicalgpt.arguments import DTYPES, StageArguments, StageFlags
from medicalgpt.base import Base
from medicalgpt.checkpoint import PARTIAL, lock, newest_whole, publish, why_not_whole, write_json
from medicalgpt.collator import example_length
from medicalgpt.dataset import Data
from medicalgpt.engine import FlatLM, FlatModel, FlatScorer
from medicalgpt.errors import ConfigError, DataError, ModelError, StoppedError, is_main_rank
from medicalgpt.model_files import load_config
from medicalgpt.modeling import add_adapters, choose_dtype, context_length, load_base, scaled_rope
from medicalgpt.probe import bytes_saved_for_backward, choose_rows, free_memory
from medicalgpt.run_record import RunRecord, read_run
from medicalgpt.tokenization import IGNORE_INDEX, ChatEncoder
from medicalgpt.trainer import StageTrainer

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, set_seed

logger = logging.getLogger("medicalgpt")

# What a rank trained with lives until its process ends (`run_script` exits without destructors): the
# destructor of a gloo process group now and then waits for ever for a rank that has already gone.
HELD: list[StageTrainer] = []


# ---- the run -----------------------------------------------------------------------------------------------


def open_run(
    stage: str, flags: StageFlags, base: Base, data: Data, also: dict[str, str] | None = None
) -> RunRecord | None:
    """Return the record of a new or interrupted run, or None when the same run is already complete.

    Args:
        also: what else the numbers depend on, {name: fingerprint}.

    Raises:
        ConfigError: the output directory holds another run, is in use, or holds something else.
    """
    output_dir = Path(flags.run.output_dir)
    record = RunRecord.begin(
        stage,
        flags,
        base=base.fingerprints(flags.adapter.peft_path),
        data=data.files,
        template=base.template_name,
        parent=read_run(base.directory),
        also=also,
    )
    if not flags.run.do_train:
        if read_run(output_dir) is not None:
            raise ConfigError(
                f"--output_dir {output_dir} holds a run; give an evaluation (--do_train False) its own"
            )
        return record
    if is_main_rank():
        record.check_place()
        lock(output_dir)
        if flags.run.overwrite_output_dir:
            record.clear()
    wait_for_ranks()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output_dir / "logs" / time.strftime("%Y%m%d-%H%M%S"))
    if record.is_complete():
        logger.info(
            "already complete: %s (nothing was changed; --overwrite_output_dir True trains anew)", output_dir
        )
        return None
    record.checkpoint = choose_checkpoint(flags.run, record)
    return record


def wait_for_ranks() -> None:
    """Wait until every rank is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def choose_checkpoint(args: StageArguments, record: RunRecord) -> str | None:
    """Return the checkpoint to continue from: the newest whole one, or the one that the flag names.

    Raises:
        ConfigError: --resume_from_checkpoint False, and there are checkpoints. ModelError: it is not whole.
    """
    asked = args.resume_from_checkpoint
    if asked and str(asked).lower() not in ("true", "false"):
        why = why_not_whole(Path(asked))
        if why:
            raise ModelError(f"--resume_from_checkpoint {asked} is not whole: {why}")
        RunRecord(Path(asked), record.content).is_complete()  # refuses another run's checkpoint
        return asked
    found, skipped = newest_whole(Path(args.output_dir))
    if found and str(asked).lower() == "false":
        raise ConfigError(
            f"--resume_from_checkpoint False, but {args.output_dir} holds {found.name}; start anew with "
            "--overwrite_output_dir True"
        )
    for line in skipped:
        logger.info("skipped %s", line)
    if found:
        logger.info("continuing from %s", found)
    elif str(asked).lower() == "true":
        raise ModelError(f"--resume_from_checkpoint True, but {args.output_dir} holds no checkpoint")
    return str(found) if found else None


def chat_encoder(flags: StageFlags, base: Base) -> ChatEncoder:
    """Return the encoder of a stage that reads conversations."""
    chat = flags.chat
    return ChatEncoder(
        base.tokenizer,
        base.chat_format,
        max_length=chat.model_max_length,
        max_source_length=chat.max_source_length,
        max_target_length=chat.max_target_length,
    )


# ---- the model ---------------------------------------------------------------------------------------------


def build_model(
    flags: StageFlags,
    base: Base,
    *,
    max_length: int,
    neftune_alpha: float | None = None,
    scores: bool = False,
) -> FlatLM | FlatScorer:
    """Return the model to train; it knows whether its batches must be padded.

    Args:
        max_length: the longest text, in tokens, for --rope_scaling.
        scores: a model that scores answers, instead of one that writes them.

    Raises:
        ModelError: the base does not load, or has fewer embeddings than the tokenizer has tokens.
    """
    model_args, args = flags.model, flags.run
    config = load_config(base.directory, trust_remote_code=model_args.trust_remote_code)
    if model_args.rope_scaling:
        config = scaled_rope(config, model_args.rope_scaling, max_length)
    context = context_length(config)
    if context and max_length > context:
        logger.warning(
            "warning: texts of up to %d tokens are longer than the model's context of %d; lower the limit or "
            "add --rope_scaling yarn",
            max_length,
            context,
        )
    dtype = choose_dtype(model_args, flags.adapter, bf16=args.bf16, fp16=args.fp16, use_cpu=args.use_cpu)
    lm = load_base(
        base.directory,
        config,
        dtype,
        bits=flags.adapter.quantization_bits,
        trust_remote_code=model_args.trust_remote_code,
        scores=scores,
    )
    if len(base.tokenizer) > lm.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"{base.directory}: the tokenizer has {len(base.tokenizer)} tokens, the model "
            f"{lm.get_input_embeddings().num_embeddings} embeddings; use the tokenizer of this model"
        )
    set_seed(args.seed)  # adapters start from random numbers
    if flags.adapter.use_peft:
        lm = add_adapters(lm, flags.adapter)
    autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    kind = FlatScorer if scores else FlatLM
    model = kind(lm, autocast_dtype=autocast_dtype, neftune_alpha=neftune_alpha).to(args.device)
    choose_rows(model)
    report_model(model, base.directory, dtype)
    return model


def report_model(model: FlatModel, directory: Path, dtype: torch.dtype) -> None:
    """Log what was loaded, and how much of it is trained."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        "model=%s dtype=%s device=%s trainable_parameters=%d (%.2f %% of %d)",
        directory,
        str(dtype).removeprefix("torch."),
        next(model.parameters()).device,
        trainable,
        100 * trainable / total,
        total,
    )


def choose_activation_checkpointing(model: FlatModel, args: StageArguments, examples: list[dict]) -> None:
    """Switch activation checkpointing on: as asked, or (auto) when a step needs over 60 % of memory."""
    longest = sorted(map(example_length, examples), reverse=True)[: args.per_device_train_batch_size]
    mode = args.gradient_checkpointing
    if mode == "auto":
        needed = sum(longest) * bytes_saved_for_backward(
            model, model.bare_lm.get_input_embeddings().num_embeddings
        )
        # A gradient and two Adam moments in float32 come with every trained weight.
        needed += 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        free = free_memory(args.world_size)
        mode = "true" if needed > 0.6 * free else "false"
        logger.info(
            "activation_checkpointing=%s: the largest step of %d tokens needs %.2f GB, %.2f GB are free",
            mode,
            sum(longest),
            needed / 1e9,
            free / 1e9,
        )
    if mode == "true":
        model.bare_lm.gradient_checkpointing_enable({"use_reentrant": False})


# ---- what is said before the first step --------------------------------------------------------------------


def report_data(data: Data, train: list[dict], validation: list[dict], args: StageArguments) -> None:
    """Log what was read, kept, cut and dropped, and the size of an epoch.

    Raises:
        DataError: nothing is left to train on, or no token of it is trained.
    """
    for line in data.log.lines():
        logger.info("rows %s", line)
    num_trained = sum(map(num_trained_tokens, train))
    if not train or not num_trained:
        reasons = "; ".join(data.log.lines()) or "no row has an answer"
        raise DataError(
            f"nothing to train on: {len(data.train)} rows were read and no token of them would be trained "
            f"({reasons}); raise the length limits or mend the data"
        )
    if args.do_eval and not validation:
        raise DataError(f"none of the {len(data.validation)} validation rows fits; raise the length limits")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    logger.info(
        "rows_read=%d rows_trained=%d rows_held_for_validation=%d train_examples=%d effective_batch=%d "
        "tokens_per_epoch=%d trained_tokens_per_epoch=%d",
        data.num_read,
        len(data.train),
        len(data.validation),
        len(train),
        batch,
        sum(map(example_length, train)),
        num_trained,
    )


def num_trained_tokens(example: dict) -> int:
    """Return how many tokens of an example are trained."""
    return sum(
        int((value != IGNORE_INDEX).sum()) for name, value in example.items() if name.endswith("labels")
    )


def show_example(tokenizer: PreTrainedTokenizerBase, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Log one encoded example; what is trained stands between ⟦ and ⟧."""
    text = ""
    for ids, labels in parts:
        trained = labels != IGNORE_INDEX
        borders = [0, *(1 + np.flatnonzero(trained[1:] != trained[:-1])), len(ids)]
        for start, end in itertools.pairwise(borders):
            piece = tokenizer.decode([int(i) for i in ids[start:end]])
            text += f"⟦{piece}⟧" if end > start and trained[start] else piece
    text = text if len(text) <= 1500 else f"{text[:1000]} … {text[-400:]}"
    logger.info("first example, trained parts in ⟦ ⟧:\n%s", text)


def show_pair(tokenizer: PreTrainedTokenizerBase, pair: dict) -> None:
    """Log one encoded pair: the prompt, then the chosen and the rejected answer."""
    untrained = np.full(len(pair["prompt_ids"]), IGNORE_INDEX)
    answers = [(pair[f"{side}_ids"], pair[f"{side}_labels"]) for side in ("chosen", "rejected")]
    show_example(tokenizer, [(pair["prompt_ids"], untrained), *answers])


# ---- training ----------------------------------------------------------------------------------------------


def run_training(trainer: StageTrainer, record: RunRecord, base: Base) -> None:
    """Train (or continue), evaluate, and publish the result as one whole.

    Raises:
        StoppedError: a signal asked for it; a whole checkpoint is there.
    """
    args = trainer.args
    if torch.distributed.is_initialized():
        HELD.append(trainer)
    if not args.do_train:
        publish_evaluation(trainer.evaluate(), Path(args.output_dir))
        return
    if is_main_rank():
        record.save()
    metrics = trainer.run(record.checkpoint)
    if trainer.stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise StoppedError(
            f"after step {trainer.state.global_step} of {trainer.state.max_steps}, with a whole "
            "checkpoint; the same command continues"
        )
    evaluation = trainer.evaluate() if args.do_eval else {}
    if is_main_rank():
        publish_result(trainer, record, base, metrics, evaluation)
    wait_for_ranks()


def publish_result(
    trainer: StageTrainer, record: RunRecord, base: Base, metrics: dict, evaluation: dict
) -> None:
    """Write weights, tokenizer, results and run.json beside, then move them into the output directory."""
    output_dir = Path(trainer.args.output_dir)
    partial = output_dir / f"final{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if not trainer.model.has_adapters:
        trainer.model.lm.to(DTYPES[record.content["arguments"]["torch_dtype"]])  # trained in float32
    trainer.save_model(str(partial), _internal_call=True)
    base.save_tokenizer(partial)
    trainer.state.save_to_json(str(partial / "trainer_state.json"))
    write_results(partial, "train", metrics)
    if evaluation:
        write_results(partial, "eval", evaluation)
    RunRecord(partial, record.content).save(status="complete", results=metrics | evaluation)
    publish(partial, output_dir)
    log_results(metrics | evaluation, output_dir)


def log_results(metrics: dict[str, float], output_dir: Path) -> None:
    """Log the results and where they are."""
    for name, value in metrics.items():
        logger.info("%s=%.6g", name, value)
    logger.info("complete: %s", output_dir)


def publish_evaluation(metrics: dict, output_dir: Path) -> None:
    """Write and log the metrics of an evaluation without training."""
    if is_main_rank():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_results(output_dir, "eval", metrics)
        log_results(metrics, output_dir)


def write_results(directory: Path, split: str, metrics: dict) -> None:
    """Write {split}_results.json and the same as `name = value` lines."""
    write_json(directory / f"{split}_results.json", metrics)
    lines = "".join(f"{name} = {value}\n" for name, value in sorted(metrics.items()))
    (directory / f"{split}_results.txt").write_text(lines, encoding="utf-8")
