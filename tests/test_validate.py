"""validate_jsonl.py says of every file what the stages say; what it mends validates; what it counts is so."""

import copy
import gzip
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import validate_jsonl
from medicalgpt import json_array
from medicalgpt.data_files import read_text_lines
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.json_array import ArrayReader
from medicalgpt.kinds import KINDS, SilentLog
from medicalgpt.records import iterate_records, read_records
from medicalgpt.row_log import RowLog

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
    ("text", ".jsonl", '{"foo": 1, "bar": 2}', 1, "bar, foo"),
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


# ---- mutated lines -----------------------------------------------------------------------------------------

PIECES = [
    *'"{}[],:\\\n\r\0 0é',
    "\x85",
    "\u2028",
    "\u200b",
    "\ufeff",
    "null",
    '{"a": 1}',
    "</s>",
    "\\ud800",
    "\\u00",
]
VALUES = [None, True, 0, 1.5, "", " ", "x", [], ["x"], {}, {"from": "gpt"}, [["q", "a"]]]
ROLES = ["human", "gpt", "system", "observation", "function_call", "user", "assistant", "tool", "Human", ""]
ROWS = {
    "text": [json.loads(TEXT)],
    "chat": [
        json.loads(share("system s", "human q", f"function_call {CALL}", "observation r", "gpt a", tools=[TOOL])),
        json.loads(openai("user q", "assistant a", "user q", "assistant a")),
        json.loads(line(instruction="q", input="i", output="a", history=[["q", "a"]])),
        {**called(), "tools": [TOOL]},
    ],
    "pair": [
        json.loads(pair(history=[["q", "a"]])),
        json.loads(share("human q", chosen={"from": "gpt", "value": "a"}, rejected="b")),
    ],
}  # fmt: skip


def containers(value: object) -> list:
    """Return every object and list in a JSON value that holds something."""
    if not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return ([value] if value else []) + [found for item in inner for found in containers(item)]


def mutated(row: dict, generator: random.Random) -> bytes:
    """Return a row's line with one to three changes to its values, or to its characters or bytes."""
    text = json.dumps(row, ensure_ascii=False)
    if generator.random() < 0.5:
        row = json.loads(text)
        for _ in range(generator.randint(1, 2)):
            box = generator.choice(containers(row) or [{}])
            key = generator.choice(list(box) if isinstance(box, dict) else range(len(box))) if box else "text"
            if generator.random() < 0.3 and box:
                del box[key]
            else:
                values = ROLES if key in ("from", "role") else VALUES
                box[key] = copy.deepcopy(generator.choice(values))
        return json.dumps(row, ensure_ascii=False).encode()
    for _ in range(generator.randint(1, 3)):
        begin = generator.randrange(len(text) + 1)
        end = min(len(text), begin + generator.choice([0, 0, 1, 1, 5, len(text)]))
        text = text[:begin] + generator.choice([*PIECES, "", "", text[begin:end] * 2]) + text[end:]
    raw = text.encode()
    at = generator.randrange(len(raw) + 1)
    raw = raw[:at] + b"\xff" + raw[at:] if generator.random() < 0.1 else raw
    # A line `{` is left to test_validate_bugs.py.
    return (
        mutated(row, generator) if "{" in map(str.strip, raw.decode("utf-8", "ignore").split("\n")) else raw
    )


def contents(path: Path, kind: str) -> list[str]:
    """Return the good rows of a file, without their places and zero-width characters."""
    records = iterate_records([path], KINDS[kind].parse, SilentLog())
    return [re.sub(r"\\u200b|\\ufeff|[\u200b\ufeff]", "", repr(replace(one, origin=""))) for one in records]


