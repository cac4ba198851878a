"""Loading: directory, tokenizer, base model, quantisation, adapters, activation checkpointing."""

import copy
import logging
import math
import warnings
from pathlib import Path

from medicalgpt.arguments import DTYPES, AdapterArguments, ModelArguments
from medicalgpt.attention import FLAT_ATTENTION
from medicalgpt.errors import ConfigError, ModelError, first_line
from medicalgpt.model_files import adapter_settings, check_safetensors, load_config, weights_are_readable
from medicalgpt.run_record import read_run

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

logger = logging.getLogger("medicalgpt")

ADAPTER_FILE = "adapter_model.safetensors"
EMBEDDINGS = {"embed_tokens", "lm_head"}  # one matrix where they are tied
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


# ---- the base ----------------------------------------------------------------------------------------------


def load_model(
    directory: Path,
    dtype: torch.dtype | str,
    *,
    auto_class: type = AutoModelForCausalLM,
    attention: str | None = None,
    config: PretrainedConfig | None = None,
    quantization: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
    may_miss: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Return the model, every tensor of it from the files.

    Args:
        dtype: of the weights; "auto": as they are stored.
        attention: name of the attention function; None: the library's choice.
        may_miss: beginnings of tensors that come later from an adapter, such as a score head.

    Raises:
        ModelError: weights are missing, broken or of the wrong shape.
    """
    weights_are_readable(directory)
    if auto_class is AutoModelForCausalLM and has_score_head(
        config or load_config(directory, trust_remote_code=trust_remote_code)
    ):
        raise ModelError(
            f"{directory} is a reward model, which scores answers and writes none; give a model that chats"
        )
    options = {"attn_implementation": attention} if attention else {}
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device_of_rank()}}
    try:
        model, info = auto_class.from_pretrained(
            directory,
            dtype=dtype,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{directory}: the model does not load: {first_line(error)[:300]}") from None
    for name in ("missing_keys", "mismatched_keys"):
        wrong = sorted(
            key for key in map(str, info.get(name) or ()) if not key.startswith(may_miss or ("\0",))
        )
        if wrong:
            raise ModelError(
                f"{directory}: {name.replace('_keys', '')} tensors: {wrong[0]} and {len(wrong) - 1} more; "
                "the files do not hold the whole model"
            )
    return model


def device_of_rank() -> int | str:
    """Return where this rank's model goes."""
    return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"


def quantization_config(
    bits: int | None, compute_dtype: torch.dtype, head: str | None = None
) -> BitsAndBytesConfig | None:
    """Return the configuration of a 4-bit (nf4 quantised twice, QLoRA, arXiv:2305.14314) or 8-bit base.

    Args:
        head: the layer that stays as it is; None: the vocabulary projection.
    """
    skipped = [head] if head else None
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=skipped,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped) if bits == 8 else None


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens the model was made for; None where it sets no limit."""
    return config.get_text_config().to_dict().get("max_position_embeddings")


def scaled_rope(config: PretrainedConfig, kind: str, max_length: int) -> PretrainedConfig:
    """Stretch the rotary positions so that `max_length` tokens fit; a long enough context stays as it is.

    Raises:
        ModelError: the model has no rotary positions.
    """
    text = config.get_text_config()
    rope, context = text.to_dict().get("rope_parameters"), context_length(config)
    if not rope or "rope_theta" not in rope or not context:
        raise ModelError(f"--rope_scaling {kind}: {config.model_type} has no single set of rotary positions")
    factor = math.ceil(max_length / context)
    if factor > 1:
        stretched = {"rope_type": kind, "factor": float(factor), "original_max_position_embeddings": context}
        text.rope_parameters = {**rope, **stretched}
        text.max_position_embeddings = factor * context
    return config


def config_as_trained(config: PretrainedConfig, adapter_dir: Path) -> PretrainedConfig:
    """Return the base's configuration with the positions that an adapter was trained with."""
    trained = (read_run(adapter_dir) or {}).get("arguments", {})
    if not trained.get("rope_scaling"):
        return config
    return scaled_rope(
        config, trained["rope_scaling"], trained.get("model_max_length") or trained["block_size"]
    )


def choose_dtype(
    model_args: ModelArguments, adapter_args: AdapterArguments, *, bf16: bool, fp16: bool, use_cpu: bool
) -> torch.dtype:
    """Return the type that the weights are kept in.

    Full fine-tuning keeps float32 (bfloat16 weights lose small updates); a base under adapters is frozen and
    may be short, where the hardware computes with it.
    """
    if not adapter_args.use_peft:
        return torch.float32
    dtype = DTYPES[model_args.torch_dtype]
    if adapter_args.modules_to_save and dtype != torch.float32 and not (bf16 or fp16):
        raise ConfigError(
            f"--modules_to_save on a {model_args.torch_dtype} base needs --bf16 True (or --fp16 True), or "
            "--torch_dtype float32"
        )
    if fp16 and dtype == torch.bfloat16:
        raise ConfigError("--fp16 True needs --torch_dtype float16")
    if use_cpu and dtype == torch.float16:
        raise ConfigError("--torch_dtype float16 needs a GPU and there is none; use bfloat16 or float32")
    return torch.float32 if use_cpu and dtype == torch.bfloat16 and not bf16 else dtype


