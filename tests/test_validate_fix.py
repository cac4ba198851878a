"""validate_jsonl.py: what --fix writes and refuses, what is counted, how rows are shown, and in what memory."""

import json
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

from medicalgpt.documents import encode_texts
from medicalgpt.kinds import KINDS
from medicalgpt.near_duplicates import NearDuplicates
from medicalgpt.records import Message, Text, read_records
from medicalgpt.row_log import RowLog
from medicalgpt.tokenization import IGNORE_INDEX, ChatEncoder, ChatFormat
from template import TEMPLATES

import pytest
from test_validate import (
    CHINESE,
    QA,
    ROOT,
    TEXT,
    called,
    line,
    openai,
    pair,
    place,
    share,
    validate,
    write,
)

WIDE = line(text=CHINESE + "𠮷")
QA2 = share("human q", "gpt a", "human q2", "gpt a2")
# fmt: off
MENDS = {  # name: content, what is written, the lines of the rejects and a word of each
    "gbk.jsonl": (line(text=CHINESE).encode("gbk"), line(text=CHINESE), {}),
    "gb18030.jsonl": (TEXT.encode() + WIDE.encode("gb18030"), TEXT + WIDE, {}),
    "gbk.txt": (f"{CHINESE}\r\n\r\n药".encode("gbk"), f"{CHINESE}\n\n药\n", {}),
    "utf-16.jsonl": ((TEXT + WIDE).encode("utf-16"), TEXT + WIDE, {}),
    "utf-16-le.jsonl": ((TEXT * 2).encode("utf-16-le"), TEXT * 2, {}),
    "utf-16-be.txt": ("one\ntwo".encode("utf-16-be"), "one\ntwo\n", {}),
    "utf-32.json": (f"[\n{TEXT}]".encode("utf-32"), TEXT, {}),
    "mark.jsonl": ("\ufeff" + TEXT, TEXT, {}),
    "windows.jsonl": (TEXT.replace("\n", "\r\n\r\n") * 2, TEXT * 2, {}),
    "doubled.jsonl": ('{"text": "a"}{"text": "b"} {"text": "c"}', line(text="a") + line(text="b") + line(text="c"), {}),
    "commas.jsonl": ('{"text": "a"},\n{"text": "b"},\n', line(text="a") + line(text="b"), {}),
    "array.jsonl": ('[{"text": "a"}, {"text": "b"}]', line(text="a") + line(text="b"), {}),
    "lines of an array.jsonl": ('[\n{"text": "a"},\n{"text": "b"}\n]\n', line(text="a") + line(text="b"), {}),
    "array.json": ('[\n{"text": "a"},\n{"text": "b"}', line(text="a") + line(text="b"), {}),
    "lines.json": (TEXT * 2, TEXT * 2, {}),
    "pretty.jsonl": (json.dumps(json.loads(QA), indent=4) + "\n" + json.dumps(json.loads(QA2), indent="\t"), QA + QA2, {}),
    "pretty.json": (json.dumps([json.loads(QA), json.loads(QA2)], indent=2), QA + QA2, {}),
    "user.jsonl": (share("user q", "assistant a"), QA, {}),
    "role.jsonl": (QA * 2 + line(conversations=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]), QA * 3, {}),
    "dialogue.jsonl": (openai("user q", "assistant a") + share("Human q", "bot a", id=7), openai("user q", "assistant a") + share("human q", "gpt a", id=7), {}),
    "prompt of a pair.jsonl": (line(prompt="q", chosen="a", rejected="b"), pair(), {}),
    "same key.jsonl": ('{"text": "a", "id": 1, "text": "a"}', line(text="a", id=1), {}),
    "invisible.jsonl": (share("human\u200b q", "gpt a\u2060\ufeff", tag="\u200b"), share("human q", "gpt a", tag=""), {}),
    "invisible.txt": ("one\u200b\n\ntwo", "one\n\ntwo\n", {}),
    "unanswered.jsonl": (share("human q", "gpt a", "human q2", id=7) + QA, share("human q", "gpt a", id=7) + QA, {}),
    "unanswered openai.jsonl": (line(messages=called()["messages"][:3]) + openai("user q", "assistant a", "user q"), line(messages=called()["messages"][:2]) + openai("user q", "assistant a"), {}),
    "byte.jsonl": (TEXT.encode() + b'{"text": "a\xff"}\n' + TEXT.encode(), TEXT * 2, {2: "cannot be decoded"}),
    "two values.jsonl": (TEXT + '\n{"text": "a", "text": "b"}', TEXT, {3: "twice, with two values"}),
    "constant.jsonl": (TEXT + '{"text": NaN}', TEXT, {2: "NaN"}),
    "cut.jsonl": (TEXT + '{"text": "a', TEXT, {2: "cut off"}),
    "half.jsonl": ('{"text": "a"}{"text": ', TEXT, {1: "cut off"}),
    "surrogate.jsonl": (TEXT + '{"text": "\\ud800"}', TEXT, {2: "surrogate"}),
    "empty.jsonl": (QA + share("human q", "gpt "), QA, {2: "conversations[1].value: is empty"}),
    "roles.jsonl": (share("human q", "gtp a") + QA + share("gpt a", "human q"), QA, {1: "'gtp'", 3: "is due"}),
    "markers.jsonl": (QA + share("human q", "gpt a</s>"), QA, {2: "'</s>'"}),
    "ask.jsonl": (QA + share("human q"), QA, {2: "row_without_answer_dropped"}),
    "kinds.jsonl": (QA * 2 + TEXT, QA * 2, {3: "conversations: missing"}),
    "nul.txt": ("one\nt\0o\n</s>\nfour", "one\nfour\n", {2: "NUL", 3: "marker"}),
}
# fmt: on


