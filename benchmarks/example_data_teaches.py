"""Does the example data teach? Perplexity of the demo model on answers that nobody of this project wrote.

    python -m benchmarks.example_data_teaches --answers medquad.jsonl --work_dir /tmp/teaches

``--answers`` is a file of conversations (ShareGPT form), for example MedQuAD. On ``--rows`` of them,
chosen by a hash, it prints two perplexities, each beside the base model's: of the answers given their
questions (after SFT on the English conversations, and after SFT on the same ones with the answers dealt
out to other questions) and of the answers read as plain text (after PT on the English texts). Finished
parts are kept in ``--work_dir``.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

from medicalgpt.demo_report import Yardstick
from medicalgpt.errors import run_script

ROOT = Path(__file__).parent.parent


def read(path: Path) -> list[dict]:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows as .jsonl, return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def deal_out_answers(rows: list[dict]) -> list[dict]:
    """Return the conversations with every answer moved into another conversation."""
    rows = random.Random(0).sample(rows, len(rows))
    answers = [turn["value"] for row in rows for turn in row["conversations"] if turn["from"] == "gpt"]
    # by more than a conversation holds, so that none stays in its own
    shift = max(len(row["conversations"]) for row in rows)
    dealt = iter(answers[shift:] + answers[:shift])
    return [
        row
        | {
            "conversations": [
                turn | {"value": next(dealt)} if turn["from"] == "gpt" else turn
                for turn in row["conversations"]
            ]
        }
        for row in rows
    ]


def train(script: str, model: Path, data: Path, output: Path, *flags: str) -> Path:
    """Train an adapter with a stage, merge it, return the merged model's directory."""
    merged = output.with_name(output.name + "-merged")
    if not merged.is_dir():
        common = (
            "--do_train --num_train_epochs 1 --per_device_train_batch_size 8 "
            "--gradient_accumulation_steps 4 --seed 42 --bf16 --eval_strategy no --report_to none "
            "--logging_steps 20"
        )
        run = [script, "--model_name_or_path", model, "--train_file_dir", data, "--output_dir", output]
        python(*run, *common.split(), *flags)
        python("merge_peft_adapter.py", "--base_model", model, "--lora_model", output, "--output_dir", merged)
    return merged


def python(*command: object) -> None:
    """Run one of the project's scripts."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def main(argv: list[str]) -> None:
    """Train what is missing, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--template_name", default="smollm")
    parser.add_argument("--rows", type=int, default=500)
    args = parser.parse_args(argv)
    work, model = args.work_dir.resolve(), args.model.resolve()
    chosen = sorted(read(args.answers), key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())[
        : args.rows
    ]
    chats = write(work / "eval/chats.jsonl", chosen)
    texts = write(work / "eval/texts.jsonl", [{"text": row["conversations"][-1]["value"]} for row in chosen])
    conversations = read(ROOT / "data/finetune/medical_sft_en.jsonl")
    sft = write(work / "sft/data.jsonl", conversations)
    control = write(work / "control/data.jsonl", deal_out_answers(conversations))
    pt = work / "pt-data"
    pt.mkdir(exist_ok=True)
    for name in ("medical_en.jsonl", "en_article_tail500.txt"):
        (pt / name).write_bytes((ROOT / "data/pretrain" / name).read_bytes())
    chat_flags = ("--template_name", args.template_name, "--model_max_length", "1024")
    sft_script, pt_script = "supervised_finetuning.py", "pretraining.py"
    models = {
        "base": model,
        "SFT": train(sft_script, model, sft.parent, work / "sft-out", *chat_flags),
        "SFT, answers dealt out": train(sft_script, model, control.parent, work / "control-out", *chat_flags),
        "PT": train(pt_script, model, pt, work / "pt-out", "--block_size", "512"),
    }
    lines = [f"{'model':<24}{'answers given questions':>26}{'answers as plain text':>26}"]
    first: list[float] = []
    for name, directory in models.items():
        yardstick = Yardstick(directory)
        figures = [yardstick.answer_perplexity(chats), yardstick.text_perplexity(texts)]
        first = first or figures
        cells = [f"{value:.2f} ({value / base - 1:+.1%})" for value, base in zip(figures, first, strict=True)]
        lines.append(f"{name:<24}{cells[0]:>26}{cells[1]:>26}")
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
