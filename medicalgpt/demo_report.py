"""What the demo's stages have learned: a table on held-out rows, and the same questions before and after.

python -m medicalgpt.demo_report --models base=DIR PT=DIR SFT=DIR DPO=DIR --report demo/report.json
"""

import argparse
import json
import math
import textwrap
from pathlib import Path

from medicalgpt.arguments import cpu_has_fast_bfloat16
from medicalgpt.attention import FLAT_ATTENTION
from medicalgpt.chat_template import resolve_template
from medicalgpt.checkpoint import fingerprint, write_json
from medicalgpt.collator import FlatCollator, PairCollator, on_device
from medicalgpt.documents import encode_texts, pack_documents
from medicalgpt.engine import FlatLM
from medicalgpt.errors import run_script
from medicalgpt.generation import Generator
from medicalgpt.model_files import load_tokenizer, resolve_model_dir
from medicalgpt.modeling import load_model
from medicalgpt.probe import choose_rows
from medicalgpt.records import Message, parse_chat, parse_pair, parse_text, read_records
from medicalgpt.row_log import RowLog
from medicalgpt.run_record import recorded_template
from medicalgpt.tokenization import ChatEncoder, ChatFormat

import torch
from tqdm import tqdm

MAX_LENGTH = 1024  # tokens
BATCH = 4
QUESTIONS = {
    "en": (
        "My three-year-old has had a fever since this morning. What should I do?",
        "Can I stop my blood pressure tablets now that the readings are normal?",
        "My father's face droops on one side and his speech is slurred. What is this?",
    ),
    "zh": (
        "三岁的孩子从早上开始发烧,我该怎么办?",
        "血压已经正常了,可以停药吗?",
        "父亲突然口角歪斜、说话含糊,这是怎么回事?",
    ),
}
COLUMNS = {
    "text_perplexity": "text perplexity",
    "answer_perplexity": "answer perplexity",
    "pair_accuracy": "better answer preferred",
    "pair_margin": "margin, nats per token",
}


@torch.no_grad()
def mean_logps(model: FlatLM, collator: FlatCollator | PairCollator, examples: list[dict]) -> torch.Tensor:
    """Return per sequence the mean log-probability of its tokens and how many they are, (S, 2)."""
    rows = []
    for begin in range(0, len(examples), BATCH):
        batch = on_device(collator(examples[begin : begin + BATCH]), model.lm.device)
        logps, index = model(**batch), batch["sequence_index"]
        counts = index.bincount(minlength=batch["num_sequences"])
        sums = torch.zeros(batch["num_sequences"], device=logps.device).index_add(0, index, logps)
        rows.append(torch.stack([sums / counts.clamp(min=1), counts], dim=1).cpu())
    return torch.cat(rows)


