"""validate_jsonl.py says of every file what the stages say; what it mends validates; what it counts is so."""

import gzip
import json
import random
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import validate_jsonl
from medicalgpt import data_files
from medicalgpt.data_files import ArrayReader, read_text_lines
from medicalgpt.documents import encode_texts
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.kinds import KINDS, SilentLog
from medicalgpt.near_duplicates import NearDuplicates
from medicalgpt.records import Chat, Message, Text, iterate_records, read_records
from medicalgpt.row_log import RowLog
from medicalgpt.tokenization import IGNORE_INDEX, ChatEncoder, ChatFormat
from template import TEMPLATES

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = '{"text": "a"}\n'


def line(**fields) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def share(*turns: str, **more) -> str:
    """ "human q", "gpt a" → a ShareGPT line."""
    pairs = [turn.split(" ", 1) for turn in turns]
    return line(conversations=[{"from": role, "value": value} for role, value in pairs], **more)


def openai(*turns: str, **more) -> str:
    """ "user q", "assistant a" → an OpenAI line."""
    pairs = [turn.split(" ", 1) for turn in turns]
    return line(messages=[{"role": role, "content": content} for role, content in pairs], **more)


def pair(**more) -> str:
    return line(**{"question": "q", "response_chosen": "a", "response_rejected": "b"} | more)