@pytest.mark.parametrize("seed", range(10))
def test_validator_and_stage_agree_on_mutated_lines_and_the_mend_loses_no_good_row(tmp_path, capsys, seed):
    """50 files of 20 rows with one mutated line. Only DataError escapes; what --fix writes is good."""
    generator = random.Random(seed)
    for number in range(50):
        kind = generator.choice(list(ROWS))
        rows = [json.dumps(generator.choice(ROWS[kind])).encode() for _ in range(20)]
        rows[generator.randrange(20)] = mutated(generator.choice(ROWS[kind]), generator)
        path = write(tmp_path, b"\n".join(rows), f"{number}.jsonl")
        code, message = validate(path)
        refusal = stage(path, kind)
        assert (code == 3) == bool(refusal), (path, message, refusal)
        assert not refusal or place(path, message) == place(path, refusal) != "no place", (message, refusal)
        mended = tmp_path / f"{number}.mended.jsonl"
        code, message = validate(path, "--fix", mended)
        assert validate(mended) == (0, ""), path
        assert mended.with_name(mended.name + ".rejects.jsonl").exists() == (code == 3) == bool(message)
        left = contents(mended, kind)
        for good in contents(path, kind):
            assert good in left, path
            left.remove(good)
        assert path.read_bytes() == b"\n".join(rows)
    assert not list(tmp_path.glob(".*"))


# ---- the readers of lines and arrays -----------------------------------------------------------------------


def random_array(generator: random.Random) -> str:
    """Return the text of an array of objects, with line ends and spaces wherever JSON allows them."""
    words = ["a", "发热", "😀", "\\ud83d\\ude00", "\\n", '\\"', "]", "},", "\u2028", ""]
    values = [*(f'"{word}"' for word in words), "-1.5e3", "120", "true", "null", "[ ]", '{"a":[{"b":1}]}']
    spaces = ["", "", " ", "\n", "\r\n", "\t\n\n"]
    rows = []
    for index in range(generator.randint(1, 6)):
        gaps = generator.choices(spaces, k=5)
        rows.append(f'{gaps[0]}{{{gaps[1]}"k{index}"{gaps[2]}:{generator.choice(values)}{gaps[3]}}}{gaps[4]}')
    return f"{generator.choice(spaces)}[{','.join(rows)}]{generator.choice(spaces)}"


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
def test_an_array_reads_as_json_reads_it_wherever_the_chunks_end(tmp_path, monkeypatch, chunk_bytes):
    """The line of a row is that of its brace: one more than the line feeds before it."""
    monkeypatch.setattr(json_array, "CHUNK_BYTES", chunk_bytes)
    generator = random.Random(chunk_bytes)
    for _ in range(60):
        text = random_array(generator)
        path = write(tmp_path, text, "a.json")
        found = list(ArrayReader(path).values())
        assert [value for value, *_ in found] == json.loads(text)
        begins = [text.rindex("{", 0, text.index(f'"k{index}"')) for index in range(len(found))]
        assert [place for *_, place in found] == [f"{path}:{1 + text[:at].count(chr(10))}" for at in begins]


def read_array(path: Path) -> tuple[list, str]:
    """Return (the values of an array, the refusal of what follows)."""
    values = []
    try:
        for value, *_ in ArrayReader(path).values():
            values.append(value)
    except DataError as error:
        return values, str(error)
    return values, ""


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7])
def test_a_broken_array_is_refused_in_the_same_words_wherever_the_chunks_end(
    tmp_path, monkeypatch, chunk_bytes
):
    generator = random.Random(5)
    for _ in range(300):
        text = random_array(generator)
        at = generator.randrange(len(text))
        text = text[:at] + generator.choice(["", "x", ",", "]", '"', "\0", "}"]) + text[at + 1 :]
        path = write(tmp_path, text, "a.json")
        monkeypatch.setattr(json_array, "CHUNK_BYTES", 1 << 20)
        values, refusal = read_array(path)
        try:
            expected = json.loads(text)
        except ValueError:
            assert place(path, refusal).isdigit(), text
        else:
            assert (values, refusal) == (expected, "")
        monkeypatch.setattr(json_array, "CHUNK_BYTES", chunk_bytes)
        assert read_array(path)[1] == refusal, text


def test_lines_are_those_that_line_feeds_part(tmp_path):
    generator = random.Random(0)
    for _ in range(200):
        text = "x" + "".join(generator.choices(["a", "发", "\n", "\r\n", "\r", "\x85", "\u2028", "\v"], k=30))
        lines = text.removesuffix("\n").split("\n")
        expected = [(one.removesuffix("\r"), number) for number, one in enumerate(lines, 1)]
        assert list(read_text_lines(write(tmp_path, text, "a.txt"), RowLog())) == expected