def perplexity(rows: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood over all tokens of rows (S, 2) of (mean, tokens)."""
    return math.exp(-(rows[:, 0] * rows[:, 1]).sum().item() / rows[:, 1].sum().item())


class Yardstick:
    """A model, and what it makes of texts, answers and pairs that it may not have seen."""

    def __init__(self, directory: Path):
        self.tokenizer = load_tokenizer(directory)
        dtype = torch.bfloat16 if torch.cuda.is_available() or cpu_has_fast_bfloat16() else torch.float32
        lm = load_model(directory, dtype, attention=FLAT_ATTENTION)
        lm.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
        self.model = FlatLM(lm).eval()
        choose_rows(self.model)
        template = resolve_template(self.tokenizer, None, recorded=recorded_template(directory))
        self.encoder = ChatEncoder(
            self.tokenizer, ChatFormat.of(template, self.tokenizer), max_length=MAX_LENGTH
        )

    def text_perplexity(self, file: Path) -> float:
        """Return the perplexity of a file's texts, each read on its own."""
        texts = encode_texts(read_records([file], parse_text, RowLog()), self.tokenizer)
        return perplexity(self.mean_logps(pack_documents(texts, MAX_LENGTH)))

    def answer_perplexity(self, file: Path) -> float:
        """Return the perplexity of the answers of a file's conversations, given what was said before."""
        return perplexity(
            self.mean_logps(self.encoder.encode_chats(read_records([file], parse_chat, RowLog()), RowLog()))
        )

    def pairs(self, file: Path) -> dict[str, float]:
        """Return how often, and by how many nats per token, the better answer is likelier."""
        pairs = self.encoder.encode_pairs(read_records([file], parse_pair, RowLog()), RowLog())
        sides = mean_logps(self.model, PairCollator(padded=self.model.padded), pairs)[:, 0].view(-1, 2)
        return {
            "pair_accuracy": (sides[:, 0] > sides[:, 1]).float().mean().item(),
            "pair_margin": (sides[:, 0] - sides[:, 1]).mean().item(),
        }

    def mean_logps(self, examples: list[dict]) -> torch.Tensor:
        """Return per sequence the mean log-probability of its trained tokens and their number, (S, 2)."""
        return mean_logps(self.model, FlatCollator(padded=self.model.padded), examples)


def measure(directory: Path, language: str, held_out: Path) -> dict[str, float]:
    """Return a model's figures on the held-out rows."""
    yardstick = Yardstick(directory)
    texts, chats, pairs = (
        held_out / part / f"heldout_{language}.jsonl" for part in ("pretrain", "finetune", "reward")
    )
    return {
        "text_perplexity": yardstick.text_perplexity(texts),
        "answer_perplexity": yardstick.answer_perplexity(chats),
        **yardstick.pairs(pairs),
    }


def answers(directory: Path, questions: tuple[str, ...]) -> list[str]:
    """Return a model's greedy answers."""
    tokenizer = load_tokenizer(directory)
    chat_format = ChatFormat.of(
        resolve_template(tokenizer, None, recorded=recorded_template(directory)), tokenizer
    )
    model = load_model(directory, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    settings = {"do_sample": False, "repetition_penalty": 1.15, "max_new_tokens": 120}
    generator = Generator(
        model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, chat_format, settings
    )
    encoder = ChatEncoder(tokenizer, chat_format, max_length=MAX_LENGTH)
    prompts = [encoder.encode_prompt([Message("user", question)])[0] for question in questions]
    return [answer.text for answer in generator.answer([ids for ids in prompts if ids])]


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return the figures as lines of text, a model a line."""
    lines = ["model  " + "  ".join(f"{title:>24}" for title in COLUMNS.values())]
    for name, row in figures.items():
        cells = [
            f"{row[key] * 100:>22.1f} %" if key == "pair_accuracy" else f"{row[key]:>24.3f}"
            for key in COLUMNS
        ]
        lines.append(f"{name:<7}" + "  ".join(cells))
    return "\n".join(lines)


def say_dpo(found: dict[str, float]) -> str:
    """Return what DPO has learned, against its reference."""
    return (
        "\nDPO against its reference, the SFT model: the better answer gains more in "
        f"{found['eval_accuracy']:.1%} of the pairs, reward margin {found['eval_margin']:.3f} (before: no "
        "preference, 0)"
    )


def say_rm(found: dict[str, float]) -> str:
    """Return what the reward model has learned."""
    shares = [
        f"{found[f'eval_accuracy_{name}']:.1%} where {what}"
        for name, what in (
            ("chosen_longer", "the better one is longer"),
            ("rejected_longer", "the worse one is longer"),
            ("alike", "both are of like length"),
        )
        if f"eval_accuracy_{name}" in found
    ]
    return (
        f"\nReward model: the better answer has the higher score in {found['eval_accuracy']:.1%} of the "
        f"pairs ({', '.join(shares)})"
    )


def say_ppo(found: dict[str, float]) -> str:
    """Return what PPO has learned, against its reference."""
    before, spread = found["eval_score_before"], found["eval_score_std_before"]
    return (
        f"\nPPO, answers to held-out prompts: mean score {before:.2f} → {found['eval_score']:.2f} (spread "
        f"before {spread:.2f}), {found['eval_kl']:.1f} nats per answer from the SFT model, ended by "
        f"themselves {found['eval_ended_before']:.0%} → {found['eval_ended']:.0%}, tokens "
        f"{found['eval_response_length_before']:.0f} → {found['eval_response_length']:.0f}"
    )


RESULTS = {"dpo": say_dpo, "rm": say_rm, "ppo": say_ppo}


def side_by_side(question: str, before: str, after: str, width: int = 58) -> str:
    """Return a question and two answers in two columns."""
    columns = [[line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
               for text in (before, after)]  # fmt: skip
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return f"\nQ: {question}\n{'base':<{width}} │ final\n" + "\n".join(f"{a:<{width}} │ {b}" for a, b in rows)


def main(argv: list[str]) -> None:
    """Measure what is new, print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--language", choices=QUESTIONS, default="en")
    parser.add_argument("--held_out", type=Path, default=Path("data/heldout"))
    for stage in RESULTS:
        parser.add_argument(f"--{stage}_results", type=Path, help=f"eval_results.json of the {stage} run")
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args(argv)
    models = {
        name: resolve_model_dir(path, "--models") for name, _, path in (m.partition("=") for m in args.models)
    }
    known = json.loads(args.report.read_text(encoding="utf-8")) if args.report.is_file() else {}
    keys = {name: f"{fingerprint(path)} {args.language}" for name, path in models.items()}
    for name, path in tqdm(models.items(), desc="measuring", unit="model"):
        if keys[name] not in known:
            known[keys[name]] = measure(path, args.language, args.held_out)
    questions, ends = QUESTIONS[args.language], (next(iter(models)), list(models)[-1])
    for name in ends:
        if "answers" not in known[keys[name]]:
            known[keys[name]]["answers"] = answers(models[name], questions)
    write_json(args.report, known)
    show(args, {name: known[key] for name, key in keys.items()})


def show(args: argparse.Namespace, figures: dict[str, dict]) -> None:
    """Print the table and the answers."""
    said = []
    for stage, say in RESULTS.items():
        if file := vars(args)[f"{stage}_results"]:
            said.append(say(json.loads(file.read_text(encoding="utf-8"))))
    before, after = (list(figures.values())[i]["answers"] for i in (0, -1))
    lines = [
        f"\nHeld-out rows ({args.held_out}), none of whose diseases occurs in training:\n",
        table(figures),
        *said,
        *(side_by_side(*row) for row in zip(QUESTIONS[args.language], before, after, strict=True)),
    ]
    print("\n".join(lines))  # noqa: T201  (the tool's product)


if __name__ == "__main__":
    run_script(main)
