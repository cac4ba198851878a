"""Flags, defaults and forbidden combinations that the stages share."""

import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medicalgpt.attention import flash_kernel_runs_on
from medicalgpt.errors import ConfigError
from medicalgpt.flags import parse_arguments, require, require_positive, require_tool_format
from medicalgpt.launch import DEFAULT_ACCUMULATION
from medicalgpt.tool_formats import CHOICES

import torch
from transformers import TrainingArguments

logger = logging.getLogger("medicalgpt")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "model directory, or a model's name on the hub"})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "tokenizer; default: the model's"}
    )
    torch_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "type of the base under adapters; full fine-tuning works in float32 and saves this type"
        },
    )
    flash_attn: bool = field(
        default=False,
        metadata={"help": "insist on the flash attention kernel (it is used anyway where it can be)"},
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={
            "help": "linear or yarn: stretch the positions when texts are longer than the model's context"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads are kept"})

    def __post_init__(self):
        require(
            self.torch_dtype in DTYPES,
            f"--torch_dtype {self.torch_dtype} is not allowed; expected {', '.join(DTYPES)}",
        )
        require(
            self.rope_scaling in (None, "linear", "yarn"),
            f"--rope_scaling {self.rope_scaling} is not allowed; expected linear or yarn (dynamic scaling "
            "would make a text's loss depend on the longest text of its batch)",
        )
        require(
            not self.flash_attn or (torch.cuda.is_available() and flash_kernel_runs_on(torch.device("cuda"))),
            "--flash_attn True needs an NVIDIA GPU of compute capability 8.0 or more; leave it out, the "
            "result is the same",
        )


@dataclass
class AdapterArguments:
    """How it is trained: LoRA, QLoRA or full fine-tuning."""

    use_peft: bool = field(default=True, metadata={"help": "LoRA; False: full fine-tuning"})
    peft_path: str | None = field(default=None, metadata={"help": "adapter directory to train on from"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "adapters are scaled by alpha / rank"})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "dropout on the adapters' input, 0 to below 1"}
    )
    target_modules: str = field(
        default="all",
        metadata={
            "help": "layers that get adapters: all (every linear layer but the head), or names with commas"
        },
    )
    modules_to_save: str | None = field(
        default=None,
        metadata={
            "help": "layers trained in full beside the adapters, names with commas, e.g. embed_tokens,lm_head"
        },
    )
    qlora: bool = field(default=False, metadata={"help": "adapters on a 4-bit (nf4) base"})
    load_in_4bit: bool = field(default=False, metadata={"help": "nf4 base; needs LoRA"})
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit base; needs LoRA"})

    def __post_init__(self):
        require_positive(self, "lora_rank")
        require(
            0 < self.lora_alpha < math.inf,
            f"--lora_alpha {self.lora_alpha} is not allowed; expected more than 0",
        )
        require(
            0 <= self.lora_dropout < 1,
            f"--lora_dropout {self.lora_dropout} is not allowed; expected 0 to below 1",
        )
        require(
            not (self.load_in_4bit and self.load_in_8bit),
            "--load_in_4bit and --load_in_8bit exclude each other",
        )
        require(
            not (self.qlora and self.load_in_8bit), "--qlora means a 4-bit base; leave out --load_in_8bit"
        )
        quantized = self.qlora or self.load_in_4bit or self.load_in_8bit
        require(
            self.use_peft or not quantized,
            "a quantised base cannot be fine-tuned in full; use --use_peft True",
        )
        require(
            self.use_peft or not (self.peft_path or self.modules_to_save),
            "--peft_path and --modules_to_save belong to LoRA; use --use_peft True or leave them out",
        )

    @property
    def quantization_bits(self) -> int | None:
        """4, 8 or None."""
        return 4 if self.qlora or self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class DataArguments:
    """What it learns from."""

    train_file_dir: str | None = field(
        default=None, metadata={"help": "directory (or file) of training data"}
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={"help": "directory of validation data; none, or the training directory: rows are held out"},
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "percent of rows held out by a hash of their prompt"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "a data set's name on the hub"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of that data set"})
    max_train_samples: int = field(default=-1, metadata={"help": "use the first N training rows; -1: all"})
    max_eval_samples: int = field(default=-1, metadata={"help": "use the first N validation rows; -1: all"})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "threads that tokenise; default: every core"}
    )

    def __post_init__(self):
        require(
            (self.train_file_dir is None) != (self.dataset_name is None),
            "give the training data as --train_file_dir DIR or as --dataset_name NAME, exactly one of them",
        )
        require_positive(self, "preprocessing_num_workers")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            require(
                value == -1 or value >= 1, f"--{name} {value} is not allowed; expected -1 (all) or 1 and more"
            )
        require(
            0 < self.validation_split_percentage < 100,
            f"--validation_split_percentage "
            f"{self.validation_split_percentage} is not allowed; expected more than 0 and less than 100",
        )
        if self.preprocessing_num_workers:
            os.environ["RAYON_NUM_THREADS"] = str(self.preprocessing_num_workers)