def rejects(target: Path) -> list[dict]:
    path = target.with_name(target.name + ".rejects.jsonl")
    return [json.loads(one) for one in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("name", MENDS)
def test_what_is_certain_is_mended_and_the_rest_stands_in_the_rejects(tmp_path, name):
    content, expected, refused = MENDS[name]
    path = write(tmp_path, content, name)
    before, target = path.read_bytes(), tmp_path / f"out{path.suffix.replace('json', 'jsonl')[:6]}"
    code, message = validate(path, "--fix", target)
    assert target.read_text(encoding="utf-8") == expected
    found = {int(one["origin"].rpartition(":")[2]): one["reason"] for one in rejects(target)}
    assert list(found) == list(refused)
    assert all(
        word in found[number] and place(path, found[number]) == str(number)
        for number, word in refused.items()
    )
    dropped = [reason for reason in found.values() if "the stages drop this row" in reason]
    assert code == (3 if len(refused) > len(dropped) else 0)
    assert code == 0 or message.startswith(f"{len(refused)} rows cannot be mended")
    assert validate(target) == (0, "")
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "content", ['{"text": ""}', "hello", "<html>", "PAR1", '{"foo": 1}', '[{"text": 5}]']
)
def test_nothing_is_written_where_nothing_can_be_mended(tmp_path, content):
    path = write(tmp_path, content, "a.jsonl")
    code, message = validate(path, "--fix", tmp_path / "b.jsonl")
    assert (code, place(path, message)) == (3, "1")
    assert "nothing was written" in message
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_mended_file_by_file(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write(tmp_path / "in", "\ufeff" + TEXT, "a.jsonl")
    write(tmp_path / "in" / "deep", f"[{TEXT}]", "b.json")
    write(tmp_path / "in", "one\r\n", "c.txt")
    assert validate(tmp_path / "in", "--fix", tmp_path / "out") == (0, "")
    written = {
        str(one.relative_to(tmp_path / "out")): one.read_bytes() for one in (tmp_path / "out").rglob("*.*")
    }
    assert written == {"a.jsonl": TEXT.encode(), "deep/b.jsonl": TEXT.encode(), "c.txt": b"one\n"}


def test_what_exists_is_replaced_only_on_request_and_the_input_never(tmp_path):
    path, other = write(tmp_path, "\ufeff" + TEXT, "a.jsonl"), write(tmp_path, "mine", "b.jsonl")
    for flag in ("--fix", "--report"):
        code, message = validate(path, flag, other)
        assert (code, message.split(";")[0]) == (2, f"{flag} {other} exists already")
    assert other.read_text() == "mine"
    assert validate(path, "--fix", other, "--overwrite", "True") == (0, "")
    assert other.read_text() == TEXT
    code, message = validate(path, "--fix", path, "--overwrite")
    assert (code, "is the input itself" in message) == (2, True)
    assert validate(path, "--fix", tmp_path / "c.json")[0] == 2
    assert path.read_text() == "\ufeff" + TEXT


# ---- what is told ------------------------------------------------------------------------------------------


def report(path: Path, *flags: object) -> dict:
    target = path.with_suffix(".report")
    validate(path, "--report", target, *flags)
    return json.loads(target.read_text())


def test_twenty_problems_are_told_whole_and_all_are_counted_by_kind(tmp_path, capsys):
    rows = ['{"text": 5}'] * 25 + ['{"text": null}'] * 15 + ['{"text": "</s>"}'] * 4 + ["{"]
    path = write(tmp_path, TEXT + "\n".join(rows), "a.jsonl")
    code, message = validate(path)
    assert code == 3
    assert message == f"{path}:2: text: is a number; expected a string (the first of 45 problems)"
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:21] == [f"{path}:{n}: text: is a number; expected a string" for n in range(2, 22)]
    assert lines[21:26] == [
        "… 25 more; all 45 by kind:",
        "       25  text: is a number",
        "       15  text: is null",
        "        4  text: holds the marker …, which belongs to chat formats and not to text",
        "        1  a JSON value that runs over several lines",
    ]
    assert lines[26] == "text: rows=1 with_tools=0"


