"""run.json: what a run is, what it was made from, and whether a repeated command means the same run."""

import enum
import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

from medicalgpt.arguments import StageFlags
from medicalgpt.checkpoint import (
    MANIFEST,
    PARTIAL,
    checkpoints,
    fingerprint,
    manifest_files,
    why_not_whole,
    write_json,
)
from medicalgpt.errors import ConfigError, ModelError

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "bitsandbytes")

# Flags that change neither the trained numbers nor where the run stops; everything else must stay for a
# resume.
NEUTRAL_FLAGS = frozenset(
    [
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "eval_steps",
        "eval_strategy",
        "eval_delay",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "preprocessing_num_workers",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "cache_dir",
        "model_name_or_path",
        "sft_model_path",
        "reward_model_path",
        "reward_function",
        "sample_steps",
        "num_sample_prompts",
        "tokenizer_name_or_path",
        "train_file_dir",
        "validation_file_dir",
        "do_train",
        "max_eval_samples",
        "per_device_eval_batch_size",
        "ddp_timeout",
        "local_rank",
        "debug",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "use_cpu",
        "peft_path",
        "force_template",
        "logging_dir",
    ]
)


def plain(value: object) -> object:
    """Return a value as JSON can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def values_of(flags: StageFlags) -> dict[str, object]:
    """Return every flag of a stage with its value."""
    return {f.name: plain(getattr(group, f.name)) for group in flags.groups() for f in fields(group)}


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@dataclass
class RunRecord:
    """The record of one run in its output directory."""

    output_dir: Path
    content: dict
    checkpoint: str | None = None  # to continue from

    @classmethod
    def begin(
        cls,
        stage: str,
        flags: StageFlags,
        *,
        base: dict,
        data: dict,
        template: str | None,
        parent: dict | None,
        also: dict[str, str] | None = None,
    ) -> "RunRecord":
        """Describe the run that a command asks for.

        Args:
            base: {"path", "fingerprint", "config", "tokenizer", "adapter"} of what is trained on.
            data: {file: sha256}, in reading order.
            parent: the base's own run.json, if it has one.
            also: what else the numbers depend on, {name: fingerprint}.
        """
        values = values_of(flags)
        identity = {name: value for name, value in values.items() if name not in NEUTRAL_FLAGS}
        identity |= {"base": base["fingerprint"], "config": base["config"], "tokenizer": base["tokenizer"]}
        identity |= {"data": list(data.values()), "template": template, "peft_path": base["adapter"]}
        identity |= {"world_size": flags.run.world_size} | (also or {})
        identity |= {f"version of {name}": value for name, value in versions().items()}
        content = {
            "stage": stage,
            "status": "running",
            "template": template,
            "base": base,
            "data": {"files": data},
            "arguments": values,
            "identity": identity,
            "versions": versions(),
            "seed": flags.run.seed,
            "parent": parent,
        }
        return cls(Path(flags.run.output_dir), content)

    def save(self, **more: object) -> None:
        """Write run.json into the output directory, with what has become known."""
        self.content |= plain(more)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.output_dir / RUN_FILE, self.content)

    def check_place(self) -> None:
        """Refuse an output directory that is a file, or holds something that is no run of this toolkit.

        Raises:
            ConfigError: says what is there.
        """
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ConfigError(f"--output_dir {self.output_dir} is a file; expected a directory")
        old = read_run(self.output_dir)
        if old is None and self.output_dir.is_dir() and any(self.contents()):
            raise ConfigError(
                f"--output_dir {self.output_dir} is not empty and holds no {RUN_FILE} of this toolkit; use "
                "another directory"
            )
        if old is not None and "identity" not in old:
            raise ConfigError(f"--output_dir {self.output_dir} holds a merged model; use another directory")

    def is_complete(self) -> bool:
        """Return True when the output directory already holds this very run, complete.

        Raises:
            ConfigError: it holds another run; the differences are listed, old → new.
        """
        old = read_run(self.output_dir)
        if old is None:
            return False
        names = sorted({*old["identity"], *self.content["identity"]})
        changes = [
            f"{name}: {shorten(old['identity'].get(name))} → {shorten(self.content['identity'].get(name))}"
            for name in names
            if old["identity"].get(name) != self.content["identity"].get(name)
        ]
        if old["stage"] != self.content["stage"]:
            changes.insert(0, f"stage: {old['stage']} → {self.content['stage']}")
        if changes:
            raise ConfigError(
                f"{self.output_dir} holds another run ({'; '.join(changes)}); go back to those values to "
                "continue it, use another --output_dir, or replace it with --overwrite_output_dir True"
            )
        return old["status"] == "complete" and why_not_whole(self.output_dir) is None

    def contents(self) -> list[Path]:
        """Return what the directory holds besides the lock, logs and unfinished writes."""
        own = (".lock", "logs", RUN_FILE)
        return [p for p in self.output_dir.iterdir() if p.name not in own and not p.name.endswith(PARTIAL)]

    def clear(self) -> None:
        """Remove the run that the directory holds: what it wrote, and nothing that somebody put beside it."""
        if read_run(self.output_dir) is None:
            return
        written = [self.output_dir / name for name in manifest_files(self.output_dir)]
        partial = list(self.output_dir.glob(f"*{PARTIAL}"))
        own = [self.output_dir / name for name in (MANIFEST, "logs", RUN_FILE)]
        for path in [*checkpoints(self.output_dir), *partial, *written, *own]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def shorten(value: object) -> str:
    """Return a value in at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def read_run(directory: Path) -> dict | None:
    """Return the run.json of a directory, or None when it has none.

    Raises:
        ModelError: the file is damaged.
    """
    path = directory / RUN_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ModelError(f"{path} is damaged; restore it, or remove it if the run is not needed") from None
    if not isinstance(content, dict) or "stage" not in content:
        raise ModelError(f"{path} is not a record of this toolkit; remove it or use another directory")
    return content


def recorded_template(directory: Path) -> str | None:
    """Return the template that a model or adapter was trained with, or None where nobody wrote it down."""
    return (read_run(directory) or {}).get("template")


def recorded_tool_format(directory: Path) -> str | None:
    """Return the --tool_format that a model or adapter was trained with, None for the template's own way."""
    return ((read_run(directory) or {}).get("arguments") or {}).get("tool_format")


def config_fingerprint(directory: Path) -> str:
    """Return a fingerprint of what a model's config.json says about its architecture."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = ("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype")
    kept = {name: value for name, value in config.items() if name not in names}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def check_base(adapter_dir: Path, base_dir: Path) -> bool:
    """Return True when the adapter was trained on this base, False when nobody wrote down on which.

    Raises:
        ModelError: it was trained on another one, or this one already contains it.
    """
    run, own = read_run(adapter_dir), fingerprint(base_dir)
    parent = read_run(base_dir) or {}
    if parent.get("adapter", {}).get("fingerprint") == fingerprint(adapter_dir):
        raise ModelError(
            f"{base_dir} already contains {adapter_dir}; use the base it was trained on, "
            f"{parent['base']['path']}"
        )
    if run is None:
        return False
    trained_on = run["base"]["fingerprint"]
    if trained_on != own:
        raise ModelError(
            f"{adapter_dir} was trained on {run['base']['path']} (fingerprint {trained_on}), not on "
            f"{base_dir} (fingerprint {own}); give that base"
        )
    config = run["base"].get("config")
    if config is not None and config != config_fingerprint(base_dir):
        raise ModelError(
            f"{base_dir}/config.json was changed since {adapter_dir} was trained on it; restore it"
        )
    return True
