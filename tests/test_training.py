"""Training through the stages' own main: batch splits, ranks, resume, full fine-tuning, evaluation, guards."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dpo_training
import merge_peft_adapter
import pretraining
import reward_modeling
import supervised_finetuning
from medicalgpt.callbacks import ProgressBar
from medicalgpt.checkpoint import why_not_whole
from medicalgpt.errors import ConfigError, DataError, ModelError, RunError, StoppedError
from medicalgpt.holdout import hold_out
from medicalgpt.records import parse_chat, read_records
from medicalgpt.row_log import RowLog
from medicalgpt.tokenization import ChatEncoder, ChatFormat
from template import TEMPLATES

import pytest
import torch
from conftest import build_model, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, FalconForCausalLM

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"pt": pretraining, "sft": supervised_finetuning, "dpo": dpo_training, "rm": reward_modeling}
SCRIPTS = {name: Path(module.__file__).name for name, module in STAGES.items()}
DATA = {"rm": "dpo"}
EXACT = [
    "--torch_dtype",
    "float32",
    "--bf16",
    "False",
    "--gradient_checkpointing",
    "False",
    "--report_to",
    "none",
]


def command(stage: str, model_dir: Path, data_dir: Path, output_dir: Path, **flags) -> list[str]:
    """Return a stage's flags: float32, a log line per step, what a test asks for over that."""
    options = {
        "model_name_or_path": model_dir, "train_file_dir": data_dir / DATA.get(stage, stage), "output_dir": output_dir,
        "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "eval_strategy": "no", "lora_dropout": 0.0,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "warmup_steps": 0,
        "validation_split_percentage": 15,
    }  # fmt: skip
    options |= {"block_size": 32} if stage == "pt" else {"template_name": "chatml"}
    return EXACT + [text for name, value in (options | flags).items() for text in (f"--{name}", str(value))]


