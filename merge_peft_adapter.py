r"""Merge a LoRA adapter into its base: one ordinary model directory that any tool reads.

Reads   --base_model, --lora_model (the adapter of a stage, or one of its checkpoints), --tokenizer_path
Writes  --output_dir   safetensors, tokenizer with chat template, generation config, run.json with its parents
Next    the next stage's --model_name_or_path, or inference.py --base_model

    python merge_peft_adapter.py --base_model Qwen/Qwen2.5-0.5B --tokenizer_path Qwen/Qwen2.5-0.5B \\
        --lora_model outputs-pt-qwen-v1 --output_dir merged-pt-qwen-v1

The base is loaded fresh and never quantised. A base that the adapter was not trained on is refused. The
written model is loaded again and must say what base + adapter say on a probe; only then does it get its name.
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt.checkpoint import fingerprint, staged, why_not_whole
from medicalgpt.errors import ModelError, RunError, run_script
from medicalgpt.flags import parse_arguments
from medicalgpt.model_files import adapter_settings, load_config, load_tokenizer, resolve_model_dir
from medicalgpt.modeling import load_adapter, load_model, scaled_rope
from medicalgpt.run_record import RunRecord, check_base, read_run, versions
from medicalgpt.tokenization import ChatFormat
from template import TEMPLATES

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

logger = logging.getLogger("medicalgpt")

# Mean KL divergence per token of merged from base + adapter, in nats: rounding gives far less, a fault far
# more.
MAX_DIVERGENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
PROBE_LENGTH = 64  # tokens


@dataclass
class MergeArguments:
    """What is merged into what."""

    base_model: str = field(
        metadata={"help": "the model that the adapter was trained on: directory or hub name"}
    )
    lora_model: str = field(metadata={"help": "adapter directory"})
    output_dir: str = field(metadata={"help": "new directory for the merged model"})
    tokenizer_path: str | None = field(default=None, metadata={"help": "tokenizer; default: the base's"})
    overwrite: bool = field(default=False, metadata={"help": "replace what --output_dir holds"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads are kept"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})


def probe_outputs(model: torch.nn.Module) -> torch.Tensor:
    """Return what the model says about fixed random tokens: log-probabilities (T, V), or scores (1, L)."""
    vocab_size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocab_size, (1, PROBE_LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    return logits.log_softmax(-1) if logits.dim() == 2 else logits


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Return the mean KL divergence per token in nats, or for scores the largest difference."""
    if expected.dim() == 2:
        return abs(
            F.kl_div(actual, expected, log_target=True, reduction="batchmean").item()
        )  # rounding aside
    return (expected - actual).abs().max().item()


def base_of(args: MergeArguments, base_dir: Path, lora_dir: Path) -> PreTrainedModel:
    """Load the base fresh, in its own type, with the context that the adapter was trained in."""
    config = load_config(base_dir, trust_remote_code=args.trust_remote_code)
    if config.to_dict().get("quantization_config"):
        raise ModelError(f"--base_model {base_dir} is quantised; merge into the original weights")
    trained = (read_run(lora_dir) or {}).get("arguments", {})
    if trained.get("rope_scaling"):
        config = scaled_rope(
            config, trained["rope_scaling"], trained.get("model_max_length") or trained["block_size"]
        )
    classifier = adapter_settings(lora_dir).get("task_type") == "SEQ_CLS"
    if classifier:
        config.num_labels = 1
    return load_model(
        base_dir,
        "auto",
        config=config,
        trust_remote_code=args.trust_remote_code,
        auto_class=AutoModelForSequenceClassification if classifier else AutoModelForCausalLM,
        may_miss=("score", "classifier") if classifier else (),
    )


def merge(base: PreTrainedModel, lora_dir: Path) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return (merged model, what base + adapter say on the probe).

    Raises:
        ModelError: the merge gives NaN, or tied embeddings came apart.
    """
    tied = base.config.get_text_config().tie_word_embeddings
    adapted = load_adapter(base, lora_dir)
    expected = probe_outputs(adapted)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{lora_dir}: the merge gives NaN: {error}") from None
    if merged.config.get_text_config().tie_word_embeddings != tied:
        raise ModelError(
            f"{lora_dir}: trained input and output embeddings apart, although the base ties them; train "
            "again with this toolkit's --modules_to_save"
        )
    return merged, expected


def tokenizer_of(args: MergeArguments, base_dir: Path, lora_dir: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with the chat template that the adapter was trained in."""
    path = (
        resolve_model_dir(args.tokenizer_path, "--tokenizer_path", args.cache_dir)
        if args.tokenizer_path
        else base_dir
    )
    tokenizer = load_tokenizer(path, trust_remote_code=args.trust_remote_code)
    if (lora_dir / "tokenizer_config.json").is_file():
        tokenizer.chat_template = load_tokenizer(lora_dir).chat_template or tokenizer.chat_template
    return tokenizer