def called(**more) -> dict:
    """An OpenAI row with a call, its result and an answer; `more` goes to the calling turn."""
    turn = {"role": "assistant", "content": None,
            "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip
    result = {"role": "tool", "content": "r", "tool_call_id": "c1"}
    first, last = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    return {"messages": [first, turn | more, result, last]}


def validate(path: Path, *flags: object) -> tuple[int, str]:
    """Return (exit code, the refusal) of the tool."""
    try:
        validate_jsonl.main(["--file", str(path), *map(str, flags)])
    except (DataError, ConfigError) as error:
        return error.exit_code, str(error)
    return 0, ""


def stage(path: Path, kind: str) -> str:
    """Return what the stage that reads such rows says; nothing where it takes them."""
    try:
        read_records([path], KINDS[kind].parse, RowLog())
    except DataError as error:
        return str(error)
    return ""


def place(path: Path, message: str) -> str:
    """Return the line that a message begins with."""
    found = re.match(re.escape(str(path)) + r":(\d+): ", message)
    return found[1] if found else f"no place in {message!r}"


# ---- a corpus ----------------------------------------------------------------------------------------------

QA, ASK = share("human q", "gpt a"), share("human q")
CHINESE = "发热是体温高于正常范围,多喝水"
CALL = '{"name": "f", "arguments": {"x": 1}}'
TOOL = {"name": "f", "description": "d", "parameters": {}}
MARK = "hi<|im_end|>"
# fmt: off
GOOD = [  # kind, suffix, content, what the report says
    ("text", ".jsonl", TEXT * 2, "text: rows=2 with_tools=0"),
    ("text", ".jsonl", TEXT.strip(), "rows=1"),
    ("text", ".jsonl", '{"text": "a", "id": 7, "source": null}', "rows=1"),
    ("text", ".jsonl", r'{"text": "\ud83d\ude00 <b> a < b | c [x] <|> <think>"}', "rows=1"),
    ("text", ".jsonl", b"\xef\xbb\xbf" + TEXT.encode(), "warning: byte_order_mark=1"),
    ("text", ".jsonl", TEXT.strip() + "\r\n" + TEXT, "warning: windows_line_ends=1"),
    ("text", ".jsonl", "\n" + TEXT + " \t\n" + TEXT, "warning: blank_lines=2"),
    ("text", ".jsonl", line(text="a\u200bb") + line(text="\u2060a"), "warning: zero_width_characters=2"),
    ("text", ".json", '[{"text": "a"}, {"text": "b"}]', "rows=2"),
    ("text", ".json", json.dumps([{"text": "a"}, {"text": "b", "c": [{}]}], indent=2), "rows=2"),
    ("text", ".json", b'\xef\xbb\xbf[\r\n{"text": "a"}\r\n]\r\n', "byte_order_mark=1"),
    ("text", ".txt", "one\n\ntwo\n", "rows=1"),
    ("chat", ".jsonl", share("system s", "human q", "gpt a", "human q", "gpt a"), "read by supervised_finetuning.py"),
    ("chat", ".jsonl", openai("system s", "user q", "assistant a"), "chat: rows=1"),
    ("chat", ".jsonl", line(instruction="q", input="i", output="a", history=[["q", "a"]], system="s"), "rows=1"),
    ("chat", ".jsonl", line(instruction="q", input=None, output="a"), "rows=1"),
    ("chat", ".jsonl", share("human q", f"function_call {CALL}", "observation r", "gpt a", tools=[TOOL]), "with_tools=1"),
    ("chat", ".jsonl", share("human q", f"function_call [{CALL}]", "observation ", "gpt a", tools=json.dumps([TOOL])), "with_tools=1"),
    ("chat", ".jsonl", line(**called(), tools=[{"type": "function", "function": TOOL}]), "with_tools=1"),
    ("chat", ".jsonl", share("human q", "gpt a", "human q"), "unanswered_question_dropped=1"),
    ("chat", ".jsonl", share("human q", f"function_call {CALL}", "observation r"), "unanswered_observation_dropped=1"),
    ("chat", ".jsonl", QA + ASK, "row_without_answer_dropped=1"),
    ("pair", ".jsonl", pair(system="s", history=[["q", "a"]]), "read by dpo_training.py"),
    ("pair", ".jsonl", share("human q", chosen="a", rejected="b"), "pair: rows=1"),
    ("pair", ".jsonl", openai("user q", chosen={"role": "assistant", "content": "a"}, rejected="b"), "rows=1"),
    ("pair", ".jsonl", pair() + pair(response_rejected="a"), "identical_answers_dropped=1"),
    ("prompt", ".jsonl", line(prompt="q", system="s") + line(prompt="q"), "prompt: rows=2"),
]
BAD = [  # kind, suffix, content, the line, what names the fault
    ("text", ".jsonl", line(text=CHINESE).encode("gbk"), 1, "the text is GBK, not UTF-8"),
    ("text", ".jsonl", TEXT.encode() + line(text=CHINESE).encode("gbk"), 2, "GBK"),
    ("text", ".jsonl", line(text=CHINESE + "𠮷").encode("gb18030"), 1, "GB18030"),
    ("text", ".txt", CHINESE.encode("gbk"), 1, "GBK"),
    ("text", ".json", f'[\n{{"text": "{CHINESE}"}}]'.encode("gbk"), 2, "GBK"),
    ("text", ".jsonl", (TEXT * 2).encode("utf-16"), 1, "UTF-16"),
    ("text", ".jsonl", (TEXT * 2).encode("utf-16-le"), 1, "UTF-16"),
    ("text", ".json", '[{"text": "a"}]'.encode("utf-16-be"), 1, "UTF-16"),
    ("text", ".jsonl", TEXT.encode("utf-32"), 1, "UTF-32"),
    ("text", ".jsonl", TEXT.encode() + b'{"text": "a\xffb"}\n', 2, "byte 0xff is not UTF-8 (column 12"),
    ("text", ".jsonl", TEXT.encode() + '{"text": "发'.encode()[:-1] + b'"}\n', 2, "half a character"),
    ("text", ".json", b'[{"text": "a"},\n{"text": "\xe9t\xe9"}]', 2, "byte 0xe9"),
    ("text", ".jsonl", TEXT + '{"text": "a\0"}\n', 2, "a NUL character"),
    ("text", ".jsonl", TEXT + r'{"text": "a\u0000"}', 2, "text: holds a NUL"),
    ("text", ".json", '[{"text": "a"},\n{"text": "\0"}]', 2, "a NUL character"),
    ("text", ".txt", "one\n\nt\0o\n", 3, "a NUL character"),
    ("text", ".jsonl", TEXT + '{"text": "a', 2, "the JSON is cut off"),
    ("text", ".jsonl", TEXT + '{"text": "a"', 2, "the JSON is cut off"),
    ("text", ".jsonl", TEXT + '{"text": "a"}{"text": "b"}', 2, "two JSON values on one line (one ends before column 14)"),
    ("text", ".jsonl", TEXT + '{"text": "a"},', 2, "text behind the JSON object (',' at column 14)"),
    ("text", ".jsonl", TEXT + '{"text": "a", "text": "b"}', 2, "the key 'text' stands twice"),
    ("text", ".jsonl", TEXT + '{"text": "a", "x": {"k": 1, "k": 1}}', 2, "the key 'k' stands twice"),
    ("text", ".jsonl", TEXT + '{"text": "a", "x": NaN}', 2, "NaN is not JSON"),
    ("text", ".json", '[{"text": "a"},\n{"text": -Infinity}]', 2, "-Infinity is not JSON"),
    ("text", ".jsonl", '{"text": "a", "x": ' + "9" * 5000 + "}", 1, "more than 4,300 digits"),
    ("text", ".jsonl", TEXT + '{"text": "a", "x": ' + "[" * 9000, 2, "nested too deeply"),
    ("text", ".jsonl", TEXT * 2 + '{"text": 5}', 3, "text: is a number; expected a string"),
    ("text", ".jsonl", TEXT + '{"text": null}', 2, "text: is null"),
    ("text", ".jsonl", TEXT + '{"text": ["a"]}', 2, "text: is a list"),
    ("text", ".jsonl", TEXT + r'{"text": " \n\u3000"}', 2, "text: is empty"),
    ("text", ".jsonl", TEXT + '{"txt": "a"}', 2, "text: missing; the row has txt"),
    ("text", ".jsonl", TEXT + "{}", 2, "no fields"),
    ("text", ".jsonl", TEXT + "[1]", 2, "a row is a list"),
    ("text", ".jsonl", TEXT + "hello", 2, "no JSON object ('hello')"),
    ("text", ".jsonl", TEXT + "{'text': 'a'}", 2, "broken JSON: Expecting property name"),
    ("text", ".jsonl", TEXT + '{"text": "a\tb"}', 2, "Invalid control character"),
    ("text", ".jsonl", TEXT + r'{"text": "a\ud83d"}', 2, "half of a surrogate pair"),
    ("text", ".jsonl", TEXT + line(text="see</s>"), 2, "holds the marker '</s>'"),
    ("text", ".txt", "one\n<|endoftext|>\n", 2, "text: holds the marker"),
    ("text", ".jsonl", "<!DOCTYPE html>\n<html></html>", 1, "an HTML page"),
    ("text", ".jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 1, "Git LFS pointer"),
    ("text", ".jsonl", gzip.compress(TEXT.encode()), 1, "gzip"),
    ("text", ".jsonl", b"PK\x03\x04\x14\0\x06\0[Content_Types].xml", 1, ".xlsx"),
    ("text", ".json", b"PAR1\x15\x04", 1, "Parquet"),
    ("text", ".jsonl", "question,answer\nq,a\n", 1, "a table (CSV or TSV)"),
    ("text", ".jsonl", "", 1, "the file is empty"),
    ("text", ".json", "", 1, "empty"),
    ("text", ".jsonl", " \n\n", 1, "the file is blank"),
    ("text", ".txt", "\n\n", 1, "the file is blank"),
    ("text", ".jsonl", '[{"text": "a"}]', 1, "a JSON array in a .jsonl file"),
    ("text", ".jsonl", json.dumps({"text": "a"}, indent=2), 1, "runs over several lines"),
    ("text", ".jsonl", '{"foo": 1, "bar": 2}', 1, "foo, bar"),
    ("text", ".json", '[\n{"text": "a"},\n{"te', 3, "cut off"),
    ("text", ".json", '[\n{"text": "a"}\n', 3, "may be cut off"),
    ("text", ".json", '[{"text": "a"},\n\n5]', 3, "a row is a number"),
    ("text", ".json", '[{"text": "a"},\n]', 2, "a comma before the end"),
    ("text", ".json", '[{"text": "a"}]\n{}', 2, "text after the end of the array"),
    ("text", ".json", TEXT * 2, 1, "must hold one array"),
    ("text", ".json", "[]", 1, "holds no row"),
    ("text", ".json", json.dumps([{"text": "a"}, {"text": ""}], indent=1), 5, "text: is empty"),
    ("chat", ".jsonl", QA + share("human q", "gtp a"), 2, "conversations[1].from: is 'gtp'"),
    ("chat", ".jsonl", QA + line(conversations=[{"value": "q"}]), 2, "conversations[0].from: missing"),
    ("chat", ".jsonl", QA + share("gpt a", "human q"), 2, "conversations[0]: has role gpt where human is due"),
    ("chat", ".jsonl", QA + share("human q", "human q", "gpt a"), 2, "conversations[1]: has role human"),
    ("chat", ".jsonl", QA + share("human q", "system s", "gpt a"), 2, "conversations[1]: has role system"),
    ("chat", ".jsonl", QA + share("system s"), 2, "has no question"),
    ("chat", ".jsonl", QA + line(conversations=[]), 2, "an empty list"),
    ("chat", ".jsonl", QA + line(conversations=None), 2, "conversations: is null"),
    ("chat", ".jsonl", QA + line(conversations=["q", "a"]), 2, "conversations[0]: is a string; expected an object"),
    ("chat", ".jsonl", QA + share("human q", "gpt "), 2, "conversations[1].value: is empty"),
    ("chat", ".jsonl", openai("user q", "assistant a") + openai("user q", "bot a"), 2, "messages[1].role: is 'bot'"),
    ("chat", ".jsonl", line(messages=[{"role": "user", "content": None}]), 1, "messages[0].content: is null"),
    ("chat", ".jsonl", QA + share(f"human {MARK}", "gpt a"), 2, "conversations[0].value: holds the marker '<|im_end|>'"),
    ("chat", ".jsonl", line(instruction="q", output="[INST] a"), 1, "output: holds the marker '[INST]'"),
    ("chat", ".jsonl", line(instruction="q", output="a") + line(instruction="q"), 2, "output: missing"),
    ("chat", ".jsonl", share("human q", "gpt a", tools="nope"), 1, "tools: is no JSON"),
    ("chat", ".jsonl", share("human q", "gpt a", tools=[{"x": 1}]), 1, "tools[0]: has no name"),
    ("chat", ".jsonl", share("human q", "function_call {}", "observation r", "gpt a"), 1, "has no name"),
    ("chat", ".jsonl", share("human q", 'function_call {"name": "f", "arguments": [1]}', "observation r"), 1, ".arguments: is a list"),
    ("chat", ".jsonl", share("human q", "observation r", "gpt a"), 1, "conversations[1]: has role observation"),
    ("chat", ".jsonl", line(**called(tool_calls={"name": "f"})), 1, "tool_calls: is an object"),
    ("chat", ".jsonl", ASK * 2, 1, "no usable row"),
    ("pair", ".jsonl", pair() + line(question="q", response_chosen="a"), 2, "response_rejected: missing"),
    ("pair", ".jsonl", pair(history=[["q"]]), 1, "history[0]: expected [question, answer]"),
    ("pair", ".jsonl", pair(response_chosen=MARK), 1, "response_chosen: holds the marker"),
    ("pair", ".jsonl", share("human q", "gpt a", chosen="a", rejected="b"), 1, "ends with an answer"),
    ("pair", ".jsonl", share("human q", chosen={"from": "human", "value": "a"}, rejected="b"), 1, "chosen: has role user"),
    ("prompt", ".jsonl", line(prompt="q") + line(prompt=None), 2, "prompt: is null"),
]
# fmt: on


def write(directory: Path, content: str | bytes, name: str) -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(("kind", "suffix", "content", "said"), GOOD)
def test_a_file_that_the_stage_takes_is_good_and_told_of(tmp_path, capsys, kind, suffix, content, said):
    path = write(tmp_path, content, f"a{suffix}")
    assert validate(path) == (0, "")
    assert said in capsys.readouterr().out
    assert stage(path, kind) == ""


@pytest.mark.parametrize(("kind", "suffix", "content", "number", "fault"), BAD)
def test_a_file_that_the_stage_refuses_is_refused_at_the_same_line(
    tmp_path, capsys, kind, suffix, content, number, fault
):
    path = write(tmp_path, content, f"a{suffix}")
    code, message = validate(path)
    assert (code, place(path, message)) == (3, str(number))
    assert fault in message
    assert message.split(" (the first of")[0] in capsys.readouterr().out
    assert place(path, stage(path, kind)) == str(number)
