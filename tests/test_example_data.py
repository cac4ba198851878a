"""What data/ promises: amounts, lengths, spread, no templates, faults that length does not betray, nothing held out leaks."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from example_data import (
    CALLS,
    CHATS,
    DATA,
    FAULTS,
    HELD_OUT,
    PAIRS,
    PROSE,
    TEXTS,
    TOPICS,
    answers,
    distinct,
    length,
    length_tells,
    lengths_tell,
    most_alike,
    rows,
    said,
    sample,
    sentence_counts,
    tables,
)

LANGUAGES = ("zh", "en")
TRAINING = [*CHATS.values(), *CALLS.values(), *PAIRS.values(), *TEXTS.values(), *PROSE.values()]
LONG_ENOUGH = {"zh": 150, "en": 80}  # characters, words


@pytest.mark.parametrize(
    ("path", "least", "most"),
    [
        (CHATS["zh"], 1000, 1000),
        (CHATS["en"], 600, 1200),
        (PAIRS["zh"], 500, 500),
        (PAIRS["en"], 300, 400),
        (CALLS["zh"], 40, 60),
        (CALLS["en"], 40, 60),
        (HELD_OUT["finetune", "zh"], 95, 120),
        (HELD_OUT["finetune", "en"], 60, 120),
        (HELD_OUT["reward", "zh"], 50, 60),
        (HELD_OUT["reward", "en"], 30, 40),
        (HELD_OUT["pretrain", "zh"], 12, 30),
        (HELD_OUT["pretrain", "en"], 12, 30),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_number_of_rows(path, least, most):
    assert least <= len(rows(path)) <= most


def test_amount_of_text_to_read():
    assert {name: path.stat().st_size >= 200_000 for name, path in PROSE.items()} == {"zh": True, "en": True}
    assert sum(len(rows(path)) for path in TEXTS.values()) >= 120


@pytest.mark.parametrize("language", LANGUAGES)
def test_conversations(language):
    chats = rows(CHATS[language])
    lengths = sorted(length(text, language) for text in answers(chats))
    assert lengths[len(lengths) // 2] >= LONG_ENOUGH[language]
    assert min(len(text) for text in answers(chats)) >= 15
    assert sum(len(said(row, "human")) > 1 for row in chats) >= len(chats) / 3


@pytest.mark.parametrize("language", CALLS)
def test_tool_calls(language):
    chats = rows(CALLS[language])
    assert all(json.loads(row["tools"]) for row in chats)
    assert all({"function_call", "observation"} <= {t["from"] for t in row["conversations"]} for row in chats)
    called = Counter(json.loads(text)["name"] for row in chats for text in said(row, "function_call"))
    assert len(called) >= 8 and max(called.values()) < len(chats) / 3


@pytest.mark.parametrize(
    "path", [*PAIRS.values(), HELD_OUT["reward", "zh"], HELD_OUT["reward", "en"]], ids=lambda p: p.stem
)
def test_length_does_not_tell_the_better_answer(path):
    language = "zh" if "zh" in path.stem else "en"
    for measure in (len, lambda text: length(text, language), lambda text: len(text.encode())):
        told = length_tells(rows(path), measure)
        assert 0.45 <= told["longer"] <= 0.6, told


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_answers_length_alone_does_not_tell_it_either(language):
    """Without the two faults that are about length or language, which no length can hide."""
    pairs = [row for row in rows(PAIRS[language]) if row["fault"] not in ("too short", "wrong language")]
    told = lengths_tell(pairs, len)
    assert told["threshold"] <= 0.6 and told["band"] <= 0.65, told


@pytest.mark.parametrize("language", LANGUAGES)
def test_pairs(language):
    pairs = rows(PAIRS[language])
    faults = Counter(row["fault"] for row in pairs)
    assert set(faults) == set(FAULTS) and min(faults.values()) >= len(pairs) * 0.04
    assert sum("system" in row for row in pairs) >= len(pairs) * 0.05
    assert sum("history" in row for row in pairs) >= len(pairs) * 0.05
    lengths = sorted(length(row["response_chosen"], language) for row in pairs)
    assert lengths[len(lengths) // 2] >= LONG_ENOUGH[language] - (30 if language == "zh" else 0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_does_not_read_as_filled_templates(language):
    texts = answers(rows(CHATS[language])) + [row["response_chosen"] for row in rows(PAIRS[language])]
    worst = sentence_counts(texts, language).most_common(1)
    assert not worst or worst[0][1] <= len(texts) * 0.02, worst
    for seed in "abc":
        assert distinct(sample(texts, 200, seed), language) >= 0.45
    openings = Counter(text[: 6 if language == "zh" else 16] for text in texts)
    assert openings.most_common(1)[0][1] <= len(texts) * 0.02, openings.most_common(3)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("language", LANGUAGES)
def test_no_question_is_nearly_another(language, size):
    chats = rows(CHATS[language]) + rows(CALLS[language]) + rows(HELD_OUT["finetune", language])
    pairs = rows(PAIRS[language]) + rows(HELD_OUT["reward", language])
    similarity, one, other = most_alike(
        [said(r, "human")[0] for r in chats] + [r["question"] for r in pairs], size
    )
    assert similarity <= 0.7, (one, other)


def test_spread_over_topics():
    counts = Counter(row["topic"] for path in TRAINING if path.suffix == ".jsonl" for row in rows(path))
    assert set(counts) <= set(TOPICS), set(counts) - set(TOPICS)
    used = Counter(TOPICS[topic]["kind"] for topic in counts)
    assert used["condition"] >= 120 and used["drug"] >= 40 and used["everyday"] >= 20, used
    for path in (*CHATS.values(), *PAIRS.values()):
        share = Counter(row["topic"] for row in rows(path)).most_common(1)[0]
        assert share[1] <= len(rows(path)) * 0.03, share


def test_held_out_diseases_do_not_occur_in_training():
    held = {name: topic for name, topic in TOPICS.items() if topic.get("held_out")}
    assert len(held) >= 25
    for path in HELD_OUT.values():
        assert {row["topic"] for row in rows(path)} <= set(held)
    for path in TRAINING:
        text = path.read_text(encoding="utf-8").lower()
        found = {word for topic in held.values() for word in topic["words"] if word in text}
        assert not found, f"{path.relative_to(DATA)}: {found}"
        if path.suffix == ".jsonl":
            assert not {row["topic"] for row in rows(path)} & set(held)


def test_the_validator_finds_nothing_to_complain_about():
    done = subprocess.run(
        [sys.executable, "validate_jsonl.py", "--file", "data", "--near_duplicates", "0.7"],
        cwd=DATA.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "warning" not in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readme_has_the_figures(name):
    text = (DATA / name).read_text(encoding="utf-8").splitlines()
    missing = [line for line in tables() if line not in text]
    assert not missing, "\n".join(missing)