def test_lengths_of_texts_are_counted_in_characters(tmp_path):
    """Lengths 1 to 20: the lower middle is 10, and 95 % of the 19 steps from the first to the last are 18."""
    lengths = random.Random(0).sample(range(1, 21), 20)
    path = write(tmp_path, "".join(line(text="药" * length) for length in lengths), "a.jsonl")
    assert report(path)["statistics"]["text"] == {
        "rows": 20, "with_tools": 0, "exact_duplicates": 0, "first_exact_duplicates": [],
        "characters": {"min": 1, "median": 10, "p95": 19, "max": 20, "total": 210},
    }  # fmt: skip


def test_questions_and_answers_are_counted_apart(tmp_path):
    rows = share("system ss", "human q", "gpt aaa") + share("human q", "gpt a", "human qq", "gpt a")
    found = report(write(tmp_path, rows + line(**called(), tools=[{"name": "f"}]), "a.jsonl"))["statistics"][
        "chat"
    ]
    assert (found["rows"], found["with_tools"]) == (3, 1)
    assert found["questions"] == {"min": 1, "median": 1, "p95": 1, "max": 2, "total": 4}
    assert found["prompt_characters"] == {"min": 2, "median": 3, "p95": 3, "max": 3, "total": 8}
    assert found["answer_characters"] == {"min": 1, "median": 2, "p95": 2, "max": 3, "total": 6}
    rows = pair(history=[["q", "aa"]], response_chosen="ccc") + pair(system="s", response_rejected="dddd")
    found = report(write(tmp_path, rows, "b.jsonl"))["statistics"]["pair"]
    totals = {name: value["total"] for name, value in found.items() if isinstance(value, dict)}
    assert totals == {
        "questions": 3,
        "prompt_characters": 6,
        "chosen_characters": 4,
        "rejected_characters": 5,
    }


def test_exact_duplicates_are_told_with_the_row_that_they_repeat(tmp_path, capsys):
    a, b = share("human q", "gpt a"), share("human q", "gpt b")
    path = write(tmp_path, a + b + openai("user q", "assistant a", id=7) + "\n" + b, "a.jsonl")
    assert validate(path) == (0, "")
    assert (
        f"exact_duplicates    2\n{'':22}{path}:3 = {path}:1, {path}:5 = {path}:2\n" in capsys.readouterr().out
    )


