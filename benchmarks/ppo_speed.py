"""Samples per second of rollout and update: our PPO and RLOO beside TRL's RLOOTrainer.

    python -m benchmarks.ppo_speed --work_dir /tmp/ppo-speed

Same model (bfloat16 where the CPU is fast in it), LoRA r 8 on all linear layers without dropout, the same
prompts, 4 answers to each of 4 prompts per update, sampled at temperature 1 up to --tokens tokens, one pass
over them, the same reward function. TRL runs as shipped (gradient checkpointing) and without it. The first
update of each is not counted. On a quiet machine only; finished parts are kept in --work_dir.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from medicalgpt.arguments import cpu_has_fast_bfloat16
from medicalgpt.checkpoint import write_json
from medicalgpt.errors import run_script

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

ROOT = Path(__file__).parent.parent
PROMPTS, GENERATIONS, UPDATES = 4, 4, 4
REWARD = "def reward(response):\n    return -abs(len(response) - 200) / 100\n"


class Clock(TrainerCallback):
    """Notes when updates end."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *_, **__):
        """Note the time."""
        self.ends.append(time.perf_counter())


def prompts() -> list[str]:
    """Return the questions of the first English conversations of one turn."""
    lines = (ROOT / "data/finetune/medical_sft_en.jsonl").read_text(encoding="utf-8").splitlines()
    talks = [json.loads(line)["conversations"] for line in lines]
    return [talk[0]["value"] for talk in talks if len(talk) == 2][: PROMPTS * (UPDATES + 1)]


def ours(work: Path, model: Path, algorithm: str, tokens: int) -> float:
    """Return our samples per second, the mean of the updates after the first."""
    data, reward, output = work / "prompts.jsonl", work / "reward.py", work / f"ours-{algorithm}"
    rows = [{"conversations": [{"from": "human", "value": text}]} for text in prompts()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward.write_text(REWARD, encoding="utf-8")
    flags = {
        "sft_model_path": model, "train_file_dir": data, "reward_function": f"{reward}:reward",
        "output_dir": output, "template_name": "smollm", "algorithm": algorithm,
        "num_generations": GENERATIONS, "num_ppo_epochs": 1, "num_mini_batches": 1,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "max_completion_length": tokens, "max_steps": UPDATES + 1, "do_eval": False, "report_to": "none",
        "save_strategy": "no", "temperature": 1.0, "missing_eos_penalty": 0, "lora_dropout": 0,
        "overwrite_output_dir": True,
    }  # fmt: skip
    command = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, "ppo_training.py", *command], cwd=ROOT, check=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    seconds = [line["update_seconds"] for line in history if "policy_loss" in line][1:]
    return PROMPTS * GENERATIONS * len(seconds) / sum(seconds)


def trls(work: Path, model: Path, tokens: int, *, checkpointing: bool) -> float:
    """Return the samples per second of TRL's RLOOTrainer, the mean of the updates after the first."""

    def reward(completions, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [-abs(len(text) - 200) / 100 for text in texts]

    clock = Clock()
    fast = cpu_has_fast_bfloat16()
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if fast else torch.float32)
    config = RLOOConfig(
        output_dir=str(work / "trl"), use_cpu=not torch.cuda.is_available(), bf16=fast, report_to="none",
        per_device_train_batch_size=4, gradient_accumulation_steps=4, num_generations=GENERATIONS,
        max_completion_length=tokens, max_steps=UPDATES + 1, logging_steps=1, save_strategy="no",
        temperature=1.0, gradient_checkpointing=checkpointing, learning_rate=1e-4,
    )  # fmt: skip
    trainer = RLOOTrainer(
        model=lm,
        reward_funcs=reward,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": t}]} for t in prompts()]),
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    return PROMPTS * GENERATIONS * UPDATES / (clock.ends[-1] - clock.ends[0])


def main(argv: list[str]) -> None:
    """Measure what is not measured yet, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(argv)
    work, model = args.work_dir.resolve(), args.model.resolve()
    work.mkdir(parents=True, exist_ok=True)
    report = work / "report.json"
    known = json.loads(report.read_text()) if report.is_file() else {}
    measures = {
        "TRL RLOOTrainer, as shipped": lambda: trls(work, model, args.tokens, checkpointing=True),
        "TRL RLOOTrainer, no checkpointing": lambda: trls(work, model, args.tokens, checkpointing=False),
        "ours, RLOO": lambda: ours(work, model, "rloo", args.tokens),
        "ours, PPO": lambda: ours(work, model, "ppo", args.tokens),
    }
    for name, measure in measures.items():
        if name not in known:
            known[name] = measure()
            write_json(report, known)
    first = next(iter(known.values()))
    print(
        "\n".join(
            f"{name:<36}{known[name]:>8.2f} samples/s{known[name] / first:>8.2f} ×" for name in measures
        )
    )


if __name__ == "__main__":
    run_script(main)
