r"""Merge a LoRA adapter into its base: one ordinary model directory that any tool reads.

Reads   --base_model, --lora_model (the adapter of a stage, or one of its checkpoints), --tokenizer_path
Writes  --output_dir   safetensors, tokenizer with chat template, generation config, run.json with its parents
Next    the next stage's --model_name_or_path, or inference.py --base_model

    python merge_peft_adapter.py --base_model Qwen/Qwen2.5-0.5B --tokenizer_path Qwen/Qwen2.5-0.5B \\
        --lora_model outputs-pt-qwen-v1 --output_dir merged-pt-qwen-v1

The base is loaded fresh and never quantised. A base that the adapter was not trained on is refused. The
written model is loaded again: every adapted matrix must be base + adapter, and the whole must say on a probe
what base + adapter say; only then does it get its name.
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt.chat_template import export_template, known_template
from medicalgpt.checkpoint import fingerprint, staged, why_not_whole
from medicalgpt.errors import ModelError, RunError, run_script
from medicalgpt.flags import parse_arguments, require
from medicalgpt.merge_proof import Expected, expected_products, is_visible, wrong_tensors
from medicalgpt.model_files import adapter_settings, load_config, load_tokenizer, resolve_model_dir
from medicalgpt.modeling import config_as_trained, load_adapter, load_model
from medicalgpt.run_record import RunRecord, check_base, read_run, recorded_template, versions
from medicalgpt.scoring import separate_pad_token
from medicalgpt.tokenization import ChatFormat

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
    config = config_as_trained(config, lora_dir)
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


@dataclass(frozen=True)
class Proof:
    """What a merged model must do once it is read back: on the probe, and matrix by matrix."""

    outputs: torch.Tensor
    products: dict[str, Expected]


def merge(base: PreTrainedModel, lora_dir: Path) -> tuple[PreTrainedModel, Proof]:
    """Merge an adapter into its base; what must hold for the result is noted down before.

    Raises:
        ModelError: the merge gives NaN, or tied embeddings came apart.
    """
    tied = base.config.get_text_config().tie_word_embeddings
    adapted = load_adapter(base, lora_dir)
    outputs, products = probe_outputs(adapted), expected_products(adapted)
    heads = [name for name in products if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
    if tied and len(heads) == 1 and not adapter_settings(lora_dir).get("modules_to_save"):
        raise ModelError(
            f"{lora_dir}: adapts {heads[0]}, which is one matrix with the other embedding of this base"
        )
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{lora_dir}: the merge gives NaN: {error}") from None
    if merged.config.get_text_config().tie_word_embeddings != tied:
        raise ModelError(
            f"{lora_dir}: trained input and output embeddings apart, although the base ties them; train "
            "again with this toolkit's --modules_to_save"
        )
    if products and not is_visible(products):
        logger.warning(
            "warning: every change of %s is lost in the rounding of a %s base", lora_dir, base.dtype
        )
    return merged, Proof(outputs, products)


def prove(written: PreTrainedModel, proof: Proof) -> float:
    """Return how far the written model's outputs are from those of base + adapter.

    Raises:
        ModelError: a matrix, or the whole, is not base + adapter.
    """
    wrong = wrong_tensors(written, proof.products)
    if wrong:
        raise ModelError(
            f"the merged model differs from base + adapter in {wrong[0]} and {len(wrong) - 1} more tensors; "
            "nothing was written"
        )
    found, allowed = divergence(proof.outputs, probe_outputs(written)), MAX_DIVERGENCE[written.dtype]
    if not found <= allowed:
        raise ModelError(
            f"the merged model differs from base + adapter by {found:.3g} nats per token, allowed "
            f"{allowed:g}; nothing was written"
        )
    return found


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
    elif template := known_template(tokenizer, recorded_template(lora_dir)):  # a checkpoint has no tokenizer
        export_template(tokenizer, ChatFormat.of(template, tokenizer))
    template = known_template(tokenizer, recorded_template(lora_dir))
    if template is not None and adapter_settings(lora_dir).get("task_type") == "SEQ_CLS":
        separate_pad_token(tokenizer, ChatFormat.of(template, tokenizer))
    return tokenizer


def set_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_name: str | None) -> None:
    """Write into the generation config what ends an answer, so that any tool stops there."""
    sampled = model.generation_config.temperature, model.generation_config.top_p
    if any(value not in (None, 1.0) for value in sampled):
        model.generation_config.do_sample = True  # some models ship settings of sampling without the switch
    template = known_template(tokenizer, template_name)
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

    for source in (lora_dir, base_dir):
        inside = output_dir.resolve().is_relative_to(source.resolve())
        require(
            not inside and not source.resolve().is_relative_to(output_dir.resolve()),
            f"--output_dir {output_dir} is, holds or lies in what is merged; use another directory",
        )
    if args.overwrite and output_dir.is_dir() and any(output_dir.iterdir()):
        require(
            (read_run(output_dir) or {}).get("stage") == "merge",
            f"--output_dir {output_dir} holds no merged model, and only that is overwritten; use another",
        )

    # 2. Is it this adapter's base, and is there anything to do?
    record = record_of(args, base_dir, lora_dir)
    if not args.overwrite and already_merged(record):
        logger.info("already complete: %s (nothing was changed)", output_dir)
        return
    if not check_base(lora_dir, base_dir):
        logger.warning(
            "warning: %s has no run.json, so only its shapes are checked against the base", lora_dir
        )

    # 3. Merge, write beside, load again, prove, rename
    with staged(output_dir, overwrite=args.overwrite) as partial:
        tokenizer = tokenizer_of(args, base_dir, lora_dir)
        model, proof = merge(base_of(args, base_dir, lora_dir), lora_dir)
        check_space(model, output_dir)
        if model.can_generate():
            set_stops(model, tokenizer, record.content["template"])
        else:
            model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        auto_class = type(model)
        del model
        written = load_model(partial, "auto", auto_class=auto_class, trust_remote_code=args.trust_remote_code)
        found = prove(written, proof)
        RunRecord(partial, record.content).save(proof={"divergence": found, "tensors": len(proof.products)})
    logger.info(
        "merged %s into %s: %s (%d matrices are base + adapter; outputs differ by %.2g nats per token)",
        lora_dir,
        base_dir,
        output_dir,
        len(proof.products),
        found,
    )


if __name__ == "__main__":
    run_script(main)