def test_near_duplicates_are_those_of_a_count_of_common_runs_of_five_characters(tmp_path):
    """The similarity is estimated from 64 hashes, so within 0.2 of the truth both answers are right."""
    generator = random.Random(0)
    texts = []
    for _ in range(40):
        text = generator.choices("abcdefgh 发热药", k=150)
        for _ in range(generator.randint(1, 4)):
            texts.append("".join(text))
            for _ in range(generator.choice([1, 2, 20, 60])):
                text[generator.randrange(150)] = generator.choice("ABCDEFGH 发热药")
    near, kept, sure, wrong = NearDuplicates(0.7), [], 0, 0
    for text in texts:
        joined = "".join(text.lower().split())
        shingles = {joined[i : i + 5] for i in range(len(joined) - 4)}
        truth = max((len(shingles & one) / len(shingles | one) for one in kept), default=0.0)
        before = near.num_found
        near.add(text, "a:1")
        found = near.num_found > before
        sure += abs(truth - 0.7) > 0.2
        wrong += abs(truth - 0.7) > 0.2 and found != (truth > 0.7)
        if not found:
            kept.append(shingles)
    assert (wrong, near.num_found > 15, sure > 60) == (0, True, True)
    path = write(
        tmp_path,
        line(text=LONG * 2 + "a") + line(text="b" + LONG.upper() * 2) + line(text="x" * 9),
        "a.jsonl",
    )
    found = report(path, "--near_duplicates", 0.7)["statistics"]["text"]
    assert (found["near_duplicates"], found["first_near_duplicates"][0][:2]) == (
        1,
        [f"{path}:2", f"{path}:1"],
    )


def test_rows_and_prompts_that_two_files_share_are_counted(tmp_path, capsys):
    one = write(tmp_path, "".join(share(f"human q{n}", f"gpt a{n}") for n in range(4)), "a.jsonl")
    two = write(
        tmp_path, openai("user q2", "assistant a2") + share("human q3", "gpt x") + TEXT.strip(), "b.jsonl"
    )
    assert validate(one, "--against", one) == (0, "")
    assert f"overlap with {one}: rows=4 prompts=4 (first {one}:1)\n" in capsys.readouterr().out
    code, message = validate(one, "--against", two)
    assert (code, place(two, message)) == (3, "3")
    assert f"overlap with {two}: rows=1 prompts=2 (first {one}:3)\n" in capsys.readouterr().out