def history(output_dir: Path, *names: str) -> list[list]:
    """Return the named values of every training log line."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [[line[name] for name in names] for line in state["log_history"] if "loss" in line]


def results(output_dir: Path, split: str) -> dict:
    return json.loads((output_dir / f"{split}_results.json").read_text())


def weights_hash(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "adapter_model.safetensors").read_bytes()).hexdigest()


def run(stage: str, model_dir, data_dir, output_dir, **flags) -> Path:
    STAGES[stage].main(command(stage, model_dir, data_dir, output_dir, **flags))
    return output_dir


# ---- the same loss for any split -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_same_however_it_is_split(stage, model_dir, data_dir, tmp_path):
    """Batch 8 × accumulation 1 = 2 × 4 = 1 × 8: losses and gradient norms to 5 digits."""
    logs = [
        history(run(stage, model_dir, data_dir, tmp_path / f"{batch}", per_device_train_batch_size=batch,
                    gradient_accumulation_steps=8 // batch, max_steps=2), "loss", "grad_norm")
        for batch in (8, 2, 1)
    ]  # fmt: skip
    assert len(logs[0]) == 2
    for other in logs[1:]:
        assert torch.tensor(other) == pytest.approx(torch.tensor(logs[0]), rel=1e-5)


def test_under_a_launcher_two_ranks_refuse_in_one_line_with_the_stages_code(tmp_path):
    """torchrun alone would add forty lines and make every code 1."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "run_sft.sh"), "--learning_rat", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: unknown argument '--learning_rat'; did you mean --learning_rate?", "FAILED with exit code 2"
    ]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_rank_with_twice_the_accumulation(stage, model_dir, data_dir, tmp_path):
    """Two epochs whose last step has a batch for one rank only, and a last batch of one row."""
    rows = {"pt": 15}.get(stage, 17)
    flags = {
        "per_device_train_batch_size": 2,
        "max_steps": -1,
        "num_train_epochs": 2,
        "max_train_samples": rows,
    }
    run(stage, model_dir, data_dir, tmp_path / "one", gradient_accumulation_steps=2, **flags)
    two = command(stage, model_dir, data_dir, tmp_path / "two", gradient_accumulation_steps=1, **flags)
    result = torchrun([SCRIPTS[stage], *two], ranks=2)
    assert result.returncode == 0, result.stderr[-2000:]
    one, both = (history(tmp_path / name, "loss", "grad_norm") for name in ("one", "two"))
    assert torch.tensor(both) == pytest.approx(torch.tensor(one), rel=1e-5)
    expected, actual = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, atol=1e-5), name
    for key, value in results(tmp_path / "one", "eval").items():
        if "runtime" not in key:
            assert results(tmp_path / "two", "eval")[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_every_step_has_a_learning_rate_the_first_and_the_last_too(kind, model_dir, data_dir, tmp_path):
    """Linear, warm-up 2 of 4 steps: the schedule of 5 steps at 1, 2, 3, 4, which is 1/2, 1, 2/3, 1/3 of the rate."""
    output = run("sft", model_dir, data_dir, tmp_path / "o", warmup_steps=2, lr_scheduler_type=kind)
    rates = [rate / 1e-2 for (rate,) in history(output, "learning_rate")]
    assert all(rate > 0 for rate in rates)
    if kind == "linear":
        assert rates == pytest.approx([1 / 2, 1, 2 / 3, 1 / 3])


def test_the_first_dpo_loss_is_log_two_and_nothing_is_preferred(model_dir, data_dir, tmp_path):
    output = run("dpo", model_dir, data_dir, tmp_path / "o", max_steps=1)
    ((loss, margin, accuracy),) = history(output, "loss", "margin", "accuracy")
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert (margin, accuracy) == (0, 0.5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo", "orpo"])
def test_every_preference_loss_learns_the_training_pairs(loss_type, model_dir, data_dir, tmp_path):
    output = run("dpo", model_dir, data_dir, tmp_path / "o", loss_type=loss_type, max_steps=12, seed=1)
    logs = history(output, "loss", "margin")
    assert logs[-1][0] < logs[0][0]
    assert logs[-1][1] > logs[0][1]


# ---- the loss is what it says ----------------------------------------------------------------------------------


def test_evaluation_is_the_models_own_loss_document_by_document(model_dir, data_dir, tmp_path):
    """Token-weighted mean over held-out conversations by transformers' own loss, one conversation at a time."""
    output = run("sft", model_dir, data_dir, tmp_path / "o", do_train=False)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    _, held = hold_out(read_records([data_dir / "sft" / "a.jsonl"], parse_chat, RowLog()), 15)
    encoder = ChatEncoder(tokenizer, ChatFormat.of(TEMPLATES["chatml"], tokenizer), max_length=2048)
    total, count = 0.0, 0
    for example in encoder.encode_chats(held, RowLog()):
        ids, labels = (
            torch.tensor(example[name], dtype=torch.long)[None] for name in ("input_ids", "labels")
        )
        num = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * num
        count += num
    metrics = results(output, "eval")
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_full_fine_tuning_saves_an_ordinary_model(model_dir, data_dir, tmp_path):
    output = run("sft", model_dir, data_dir, tmp_path / "o", use_peft=False, learning_rate=1e-3)
    assert history(output, "loss")[-1][0] < history(output, "loss")[0][0]
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.tie_word_embeddings
    before = AutoModelForCausalLM.from_pretrained(model_dir)
    changed = [name for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True)
               if not torch.equal(a, b)]  # fmt: skip
    assert len(changed) == len(list(model.named_parameters()))


def test_full_dpo_keeps_a_frozen_reference(model_dir, data_dir, tmp_path):
    output = run("dpo", model_dir, data_dir, tmp_path / "o", use_peft=False, learning_rate=1e-3, max_steps=3)
    losses = [loss for (loss,) in history(output, "loss")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]


def test_modules_to_save_keeps_tied_embeddings_one_matrix(model_dir, data_dir, tmp_path):
    output = run(
        "pt", model_dir, data_dir, tmp_path / "o", modules_to_save="embed_tokens,lm_head", max_steps=2
    )
    saved = load_file(output / "adapter_model.safetensors")
    embeddings = [tensor for tensor in saved.values() if tensor.shape[0] > 300]
    before = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert all(torch.equal(tensor, embeddings[0]) and tensor.dtype == torch.float32 for tensor in embeddings)
    assert not torch.equal(embeddings[0], before)


@pytest.mark.parametrize("modules", ["embed_tokens,lm_head", "embed_tokens", "norm"])
def test_modules_to_save_train_on_a_bfloat16_base(modules, model_dir, data_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    flags = {
        "torch_dtype": "bfloat16",
        "bf16": True,
        "gradient_checkpointing": "auto",
        "modules_to_save": modules,
    }
    output = run("sft", tmp_path / "base", data_dir, tmp_path / "o", **flags)
    losses = [loss for (loss,) in history(output, "loss")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("change", ["peft_path", "tokenizer", "config", "do_eval"])
def test_whatever_the_numbers_depend_on_is_part_of_the_run(change, model_dir, data_dir, tmp_path):
    base, flags = tmp_path / "base", {"max_steps": 1}
    shutil.copytree(model_dir, base)
    run("sft", base, data_dir, tmp_path / "o", **flags)
    if change == "peft_path":
        flags["peft_path"] = run("sft", base, data_dir, tmp_path / "first", max_steps=1, seed=1)
    elif change == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["fever"])
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        flags["tokenizer_name_or_path"] = tmp_path / "tokenizer"
    elif change == "config":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    else:
        flags["do_eval"] = False
    with pytest.raises(ConfigError, match=rf"holds another run .*{change}: "):
        run("sft", base, data_dir, tmp_path / "o", **flags)


def test_an_adapter_of_another_base_is_not_trained_on(model_dir, data_dir, tmp_path, tokenizer):
    first = run("sft", model_dir, data_dir, tmp_path / "first", max_steps=1)
    build_model("llama", len(tokenizer), seed=9, tie_word_embeddings=True).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="was trained on"):
        run("sft", tmp_path / "other", data_dir, tmp_path / "second", peft_path=first)


def test_another_runs_checkpoint_is_not_continued_from(model_dir, data_dir, tmp_path):
    first = run("sft", model_dir, data_dir, tmp_path / "first", max_steps=1, seed=1)
    with pytest.raises(ConfigError, match=r"holds another run .*seed: 1 → 42"):
        run("sft", model_dir, data_dir, tmp_path / "o", resume_from_checkpoint=first / "checkpoint-1")


def test_a_run_killed_before_it_is_published_adds_no_step(model_dir, data_dir, tmp_path, monkeypatch):
    flags = {"max_steps": 3, "lr_scheduler_type": "constant", "lora_dropout": 0.1}
    run("sft", model_dir, data_dir, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        patch.setattr("medicalgpt.stage.publish_result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("sft", model_dir, data_dir, tmp_path / "killed", **flags)
    run("sft", model_dir, data_dir, tmp_path / "killed", **flags)
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")
    assert (
        results(tmp_path / "killed", "eval")["eval_loss"] == results(tmp_path / "whole", "eval")["eval_loss"]
    )


def test_one_text_is_trained_without_validation_and_says_so(model_dir, tmp_path, caplog):
    (tmp_path / "d" / "pt").mkdir(parents=True)
    (tmp_path / "d" / "pt" / "novel.txt").write_text("Fever is a temperature above 38 degrees.\n" * 20)
    run("pt", model_dir, tmp_path / "d", tmp_path / "o", max_steps=1)
    assert "nothing is evaluated" in caplog.text
    assert not (tmp_path / "o" / "eval_results.json").exists()


def test_more_ranks_than_validation_rows_evaluate_together(model_dir, data_dir, tmp_path):
    flags = command("dpo", model_dir, data_dir, tmp_path / "two", max_steps=1, max_eval_samples=1)
    result = torchrun([SCRIPTS["dpo"], *flags], ranks=2)
    assert result.returncode == 0, result.stderr[-2000:]
    one = run("dpo", model_dir, data_dir, tmp_path / "one", max_steps=1, max_eval_samples=1, do_train=False)
    assert results(tmp_path / "two", "eval").keys() == results(one, "eval").keys()


def test_training_continues_on_an_adapter(model_dir, data_dir, tmp_path):
    first = run("sft", model_dir, data_dir, tmp_path / "first", max_steps=6)
    second = run("sft", model_dir, data_dir, tmp_path / "second", peft_path=first, max_steps=1)
    assert history(second, "loss")[0][0] < history(first, "loss")[0][0] - 0.1


def test_qlora_trains_on_a_four_bit_base(model_dir, data_dir, tmp_path):
    output = run("sft", model_dir, data_dir, tmp_path / "o", qlora=True, load_in_4bit=True, optim="paged_adamw_32bit",
                 max_steps=6, eval_strategy="steps", eval_steps=2)  # fmt: skip
    losses = [loss for (loss,) in history(output, "loss")]
    assert losses[-1] < losses[0] - 0.1
    assert load_file(output / "adapter_model.safetensors").keys()


def test_a_model_that_cannot_keep_documents_apart_is_trained_on_padded_rows(
    data_dir, tmp_path, tokenizer, caplog
):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    tokenizer.save_pretrained(tmp_path / "falcon")
    with caplog.at_level("INFO", logger="medicalgpt"):
        for stage in STAGES:
            flags = {"max_steps": 6, "gradient_checkpointing": "auto"}
            output = run(stage, tmp_path / "falcon", data_dir, tmp_path / stage, **flags)
            assert history(output, "loss")[-1][0] < history(output, "loss")[0][0]
    assert caplog.text.count("padded=True") == len(STAGES)


def test_stretched_positions_reach_the_merged_model(model_dir, data_dir, tmp_path):
    """Context 1,024, texts of 2,048 tokens: a factor of 2."""
    flags = {"rope_scaling": "linear", "model_max_length": 2048, "max_steps": 1}
    output = run("sft", model_dir, data_dir, tmp_path / "o", **flags)
    merge_peft_adapter.main(["--base_model", str(model_dir), "--lora_model", str(output), "--output_dir",
                             str(tmp_path / "m")])  # fmt: skip
    rope = json.loads((tmp_path / "m" / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)


@pytest.mark.parametrize("flag", ["target_modules", "modules_to_save"])
def test_layers_that_the_model_does_not_have_are_refused_with_those_it_has(
    flag, model_dir, data_dir, tmp_path
):
    with pytest.raises(ConfigError, match=rf"--{flag} c_attn: the model has no such layer; it has .*q_proj"):
        run("sft", model_dir, data_dir, tmp_path / "o", **{flag: "c_attn"})


def test_rows_of_a_hub_data_set_are_read_by_the_same_schema(model_dir, data_dir, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (data_dir / "sft" / "a.jsonl").read_text().splitlines()]
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, config, **_: rows if name == "org/talks" else None
    )
    flags = command("sft", model_dir, data_dir, tmp_path / "o", max_steps=2)
    place = flags.index("--train_file_dir")
    flags[place : place + 2] = ["--dataset_name", "org/talks"]
    supervised_finetuning.main(flags)
    expected = run("sft", model_dir, data_dir, tmp_path / "files", max_steps=2)
    assert history(tmp_path / "o", "loss") == history(expected, "loss")
    rows[3]["conversations"][0]["from"] = "gtp"
    with pytest.raises(DataError, match=r"org/talks\[3\]: conversations\[0\]\.from: is 'gtp'"):
        supervised_finetuning.main([*flags, "--output_dir", str(tmp_path / "p")])


def test_the_named_checkpoint_is_continued_from(model_dir, data_dir, tmp_path, monkeypatch):
    flags = {"save_steps": 1, "save_total_limit": 5, "max_steps": 6}
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(StoppedError):
            run("sft", model_dir, data_dir, tmp_path / "o", **flags)
    with pytest.raises(ConfigError, match="--resume_from_checkpoint False, but"):
        run("sft", model_dir, data_dir, tmp_path / "o", resume_from_checkpoint=False, **flags)
    with pytest.raises(ModelError, match="is not whole"):
        run("sft", model_dir, data_dir, tmp_path / "o", resume_from_checkpoint=tmp_path, **flags)
    run(
        "sft",
        model_dir,
        data_dir,
        tmp_path / "o",
        resume_from_checkpoint=tmp_path / "o" / "checkpoint-2",
        **flags,
    )
    assert len(history(tmp_path / "o", "loss")) == 6


def test_activation_checkpointing_changes_no_number(model_dir, data_dir, tmp_path):
    logs = []
    for mode in ("False", "True"):
        output = run(
            "sft", model_dir, data_dir, tmp_path / mode, gradient_checkpointing=mode, lora_dropout=0.1
        )
        logs.append(history(output, "loss", "grad_norm"))
    assert torch.tensor(logs[1]) == pytest.approx(torch.tensor(logs[0]), rel=1e-5)


# ---- what a run leaves behind ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model_dir, data_dir, tmp_path_factory) -> Path:
    return run(
        "sft",
        model_dir,
        data_dir,
        tmp_path_factory.mktemp("runs") / "sft",
        max_steps=2,
        report_to="tensorboard",
    )


def test_the_output_directory_holds_what_the_guide_says(finished):
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "run.json", "train_results.txt",
                 "train_results.json", "eval_results.json", "trainer_state.json", "checkpoint-2"):  # fmt: skip
        assert (finished / name).exists(), name
    assert why_not_whole(finished) is None
    assert list((finished / "logs").rglob("events.out.tfevents.*"))
    record = json.loads((finished / "run.json").read_text())
    assert record["status"] == "complete"
    assert (record["stage"], record["template"]) == ("sft", "chatml")
    assert len(record["base"]["fingerprint"]) == 32


def test_the_same_command_again_changes_nothing(finished, model_dir, data_dir, caplog):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    with caplog.at_level("INFO", logger="medicalgpt"):
        run("sft", model_dir, data_dir, finished, max_steps=2, report_to="tensorboard")
    assert "already complete" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == before


@pytest.mark.parametrize("flag, value", [("learning_rate", 0.5), ("seed", 7), ("per_device_train_batch_size", 2),
                                         ("model_max_length", 64), ("template_name", "vicuna")])  # fmt: skip
def test_a_changed_command_is_refused_with_old_and_new(finished, model_dir, data_dir, flag, value):
    flags = {"max_steps": 2, flag: value} | ({"force_template": True} if flag == "template_name" else {})
    with pytest.raises(ConfigError, match=rf"{flag}: .* → {value}"):
        run("sft", model_dir, data_dir, finished, **flags)


# ---- stopped and continued -------------------------------------------------------------------------------------


def stop_at(step: int, monkeypatch) -> None:
    """Send SIGTERM to this process during a step, as a scheduler would."""
    advance = ProgressBar.on_step_end

    def advance_and_stop(self, args, state, control, **kwargs):
        advance(self, args, state, control, **kwargs)
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ProgressBar, "on_step_end", advance_and_stop)


@pytest.mark.parametrize("stage, flags", [
    ("pt", {"lora_dropout": 0.1}),
    ("sft", {"lora_dropout": 0.1, "gradient_accumulation_steps": 2, "max_steps": 8, "logging_steps": 3}),
    ("dpo", {"lora_dropout": 0.1, "max_steps": 9}),
    ("sft", {"use_peft": False, "learning_rate": 1e-3, "max_steps": 7}),
])  # fmt: skip
def test_a_stopped_run_continues_exactly(stage, flags, model_dir, data_dir, tmp_path, monkeypatch):
    """Loss, gradient norm and learning rate by repr, the final weights by hash, beyond one epoch and inside a log interval."""
    run(stage, model_dir, data_dir, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(StoppedError, match="after step"):
            run(stage, model_dir, data_dir, tmp_path / "parts", **flags)
    run(stage, model_dir, data_dir, tmp_path / "parts", **flags)
    whole, parts = (
        repr(history(tmp_path / name, "loss", "grad_norm", "learning_rate")) for name in ("whole", "parts")
    )
    assert parts == whole
    file = "adapter_model.safetensors" if flags.get("use_peft", True) else "model.safetensors"
    hashes = {
        hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() for name in ("whole", "parts")
    }
    assert len(hashes) == 1
    assert (
        results(tmp_path / "parts", "eval")["eval_loss"] == results(tmp_path / "whole", "eval")["eval_loss"]
    )


def test_a_torn_checkpoint_is_skipped_by_name(model_dir, data_dir, tmp_path, monkeypatch, caplog):
    flags = {"save_steps": 1, "save_total_limit": 5, "lora_dropout": 0.1}
    run("sft", model_dir, data_dir, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(StoppedError):
            run("sft", model_dir, data_dir, tmp_path / "torn", **flags)
    newest = max((tmp_path / "torn").glob("checkpoint-*"))
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    with caplog.at_level("INFO", logger="medicalgpt"):
        run("sft", model_dir, data_dir, tmp_path / "torn", **flags)
    assert f"skipped {newest.name}: optimizer.pt has" in caplog.text
    assert weights_hash(tmp_path / "torn") == weights_hash(tmp_path / "whole")


def test_a_run_without_a_whole_checkpoint_does_not_start_from_zero(
    model_dir, data_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(StoppedError):
            run("sft", model_dir, data_dir, tmp_path / "o")
    for manifest in (tmp_path / "o").rglob("MANIFEST.json"):
        manifest.unlink()
    with pytest.raises(ModelError, match="no checkpoint is whole"):
        run("sft", model_dir, data_dir, tmp_path / "o")
    run("sft", model_dir, data_dir, tmp_path / "o", overwrite_output_dir=True)


# ---- guards ----------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_before_the_step(model_dir, data_dir, tmp_path, monkeypatch):
    loss = dpo_training.preference_loss
    calls = []

    def poisoned(*args, **kwargs):
        losses, chosen, rejected = loss(*args, **kwargs)
        calls.append(1)
        return losses * (float("nan") if len(calls) == 2 else 1.0), chosen, rejected

    monkeypatch.setattr(dpo_training, "preference_loss", poisoned)
    with pytest.raises(RunError, match=r"step 2: the gradient is not finite, first in .*lora"):
        run("dpo", model_dir, data_dir, tmp_path / "o", save_steps=1, do_eval=False)
    for path in (tmp_path / "o").rglob("adapter_model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_rows_without_a_trained_token_are_refused_before_the_model_loads(
    model_dir, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        supervised_finetuning, "build_model", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with pytest.raises(DataError, match=r"nothing to train on.*question_too_long"):
        run("sft", model_dir, data_dir, tmp_path / "o", model_max_length=8)