def set_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_name: str | None) -> None:
    """Write into the generation config what ends an answer, so that any tool stops there."""
    template = TEMPLATES.get(template_name)
    if template is not None:
        model.generation_config.eos_token_id = ChatFormat.of(template, tokenizer).stop_ids(tokenizer)
    if tokenizer.pad_token_id is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def record_of(args: MergeArguments, base_dir: Path, lora_dir: Path) -> RunRecord:
    """Describe the merge: what, into what, and where both come from."""
    run, base_run = read_run(lora_dir), read_run(base_dir)
    template = (run or {}).get("template") or (base_run or {}).get("template")
    return RunRecord(
        Path(args.output_dir),
        {
            "stage": "merge",
            "status": "complete",
            "template": template,
            "versions": versions(),
            "base": {"path": str(base_dir), "fingerprint": fingerprint(base_dir)},
            "adapter": {"path": str(lora_dir), "fingerprint": fingerprint(lora_dir)},
            "parent": run or base_run,
        },
    )


def already_merged(record: RunRecord) -> bool:
    """Return whether the output directory holds this very merge, whole."""
    old = read_run(record.output_dir)
    same = old is not None and all(
        old.get(part, {}).get("fingerprint") == record.content[part]["fingerprint"]
        for part in ("base", "adapter")
    )
    return same and why_not_whole(record.output_dir) is None


def check_space(model: PreTrainedModel, output_dir: Path) -> None:
    """Refuse before the first byte when the merged model cannot fit the disk."""
    parent = output_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = (
        sum(p.numel() * p.element_size() for p in model.parameters()),
        shutil.disk_usage(parent).free,
    )
    if needed > free:
        raise RunError(
            f"{output_dir}: the merged model needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


def main(argv: list[str]) -> None:
    """Merge, prove, publish."""
    # 1. Flags and paths
    (args,) = parse_arguments(argv, (MergeArguments,), __doc__, {})
    output_dir = Path(args.output_dir)
    lora_dir = resolve_model_dir(args.lora_model, "--lora_model", args.cache_dir)
    base_dir = resolve_model_dir(
        args.base_model, "--base_model", args.cache_dir, remote_code=args.trust_remote_code
    )
    adapter_settings(lora_dir)

    # 2. Is it this adapter's base, and is there anything to do?
    record = record_of(args, base_dir, lora_dir)
    if not args.overwrite and already_merged(record):
        logger.info("already complete: %s (nothing was changed)", output_dir)
        return
    if not check_base(lora_dir, base_dir):
        logger.warning(
            "warning: %s has no run.json, so only its shapes are checked against the base", lora_dir
        )

    # 3. Merge, write beside, load again, compare, rename
    with staged(output_dir, overwrite=args.overwrite) as partial:
        tokenizer = tokenizer_of(args, base_dir, lora_dir)
        merged, expected = merge(base_of(args, base_dir, lora_dir), lora_dir)
        check_space(merged, output_dir)
        if merged.can_generate():
            set_stops(merged, tokenizer, record.content["template"])
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        auto_class, dtype = type(merged), merged.dtype
        del merged
        found = divergence(
            expected,
            probe_outputs(
                load_model(partial, "auto", auto_class=auto_class, trust_remote_code=args.trust_remote_code)
            ),
        )
        if not found <= MAX_DIVERGENCE[dtype]:
            raise ModelError(
                f"the merged model differs from base + adapter by {found:.3g} nats per token, allowed "
                f"{MAX_DIVERGENCE[dtype]:g}; nothing was written"
            )
        RunRecord(partial, record.content).save(proof={"divergence": found, "allowed": MAX_DIVERGENCE[dtype]})
    logger.info(
        "merged %s into %s: %s (differs from base + adapter by %.2g nats per token, allowed %g)",
        lora_dir,
        base_dir,
        output_dir,
        found,
        MAX_DIVERGENCE[dtype],
    )


if __name__ == "__main__":
    run_script(main)