def test_a_bad_file_ends_with_one_line_and_code_3_and_no_model_library_is_loaded(tmp_path):
    path = write(tmp_path, TEXT + "{", "a.jsonl")
    command = [sys.executable, "-X", "importtime", str(ROOT / "validate_jsonl.py"), "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = [one for one in done.stderr.splitlines() if not one.startswith("import time:")]
    assert (done.returncode, len(said)) == (3, 1)
    assert said[0].startswith(f"error: {path}:2: ")
    assert "medicalgpt.records" in done.stderr
    assert not re.search(r"\|\s+(torch|transformers|tokenizers)$", done.stderr, re.MULTILINE)


# ---- tokens ------------------------------------------------------------------------------------------------

LONG = "What should I do? See a doctor. 多喝水 😀"
CHATS = share("system s", f"human {LONG}", f"gpt {LONG}") + share(
    f"human {LONG}", "gpt Rest.", "human q", f"gpt {LONG} {LONG}"
)


def chat_encoder(tokenizer, name: str) -> ChatEncoder:
    return ChatEncoder(tokenizer, ChatFormat.of(TEMPLATES[name], tokenizer), max_length=10_000)


@pytest.mark.parametrize("name", ["qwen", "vicuna", "llama2", "mistral", "smollm", "alpaca"])
def test_lengths_in_tokens_and_shown_rows_are_the_stages_own(tmp_path, capsys, model_dir, tokenizer, name):
    path = write(tmp_path, CHATS, "a.jsonl")
    examples = chat_encoder(tokenizer, name).encode_chats(
        read_records([path], KINDS["chat"].parse, RowLog()), RowLog()
    )
    short, long = sorted(len(example["input_ids"]) for example in examples)
    flags = ["--tokenizer", model_dir, "--template_name", name, "--max_length", long - 4]
    found = report(path, *flags, "--show", 5)
    assert found["statistics"]["chat"]["tokens"] == {
        "min": short, "median": short, "p95": short, "max": long, "total": short + long,
    }  # fmt: skip
    assert (found["rows_too_long"], sum(found["cut_by_max_length"].values())) == (1, 1)
    capsys.readouterr()
    assert validate(path, *flags[:4], "--show", 2) == (0, "")
    legend, *shown = capsys.readouterr().out.partition("⟦trained⟧")[2].split(f"--- {path}:")
    assert legend == " masked ‹control token› ⟦‹trained control token›⟧\n"
    for number, (text, example) in enumerate(zip(shown, examples, strict=True), 1):
        body = text.removeprefix(f"{number}\n").removesuffix("\n")
        assert re.sub("[⟦⟧‹›]", "", body) == tokenizer.decode(example["input_ids"].tolist())
        trained = [token for token in example["labels"].tolist() if token != IGNORE_INDEX]
        assert re.sub("[‹›]", "", "".join(re.findall("⟦(.*?)⟧", body, re.DOTALL))) == tokenizer.decode(
            trained
        )
        assert set(re.findall("‹(.*?)›", body)) <= {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
        assert "‹<|im_end|>›⟧" in body


def test_texts_and_pairs_are_measured_and_shown_as_their_stages_encode_them(
    tmp_path, capsys, model_dir, tokenizer
):
    path = write(tmp_path, line(text=LONG) + line(text="a"), "a.jsonl")
    [ids, short] = encode_texts([Text(LONG, "a:1"), Text("a", "a:2")], tokenizer)
    found = report(path, "--tokenizer", model_dir, "--max_length", len(ids) - 1)
    assert (found["statistics"]["text"]["tokens"]["total"], found["rows_too_long"]) == (
        len(ids) + len(short),
        1,
    )
    capsys.readouterr()
    assert validate(path, "--tokenizer", model_dir, "--show", 1) == (0, "")
    assert capsys.readouterr().out.endswith(f"--- {path}:1\n⟦{LONG}‹<|im_end|>›⟧\n")
    path = write(tmp_path, pair(response_chosen=LONG), "b.jsonl")
    turns = chat_encoder(tokenizer, "qwen").encode_turns(
        [[Message("user", "q"), Message("assistant", LONG)]], [()]
    )
    flags = ["--tokenizer", model_dir, "--template_name", "qwen"]
    assert report(path, *flags)["statistics"]["pair"]["tokens"]["max"] == sum(
        len(turn.ids) for turn in next(iter(turns))
    )
    capsys.readouterr()
    assert validate(path, *flags, "--show", 1) == (0, "")
    chosen, rejected = re.findall(
        r"^(?:chosen|rejected): (?s:.*?)⟦(.*?)⟧", capsys.readouterr().out, re.MULTILINE
    )
    assert (chosen, rejected) == (f"{LONG}‹<|im_end|>›", "b‹<|im_end|>›")


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_large_file_is_read_in_little_memory_and_its_last_line_is_named(tmp_path, suffix):
    """20 MB in 20,000 rows; what stays of a row is 28 bytes, and of the file no more than a few chunks."""
    row, end = json.dumps({"text": "x" * 984}), ",\n" if suffix == ".json" else "\n"
    text = end.join([row] * 20_000) + end + '{"text": 5}'
    path = write(tmp_path, f"[\n{text}\n]" if suffix == ".json" else text, f"a{suffix}")
    assert path.stat().st_size > 19_900_000
    tracemalloc.start()
    try:
        code, message = validate(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (code, place(path, message)) == (3, "20002" if suffix == ".json" else "20001")
    assert peak < 8_000_000