def load_base(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    bits: int | None = None,
    trust_remote_code: bool = False,
    scores: bool = False,
) -> PreTrainedModel:
    """Return the base of a stage, with attention confined to documents where it can be.

    Args:
        bits: of a quantised base, 4 or 8.
        scores: with a score head (num_labels 1) in place of the vocabulary projection; a base that has none
            gets a new one.
    """
    config = copy.deepcopy(config)
    options = {
        "quantization": quantization_config(bits, dtype, "score" if scores else None),
        "trust_remote_code": trust_remote_code,
    }
    if scores:
        options |= {"auto_class": AutoModelForSequenceClassification, "may_miss": ("score",)}
        needs_head = not has_score_head(config)
        config.num_labels = 1
    try:
        model = load_model(directory, dtype, attention=FLAT_ATTENTION, config=config, **options)
    except ModelError as error:  # an architecture that chooses among attentions of its own
        if FLAT_ATTENTION not in str(error) and "attention" not in str(error).lower():
            raise
        model = load_model(directory, dtype, config=config, **options)
    if scores and needs_head:
        new_score_head(model)
    return model


def has_score_head(config: PretrainedConfig) -> bool:
    """Return whether the weights that belong to a configuration have a score head."""
    return any("SequenceClassification" in name for name in config.architectures or ())


def new_score_head(model: PreTrainedModel) -> None:
    """Start the score head: normal, standard deviation 1/√(H + 1), the same on every machine.

    So began the reward models of Stiennon et al. (arXiv:2009.01325).
    """
    weight = getattr(getattr(model, "score", None), "weight", None)
    if weight is None:
        raise ModelError(f"{model.config.model_type}: this architecture has no score head in transformers")
    size = weight.shape[-1]
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(size + 1)
    model.score.weight.data = values.to(weight.device)


# ---- adapters ----------------------------------------------------------------------------------------------


def names(value: str | None) -> list[str] | None:
    """Split a flag of names with commas."""
    return [name.strip() for name in value.split(",") if name.strip()] if value else None


def add_adapters(model: PreTrainedModel, args: AdapterArguments) -> PeftModel:
    """Put LoRA (arXiv:2106.09685) on the base, or load `peft_path`; whatever is trained is float32.

    A score head is trained in full.

    Raises:
        ConfigError: --target_modules or --modules_to_save name layers that the model does not have.
        ModelError: the adapter of --peft_path does not fit.
    """
    model.requires_grad_(False)
    if args.peft_path:
        adapted = load_adapter(model, args.peft_path, is_trainable=True)
    else:
        modules_to_save = names(args.modules_to_save)
        tied = bool(model.config.get_text_config().tie_word_embeddings)
        config = LoraConfig(
            task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules="all-linear" if args.target_modules == "all" else names(args.target_modules),
            modules_to_save=modules_to_save,
            ensure_weight_tying=tied and bool(EMBEDDINGS & set(modules_to_save or [])),
        )
        targets = [] if args.target_modules == "all" else names(args.target_modules)
        check_layer_names(model, "--target_modules", targets)
        check_layer_names(model, "--modules_to_save", modules_to_save)
        if tied and EMBEDDINGS & set(targets):
            raise ConfigError(
                "--target_modules: input and output embeddings of this model are one matrix, and an adapter "
                "on one of them would change both; use --modules_to_save embed_tokens,lm_head"
            )
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def check_layer_names(model: PreTrainedModel, flag: str, wanted: list[str] | None) -> None:
    """Refuse names that no layer of the model ends with."""
    layers = [
        name for name, module in model.named_modules() if name and list(module.parameters(recurse=False))
    ]
    for name in wanted or ():
        if not any(layer == name or layer.endswith("." + name) for layer in layers):
            known = sorted({layer.rpartition(".")[2] for layer in layers})
            raise ConfigError(f"{flag} {name}: the model has no such layer; it has {', '.join(known)}")


def adapter_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter's file.

    Raises:
        ModelError: no adapter there, or a damaged one.
    """
    adapter_settings(directory)
    file = directory / ADAPTER_FILE
    if not file.is_file():
        raise ModelError(f"{file} is missing; pickled adapters (.bin) are not read")
    check_safetensors(file)
    weights = load_file(file)
    broken = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ModelError(
            f"{file}: {broken} holds NaN or infinity; that training failed, use an earlier checkpoint"
        )
    return weights


def load_adapter(model: PreTrainedModel, path: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Load an adapter onto a base.

    Raises:
        ModelError: no adapter there, or one of other shapes.
    """
    directory = Path(path)
    weights = adapter_weights(directory)
    try:
        with warnings.catch_warnings(action="ignore"):  # about missing tensors, which are refused below
            adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=is_trainable)
        needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing = sorted(set(needed) - set(weights))
        if missing:
            raise ModelError(
                f"{directory / ADAPTER_FILE} is incomplete: {missing[0]} and {len(missing) - 1} more tensors "
                "are missing"
            )
        return adapted
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{path} does not fit this base: {text[:200]}") from None


def load_weights(model: PreTrainedModel | PeftModel, directory: Path) -> None:
    """Put a checkpoint's weights into the model that wrote them: the adapter's, or all in full fine-tuning.

    Raises:
        ModelError: a weight is missing or unknown.
    """
    if isinstance(model, PeftModel):
        result = set_peft_model_state_dict(model, load_file(directory / ADAPTER_FILE))
        wrong = result.unexpected_keys or [key for key in result.missing_keys if "lora_" in key]
    else:
        weights = {}
        for file in sorted(directory.glob("*.safetensors")):
            weights |= load_file(file)
        result = model.load_state_dict(weights, strict=False)
        model.tie_weights()
        tied = set(model.all_tied_weights_keys)
        wrong = result.unexpected_keys or [key for key in result.missing_keys if key not in tied]
    if wrong:
        raise ModelError(f"{directory} does not fit the model: {wrong[0]} and {len(wrong) - 1} more weights")