@dataclass
class ChatArguments:
    """How conversations become tokens."""

    template_name: str | None = field(
        default=None,
        metadata={"help": "chat format (see template.py); default: the model's own, where it is one of them"},
    )
    force_template: bool = field(
        default=False,
        metadata={"help": "use --template_name even if the model's own chat template says otherwise"},
    )
    tool_format: str | None = field(
        default=None,
        metadata={"help": f"how tools are called: {', '.join(CHOICES)}; default: the template's way"},
    )
    model_max_length: int = field(default=2048, metadata={"help": "limit of a conversation, in tokens"})
    max_source_length: int | None = field(
        default=None,
        metadata={"help": "cap of the prompt before the last answer, in tokens, inside --model_max_length"},
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "cap of an answer, in tokens, inside --model_max_length"}
    )

    def __post_init__(self):
        require_positive(self, "max_source_length", "max_target_length")
        require_tool_format(self.tool_format)
        require(
            self.model_max_length >= 8,
            f"--model_max_length {self.model_max_length} is not allowed; expected 8 or more",
        )


@dataclass
class StageArguments(TrainingArguments):
    """transformers' TrainingArguments with what this toolkit adds to them."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace the run that --output_dir holds"}
    )
    gradient_checkpointing: str = field(
        default="auto",
        metadata={
            "help": "activation checkpointing, slower and far smaller: True, False, auto (when needed)"
        },
    )

    def __post_init__(self):
        mode = str(self.gradient_checkpointing).lower()
        require(
            mode in ("auto", "true", "false"),
            f"--gradient_checkpointing {self.gradient_checkpointing} is not allowed; use auto, True or False",
        )
        require(self.do_train or self.do_eval, "--do_train False and --do_eval False leave nothing to do")
        if not self.do_train:
            self.report_to = "none"  # an evaluation has no curves
        self.check_ranges()
        require(
            self.train_sampling_strategy in ("random", "sequential"),
            f"--train_sampling_strategy {self.train_sampling_strategy} is not allowed; expected random or "
            "sequential (rows need no padding, so their lengths do not matter)",
        )
        refuse_unsupported(self)
        if not self.do_eval:
            self.eval_strategy = "no"  # the library would switch do_eval on again
        self.choose_device()
        self.gradient_checkpointing = self.activation_checkpointing = None
        super().__post_init__()
        self.gradient_checkpointing = mode
        self._n_gpu = min(self._n_gpu, 1)  # one process, one GPU; more GPUs take more processes (torchrun)

    def check_ranges(self) -> None:
        """Refuse values that mean nothing."""
        require_positive(
            self,
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "save_total_limit",
        )
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed", "dataloader_num_workers"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name} {value} is not allowed; expected 0 or more")
        require(
            self.max_steps == -1 or self.max_steps >= 1,
            f"--max_steps {self.max_steps} is not allowed; expected -1 (whole epochs) or 1 and more",
        )
        require(
            0 < self.num_train_epochs < math.inf,
            f"--num_train_epochs {self.num_train_epochs} is not allowed; expected more than 0",
        )
        require(
            not (self.fp16 and self.bf16),
            "--fp16 and --bf16 exclude each other, and bf16 is the default; add --bf16 False",
        )
        reporters = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        for name in reporters:
            require(name in REPORTERS, f"--report_to {name} is not allowed; expected {', '.join(REPORTERS)}")
            there = name == "none" or importlib.util.find_spec(name) is not None
            require(there, f"--report_to {name}: the package {name} is not installed; pip install {name}")

    def choose_device(self) -> None:
        """Fit precision to the hardware: refuse what cannot work, say what is done otherwise."""
        if not torch.cuda.is_available() or self.use_cpu:
            self.use_cpu = True
            require(not self.fp16, "--fp16 needs a GPU and there is none; use --bf16 True or neither")
            if self.bf16 and not cpu_has_fast_bfloat16():
                logger.info("bf16=False: this CPU has no fast bfloat16 instructions, computing in float32")
                self.bf16 = False
        elif self.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(
                f"--bf16: {torch.cuda.get_device_name()} has no bfloat16; use --torch_dtype float16 "
                "--fp16 True --bf16 False"
            )


def cpu_has_fast_bfloat16() -> bool:
    """True when the CPU multiplies bfloat16 matrices in hardware."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def refuse_unsupported(args: TrainingArguments) -> None:
    """Refuse flags of the library that would do nothing here, or something else than they say."""
    for name, mend in UNSUPPORTED_FLAGS.items():
        value = getattr(args, name)
        require(value in UNSET, f"--{name} {value} has no place here: {mend}")


