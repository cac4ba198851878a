"""The example data as it lies in data/, and the properties it must have; plain json, none of the project's readers."""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, chain
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"
TOPICS = tomllib.loads((DATA / "topics.toml").read_text(encoding="utf-8"))
CHATS = {
    "zh": DATA / "finetune/medical_sft_1K_format.jsonl",
    "en": DATA / "finetune/medical_sft_en.jsonl",
}
CALLS = {lang: DATA / f"finetune/medical_toolcall_{lang}.jsonl" for lang in ("zh", "en")}
PAIRS = {"zh": DATA / "reward/dpo_zh_500.jsonl", "en": DATA / "reward/dpo_en.jsonl"}
TEXTS = {"zh": DATA / "pretrain/medical_zh.jsonl", "en": DATA / "pretrain/medical_en.jsonl"}
PROSE = {"zh": DATA / "pretrain/fever.txt", "en": DATA / "pretrain/en_article_tail500.txt"}
HELD_OUT = {
    (part, lang): DATA / f"heldout/{part}/heldout_{lang}.jsonl"
    for part in ("pretrain", "finetune", "reward")
    for lang in ("zh", "en")
}
FAULTS = (
    "missed red flag",
    "unsafe dose",
    "folk remedy",
    "overconfident",
    "off the question",
    "too short",
    "wrong language",
    "invented drug",
)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def rows(path: Path) -> list[dict]:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(row: dict, speaker: str) -> list[str]:
    """Return what a speaker (human, gpt) says in a conversation, in order."""
    return [turn["value"] for turn in row["conversations"] if turn["from"] == speaker]


def answers(chats: list[dict]) -> list[str]:
    """Return every answer of the conversations."""
    return list(chain.from_iterable(said(row, "gpt") for row in chats))


def length(text: str, language: str) -> int:
    """Return the number of Chinese characters, or of words."""
    return len(CHINESE.findall(text)) if language == "zh" else len(text.split())


def units(text: str, language: str) -> list[str]:
    """Return what is counted: characters in Chinese, words in English."""
    return list("".join(text.split())) if language == "zh" else text.lower().split()


def distinct(texts: list[str], language: str, n: int = 3) -> float:
    """Return the share of different n-grams among all n-grams of the texts (Li et al. 2016)."""
    grams = [tuple(u[i : i + n]) for u in (units(t, language) for t in texts) for i in range(len(u) - n + 1)]
    return len(set(grams)) / len(grams)


def sample(texts: list[str], size: int, seed: str) -> list[str]:
    """Return the texts with the smallest hashes: the same sample on every machine."""
    return sorted(texts, key=lambda text: hashlib.sha256((seed + text).encode()).digest())[:size]


def sentence_counts(texts: list[str], language: str) -> Counter[str]:
    """Return in how many texts each long sentence stands: over 20 characters, or over 12 words."""
    counts: Counter[str] = Counter()
    for text in texts:
        parts = re.split(r"[。！？!?；;\n]|(?<=[a-z0-9)])\.(?=\s|$)", text)
        counts.update(
            {p.strip() for p in parts if (len(p.strip()) > 20 if language == "zh" else len(p.split()) > 12)}
        )
    return counts


def shingles(text: str, n: int) -> set[str]:
    """Return a text's runs of n characters, white space and case aside."""
    plain = "".join(text.lower().split())
    return {plain[i : i + n] for i in range(max(1, len(plain) - n + 1))}


def most_alike(texts: list[str], n: int) -> tuple[float, str, str]:
    """Return the largest Jaccard similarity of two texts, exactly, and the two."""
    sets, best = [shingles(text, n) for text in texts], (0.0, "", "")
    for i, one in enumerate(sets):
        for j in range(i):
            common = len(one & sets[j])
            if (similarity := common / (len(one) + len(sets[j]) - common)) > best[0]:
                best = similarity, texts[j], texts[i]
    return best


def length_tells(pairs: list[dict], measure: Callable[[str], int]) -> dict[str, float]:
    """Return how often a rule that sees only the two lengths of a pair finds the better answer.

    ``longer``: the longer one is taken, ties count half. ``best``: the best of the rules "the longer (or the
    shorter) one if they differ by more than t, else the other way round", with t chosen on these very pairs.
    """
    differences = [measure(p["response_chosen"]) - measure(p["response_rejected"]) for p in pairs]

    def share(limit: int) -> float:
        wins = [0.5 if d == 0 else float((d > 0) == (abs(d) > limit)) for d in differences]
        return sum(wins) / len(wins)

    shares = [share(limit) for limit in sorted({0} | {abs(d) for d in differences})]
    return {"longer": share(0), "best": max(max(shares), 1 - min(shares))}


def lengths_tell(pairs: list[dict], measure: Callable[[str], int]) -> dict[str, float]:
    """Return how often a rule that sees the length of one answer tells whether it is a better or a worse one.

    ``threshold``: the best of "better if longer (shorter) than t"; ``band``: of "better if between s and t" or
    the opposite. Limits are chosen on these very answers.
    """
    balance: Counter[int] = Counter()
    for pair in pairs:
        balance[measure(pair["response_chosen"])] += 1
        balance[measure(pair["response_rejected"])] -= 1
    sums = list(accumulate((balance[size] for size in sorted(balance)), initial=0))
    threshold = max(map(abs, sums))
    band = max(sums) - min(sums)  # better minus worse answers of the best stretch, or the opposite
    return {name: 0.5 + gain / (2 * len(pairs)) for name, gain in (("threshold", threshold), ("band", band))}


def tables() -> list[str]:
    """Return the tables of data/README.md, every figure counted: ``python tests/example_data.py`` prints them."""
    lines = []
    for language in ("zh", "en"):
        for path in (CHATS[language], HELD_OUT["finetune", language]):
            chats = rows(path)
            lengths = sorted(length(text, language) for text in answers(chats))
            several = sum(len(said(row, "human")) > 1 for row in chats)
            system = sum(row["conversations"][0]["from"] == "system" for row in chats)
            lines.append(
                f"| `{path.relative_to(DATA)}` | {len(chats):,} | {several} | {system} | {len(lengths):,} "
                f"| {lengths[len(lengths) // 2]} ({lengths[0]}–{lengths[-1]}) |"
            )
        for path in (PAIRS[language], HELD_OUT["reward", language]):
            pairs = rows(path)
            longer = length_tells(pairs, len)["longer"]
            history, system = (sum(key in row for row in pairs) for key in ("history", "system"))
            lines.append(
                f"| `{path.relative_to(DATA)}` | {len(pairs)} | {history} | {system} | {longer:.0%} |"
            )
        for path in (TEXTS[language], HELD_OUT["pretrain", language]):
            amount = sum(length(row["text"], language) for row in rows(path))
            lines.append(f"| `{path.relative_to(DATA)}` | {len(rows(path))} | {amount:,} |")
        amount = length(PROSE[language].read_text(encoding="utf-8"), language)
        lines.append(f"| `{PROSE[language].relative_to(DATA)}` | 1 | {amount:,} |")
    lines += [f"| `{path.relative_to(DATA)}` | {len(rows(path))} |" for path in CALLS.values()]
    files = [*PAIRS.values(), HELD_OUT["reward", "zh"], HELD_OUT["reward", "en"]]
    for fault in FAULTS:
        counts = [sum(row["fault"] == fault for row in rows(path)) for path in files]
        lines.append(f"| `{fault}` | " + " | ".join(map(str, counts)) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(tables()))
