"""What only a GPU can show: `pytest -m gpu`. Skipped where there is none."""

import math
import os
import subprocess
import sys

import dpo_training
import supervised_finetuning
from medicalgpt.attention import FLAT_ATTENTION
from medicalgpt.collator import FlatCollator, PairCollator
from medicalgpt.engine import FlatLM
from medicalgpt.tokenization import tokens

import pytest
import torch
from conftest import build_model
from test_flat import EXAMPLES, PAIRS, VOCAB
from test_training import ROOT, history

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def on_gpu(batch: dict) -> dict:
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.mark.parametrize("collator, examples", [(FlatCollator(), EXAMPLES), (PairCollator(), PAIRS)])
@pytest.mark.parametrize("window", [None, 5])
def test_the_flash_kernel_agrees_with_the_cpu_path(collator, examples, window):
    """Same weights rounded to bfloat16: the CPU computes in float32, the GPU in bfloat16 with the flash kernel."""
    model = build_model("qwen2", VOCAB, hidden_size=256, intermediate_size=256, initializer_range=0.02).to(
        torch.bfloat16
    )
    model.set_attn_implementation(FLAT_ATTENTION)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    batch = collator(examples)
    with torch.no_grad():
        expected = FlatLM(model.float()).eval()(**batch)
        logps = FlatLM(model.to("cuda", torch.bfloat16)).eval()(**on_gpu(batch)).cpu()
    assert (logps - expected).abs().max() < 0.05


def test_documents_of_a_row_do_not_see_each_other_in_the_flash_kernel():
    model = build_model("llama", VOCAB, hidden_size=256).to("cuda", torch.bfloat16)
    model.set_attn_implementation(FLAT_ATTENTION)
    flat = FlatLM(model).eval()
    first = [dict(EXAMPLES[0], input_ids=tokens([7 + i % 5 for i in range(17)])), EXAMPLES[2]]
    with torch.no_grad():
        a = flat(**on_gpu(FlatCollator()([EXAMPLES[0], EXAMPLES[2]])))
        b = flat(**on_gpu(FlatCollator()(first)))
    num = int((EXAMPLES[2]["labels"][1:] != -100).sum())
    assert torch.equal(a[-num:], b[-num:])


def gpu_command(stage, model_dir, data_dir, output_dir, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(model_dir), "--train_file_dir", str(data_dir / stage), "--output_dir",
        str(output_dir), "--template_name", "chatml", "--max_steps", "6", "--logging_steps", "1", "--learning_rate",
        "1e-2", "--eval_strategy", "no", "--report_to", "none", "--validation_split_percentage", "15", *more,
    ]  # fmt: skip


def test_a_bfloat16_lora_step_trains(model_dir, data_dir, tmp_path):
    supervised_finetuning.main(gpu_command("sft", model_dir, data_dir, tmp_path / "o"))
    losses = [loss for (loss,) in history(tmp_path / "o", "loss")]
    assert losses[-1] < losses[0] - 0.1


def test_a_float16_lora_step_trains(model_dir, data_dir, tmp_path):
    flags = ("--bf16", "False", "--fp16", "True", "--torch_dtype", "float16")
    supervised_finetuning.main(gpu_command("sft", model_dir, data_dir, tmp_path / "o", *flags))
    losses = [loss for (loss,) in history(tmp_path / "o", "loss")]
    assert losses[-1] < losses[0] - 0.1


def test_an_nf4_dpo_step_starts_at_log_two_and_trains(model_dir, data_dir, tmp_path):
    flags = ("--qlora", "True", "--load_in_4bit", "True", "--optim", "paged_adamw_32bit")
    dpo_training.main(gpu_command("dpo", model_dir, data_dir, tmp_path / "o", *flags))
    losses = [loss for (loss,) in history(tmp_path / "o", "loss")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_nccl_ranks_are_one_rank_with_twice_the_accumulation(model_dir, data_dir, tmp_path):
    exact = (
        "--torch_dtype",
        "float32",
        "--bf16",
        "False",
        "--lora_dropout",
        "0",
        "--per_device_train_batch_size",
        "2",
    )
    logs = []
    for ranks, accumulation in ((1, "2"), (2, "1")):
        output = tmp_path / str(ranks)
        flags = gpu_command(
            "sft", model_dir, data_dir, output, *exact, "--gradient_accumulation_steps", accumulation
        )
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1" if ranks == 2 else "0"}
        subprocess.run([*launcher, "supervised_finetuning.py", *flags], cwd=ROOT, env=environment, check=True)
        logs.append(torch.tensor(history(output, "loss", "grad_norm")))
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