UNSET = (None, False, "", 0, 0.0, [], "no", "False")
UNSUPPORTED_FLAGS = {
    "label_smoothing_factor": "dpo_training.py has --label_smoothing",
    "neftune_noise_alpha": "supervised_finetuning.py has --neft_alpha",
    "load_best_model_at_end": "take the checkpoint you want from --output_dir",
    "auto_find_batch_size": "set --per_device_train_batch_size; a step's memory is said before the first one",
    "push_to_hub": "upload the merged model with hf upload",
    "use_liger_kernel": "the projection is already computed for trained positions only, in chunks",
    "enable_jit_checkpoint": "a signal saves a whole checkpoint anyway",
    "ignore_data_skip": "a resumed run would train other rows than an uninterrupted one",
    "save_only_model": "such a checkpoint cannot be resumed",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "include_num_input_tokens_seen": "tokens per second are logged anyway",
    "torch_compile": "not supported yet",
    "fsdp": "not supported yet; torchrun with one process per GPU is",
    "deepspeed": "not supported yet; torchrun with one process per GPU is",
}
REPORTERS = ("none", "tensorboard", "wandb", "swanlab", "mlflow", "trackio")

COMMON_DEFAULTS = {
    "gradient_accumulation_steps": DEFAULT_ACCUMULATION,
    "do_train": True,
    "do_eval": True,
    "learning_rate": 2e-4,
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "logging_steps": 1,
    "logging_first_step": True,
    "save_steps": 50,
    "save_total_limit": 3,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "bf16": True,
    "report_to": "tensorboard",
    "optim": "adamw_torch",
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
    "logging_nan_inf_filter": False,
}


@dataclass(frozen=True)
class StageFlags:
    """Every flag of a stage, by what it is about.

    Attributes:
        chat: None in a stage that reads plain texts.
        own: what only this stage has.
        run: the training loop.
    """

    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    chat: ChatArguments | None
    own: Any
    run: StageArguments

    def groups(self) -> list[Any]:
        """Return the argument dataclasses that are there."""
        return [
            g for g in (self.model, self.adapter, self.data, self.chat, self.own, self.run) if g is not None
        ]


def parse_stage(
    argv: Sequence[str],
    own: type,
    description: str,
    defaults: dict[str, Any],
    *,
    model: type = ModelArguments,
) -> StageFlags:
    """Return the flags of a stage that reads conversations; see `parse_arguments`.

    Args:
        own: the dataclass of what only this stage has.
        model: the dataclass of what is trained.
    """
    types = (model, AdapterArguments, DataArguments, ChatArguments, own, StageArguments)
    return StageFlags(*parse_arguments(argv, types, description, COMMON_DEFAULTS | defaults))


def parse_text_stage(
    argv: Sequence[str], own: type, description: str, defaults: dict[str, Any]
) -> StageFlags:
    """Return the flags of a stage that reads plain texts; see `parse_arguments`."""
    types = (ModelArguments, AdapterArguments, DataArguments, own, StageArguments)
    model, adapter, data, own_arguments, run = parse_arguments(
        argv, types, description, COMMON_DEFAULTS | defaults
    )
    return StageFlags(model, adapter, data, None, own_arguments, run)
