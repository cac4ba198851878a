"""Data files become records; what cannot be used is refused by file and line; validation shares no prompt."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from medicalgpt.arguments import DataArguments
from medicalgpt.data_files import find_files, fingerprint_files
from medicalgpt.dataset import load_data
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.holdout import hold_out, without_shared
from medicalgpt.records import (
    Chat,
    Message,
    Pair,
    Text,
    parse_chat,
    parse_pair,
    parse_text,
    read_records,
)
from medicalgpt.row_log import RowLog

import pytest

SUFFIXES = (".jsonl", ".json", ".txt")
GREETING = (Message("user", "hi"), Message("assistant", "hello"))


def read(path: Path, content: str | bytes, parse=parse_text, **options):
    """Write a file and return (its records, the log)."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    log = RowLog()
    return read_records([path], parse, log, **options), log


# ---- formats that are read ---------------------------------------------------------------------------------


def test_a_text_row_becomes_a_text_with_its_line(tmp_path):
    file = tmp_path / "a.jsonl"
    records, log = read(file, '{"text": "one"}\n{"text": "two", "source": "book"}\n')
    assert records == [Text("one", f"{file}:1"), Text("two", f"{file}:2")]
    assert log.lines() == []


def test_blank_lines_are_skipped_and_still_count_as_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    records, _ = read(file, '\n{"text": "one"}\n\n   \n\t{"text": "two"}  \n\n')
    assert records == [Text("one", f"{file}:2"), Text("two", f"{file}:5")]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    jsonl, _ = read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n')
    array, _ = read(tmp_path / "a.json", b'\xef\xbb\xbf[{"text": "one"}]')
    txt, _ = read(tmp_path / "a.txt", b"\xef\xbb\xbfone\n")
    assert [record.text for record in jsonl + array + txt] == ["one", "one", "one"]


def test_windows_line_ends_change_neither_rows_nor_line_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    records, _ = read(file, b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert records == [Text("one", f"{file}:1"), Text("two", f"{file}:3")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_a_unicode_line_separator_inside_a_text_ends_no_line(tmp_path, separator):
    """str.splitlines would cut here (\\x0b and \\x0c are only allowed in .txt, where nothing is escaped)."""
    text = f"before{separator}after"
    records, _ = read(tmp_path / "a.txt", f"{text}\nnext", txt_documents="line")
    assert [record.text for record in records] == [text, "next"]
    if separator >= " ":
        records, _ = read(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
        assert [record.text for record in records] == [text]


def test_a_json_array_gives_every_element_the_line_where_it_begins(tmp_path):
    file = tmp_path / "a.json"
    records, _ = read(
        file, '\n[\n  {"text": "one"}, {"text": "same line"},\n\n  {\n    "text": "five"\n  }\n]\n'
    )
    assert records == [
        Text("one", f"{file}:3"),
        Text("same line", f"{file}:3"),
        Text("five", f"{file}:5"),
    ]


def test_escaped_and_plain_characters_are_the_same_text(tmp_path):
    records, _ = read(tmp_path / "a.jsonl", '{"text": "\\u533b\\ud83d\\ude00"}\n{"text": "医😀"}\n')
    assert records[0].text == records[1].text == "医😀"


def test_text_keeps_its_own_white_space(tmp_path):
    records, _ = read(tmp_path / "a.jsonl", '{"text": "  a\\n\\n b \\n"}\n')
    assert records[0].text == "  a\n\n b \n"


TXT = "\none\ntwo\n\n  \nthree\n\n\n\nfour\n"  # lines: 2 one, 3 two, 6 three, 10 four


@pytest.mark.parametrize(
    ("txt_documents", "expected"),
    [
        ("file", [("one\ntwo\n\n  \nthree\n\n\n\nfour", 1)]),
        ("line", [("one", 2), ("two", 3), ("three", 6), ("four", 10)]),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_txt_file_is_split_as_asked(tmp_path, txt_documents, expected, line_end):
    file = tmp_path / "a.txt"
    records, _ = read(file, TXT.replace("\n", line_end), txt_documents=txt_documents)
    assert records == [Text(text, f"{file}:{line}") for text, line in expected]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_blank_lines_part_the_documents_of_a_txt_file(tmp_path, line_end):
    file = tmp_path / "a.txt"
    records, _ = read(file, TXT.lstrip().replace("\n", line_end), txt_documents="blank")
    assert records == [
        Text("one\ntwo", f"{file}:1"),
        Text("three", f"{file}:5"),
        Text("four", f"{file}:9"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"id": 7, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    ],
    ids=["sharegpt", "openai", "with-other-fields"],
)
def test_both_chat_formats_become_the_same_messages(tmp_path, row):
    file = tmp_path / "a.jsonl"
    records, _ = read(file, json.dumps(row), parse_chat)
    assert records == [Chat(GREETING, f"{file}:1")]


@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_a_system_field_of_the_row_is_the_system_message(tmp_path, form):
    """LLaMA-Factory's ShareGPT rows have it; two system prompts are one too many."""
    turns = {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    }[form]
    file = tmp_path / "a.jsonl"
    records, _ = read(file, json.dumps({form: turns, "system": "s"}), parse_chat)
    assert records[0].messages == (Message("system", "s"), *GREETING)
    own = dict(zip(turns[0], ("system", "t"), strict=True))
    with pytest.raises(DataError, match=rf"a\.jsonl:1: system: stands beside a system turn in {form}"):
        read(file, json.dumps({form: [own, *turns], "system": "s"}), parse_chat)


def test_an_alpaca_row_becomes_a_conversation(tmp_path):
    row = {"instruction": "hi", "input": "there", "output": "hello", "system": "s", "history": [["q", "a"]]}
    records, _ = read(tmp_path / "a.jsonl", json.dumps(row), parse_chat)
    assert [(m.role, m.content) for m in records[0].messages] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "hi\nthere"),
        ("assistant", "hello"),
    ]


@pytest.mark.parametrize("system", ["You are a doctor.", ""])
def test_a_system_message_comes_first_and_may_be_empty(tmp_path, system):
    row = {
        "conversations": [
            {"from": "system", "value": system},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "hello"},
        ]
    }
    records, _ = read(tmp_path / "a.jsonl", json.dumps(row), parse_chat)
    assert records[0].messages == (Message("system", system), *GREETING)
    assert records[0].key == "hi"


QUESTION_FORM = {"question": "hi", "response_chosen": "good", "response_rejected": "bad"}
CONVERSATION_FORM = {"conversations": [{"from": "human", "value": "hi"}], "chosen": "good", "rejected": "bad"}
MESSAGES_FORM = {"messages": [{"role": "user", "content": "hi"}], "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize("row", [QUESTION_FORM, CONVERSATION_FORM, MESSAGES_FORM])
def test_all_pair_forms_become_the_same_pair(tmp_path, row):
    file = tmp_path / "a.jsonl"
    records, _ = read(file, json.dumps(row), parse_pair)
    assert records == [
        Pair((Message("user", "hi"),), Message("assistant", "good"), Message("assistant", "bad"), f"{file}:1")
    ]


def test_system_and_history_of_a_pair_come_before_its_question(tmp_path):
    row = QUESTION_FORM | {"system": "be kind", "history": [["q1", "a1"], ["q2", "a2"]]}
    records, _ = read(tmp_path / "a.jsonl", json.dumps(row), parse_pair)
    assert records[0].prompt == (
        Message("system", "be kind"),
        Message("user", "q1"),
        Message("assistant", "a1"),
        Message("user", "q2"),
        Message("assistant", "a2"),
        Message("user", "hi"),
    )
    assert records[0].key == "q1\na1\nq2\na2\nhi"


@pytest.mark.parametrize("empty", [{"system": "", "history": []}, {"system": None, "history": None}])
def test_an_empty_system_and_history_of_a_pair_are_none(tmp_path, empty):
    records, _ = read(tmp_path / "a.jsonl", json.dumps(QUESTION_FORM | empty), parse_pair)
    assert records[0].prompt == (Message("user", "hi"),)


def test_records_come_in_file_order_then_line_order(tmp_path):
    for name, texts in (("b.jsonl", "cd"), ("a.jsonl", "ab")):
        (tmp_path / name).write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    files = find_files(str(tmp_path), SUFFIXES, "--train_file_dir")
    assert [record.text for record in read_records(files, parse_text, RowLog())] == ["a", "b", "c", "d"]


# ---- rows that are dropped and counted ---------------------------------------------------------------------


def test_a_last_question_without_answer_is_dropped_and_counted(tmp_path):
    turns = [("human", "hi"), ("gpt", "hello"), ("human", "and now?")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    records, log = read(tmp_path / "a.jsonl", json.dumps(row), parse_chat)
    assert records[0].messages == GREETING
    assert log.lines() == [f"unanswered_question_dropped=1 ({tmp_path}/a.jsonl:1)"]


def test_a_conversation_without_any_answer_is_dropped_and_counted(tmp_path):
    lone = {"conversations": [{"from": "human", "value": "hi"}]}
    whole = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    records, log = read(tmp_path / "a.jsonl", f"{json.dumps(lone)}\n{json.dumps(whole)}", parse_chat)
    assert [record.origin for record in records] == [f"{tmp_path}/a.jsonl:2"]
    assert log.counts["row_without_answer_dropped"] == 1
    assert log.places["row_without_answer_dropped"] == [f"{tmp_path}/a.jsonl:1"]


def test_a_pair_of_equal_answers_is_dropped_and_counted(tmp_path):
    equal = QUESTION_FORM | {"response_rejected": "good"}
    records, log = read(
        tmp_path / "a.jsonl", f"{json.dumps(QUESTION_FORM)}\n{json.dumps(equal)}\n", parse_pair
    )
    assert len(records) == 1
    assert log.lines() == [f"identical_answers_dropped=1 ({tmp_path}/a.jsonl:2)"]


def test_the_log_names_the_first_five_places_of_a_reason():
    log = RowLog()
    for line in range(1, 8):
        log.add("cut", f"a:{line}")
    assert log.lines() == ["cut=7 (a:1, a:2, a:3, a:4, a:5, …)"]


def test_a_file_whose_rows_are_all_dropped_is_refused_with_the_reasons(tmp_path):
    with pytest.raises(DataError, match=r"no usable row in .*a\.jsonl: identical_answers_dropped=1"):
        read(tmp_path / "a.jsonl", json.dumps(QUESTION_FORM | {"response_rejected": "good"}), parse_pair)


# ---- files and rows that are refused -----------------------------------------------------------------------


def chat(*turns):
    """Return a ShareGPT line."""
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]})


def pair(**changes):
    """Return a pair line; a change to ... removes the field."""
    row = QUESTION_FORM | changes
    return json.dumps({name: value for name, value in row.items() if value is not ...})


GOOD = '{"text": "fine"}\n'
BAD_FILES = {
    # whole files that are not what their name says
    "empty": ("a.jsonl", "", parse_text, 1, "the file is empty"),
    "only-blank-lines": ("a.jsonl", "\n \n\t\n", parse_text, 1, "the file is blank"),
    "empty-txt": ("a.txt", "\n\n", parse_text, 1, "the file is blank"),
    "empty-array": ("a.json", "[]", parse_text, 1, "holds no row"),
    "not-utf8": (
        "a.jsonl",
        (GOOD * 2).encode() + b'{"text": "\xb2\xa1"}',
        parse_text,
        3,
        "byte 0xb2 is not UTF-8",
    ),
    "not-utf8-txt": ("a.txt", b"one\ntwo\xff\n", parse_text, 2, "byte 0xff is not UTF-8"),
    "cut-in-a-character": ("a.txt", "one\n医".encode()[:-1], parse_text, 2, "is not UTF-8"),
    "utf16-little": ("a.jsonl", GOOD.encode("utf-16-le").join([b"\xff\xfe", b""]), parse_text, 1, "UTF-16"),
    "utf16-big": ("a.jsonl", b"\xfe\xff" + GOOD.encode("utf-16-be"), parse_text, 1, "UTF-16"),
    "utf16-without-mark": ("a.jsonl", GOOD.encode("utf-16-le"), parse_text, 1, "UTF-16-LE text"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\x00\x00\x00", parse_text, 1, "gzip data; unpack it"),
    "zip": ("a.jsonl", b"PK\x03\x04rest", parse_text, 1, "a zip archive"),
    "html": ("a.jsonl", "<!doctype HTML><html>404</html>", parse_text, 1, "an HTML page"),
    "html-after-blank": ("a.json", "\n<html><body>", parse_text, 1, "an HTML page"),
    "lfs": (
        "a.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        parse_text,
        1,
        "Git LFS pointer",
    ),
    "nul": ("a.jsonl", GOOD + '{"text": "a\0b"}', parse_text, 2, "a NUL character"),
    "nul-txt": ("a.txt", "one\n\ntwo\0", parse_text, 3, "a NUL character"),
    # lines that are not one JSON object
    "truncated": ("a.jsonl", GOOD + '{"text": "half', parse_text, 2, "the JSON is cut off"),
    "two-on-a-line": ("a.jsonl", GOOD + GOOD.strip() + GOOD, parse_text, 2, "two JSON values on one line"),
    "trailing-comma": ("a.jsonl", GOOD + '{"text": "a"},', parse_text, 2, "text behind the JSON object"),
    "single-quotes": ("a.jsonl", "{'text': 'a'}", parse_text, 1, "double quotes"),
    "pretty-printed": ("a.jsonl", '{\n"text": "a"\n}', parse_text, 1, "runs over several lines"),
    "duplicate-key": (
        "a.jsonl",
        GOOD + '{"text": "a", "text": "b"}',
        parse_text,
        2,
        "key 'text' stands twice",
    ),
    "nan": ("a.jsonl", GOOD + '{"text": "a", "score": NaN}', parse_text, 2, "NaN is not JSON"),
    "infinity": ("a.jsonl", '{"text": "a", "score": -Infinity}', parse_text, 1, "-Infinity is not JSON"),
    "lone-surrogate": ("a.jsonl", GOOD + '{"text": "\\ud83d"}', parse_text, 2, "half of a surrogate pair"),
    "surrogate-in-a-key": (
        "a.jsonl",
        '{"text": "a", "\\ude00": 1}',
        parse_text,
        1,
        "half of a surrogate pair",
    ),
    "deep": ("a.jsonl", GOOD + "[" * 100_000, parse_text, 2, "nested too deeply"),
    "list-row": ("a.jsonl", GOOD + '["text"]', parse_text, 2, "a row is a list; expected a JSON object"),
    "string-row": ("a.jsonl", '"text"', parse_text, 1, "a row is a string"),
    "null-row": ("a.jsonl", GOOD + "null", parse_text, 2, "a row is null"),
    "list-in-array": (
        "a.json",
        '[\n{"text": "a"},\n[]\n]',
        parse_text,
        3,
        "a row is a list; expected a JSON object",
    ),
    "object-as-json": ("a.json", GOOD, parse_text, 1, "one array of objects; name it .jsonl"),
    "truncated-array": ("a.json", '[{"text": "a"},', parse_text, 1, "the file is cut off: Expecting value"),
    # texts
    "no-text": (
        "a.jsonl",
        GOOD + '{"txet": "a", "id": 1}',
        parse_text,
        2,
        "text: missing; the row has id, txet",
    ),
    "no-fields": ("a.jsonl", "{}", parse_text, 1, "text: missing; the row has no fields"),
    "text-number": ("a.jsonl", '{"text": 5}', parse_text, 1, "text: is a number; expected a string"),
    "text-null": ("a.jsonl", '{"text": null}', parse_text, 1, "text: is null; expected a string"),
    "text-empty": ("a.jsonl", GOOD + '{"text": ""}', parse_text, 2, "text: is empty"),
    "text-blank": ("a.json", '[{"text": "a"},\n\n{"text": " \\n\\u3000"}]', parse_text, 3, "text: is empty"),
    # conversations
    "no-conversation": (
        "a.jsonl",
        '{"text": "a"}',
        parse_chat,
        1,
        "conversations: missing; the row has text",
    ),
    "no-turns": ("a.jsonl", '{"conversations": []}', parse_chat, 1, "conversations: is an empty list"),
    "turns-null": ("a.jsonl", '{"messages": null}', parse_chat, 1, "messages: is null; expected a list"),
    "turns-string": (
        "a.jsonl",
        '{"messages": "hi"}',
        parse_chat,
        1,
        "messages: is a string; expected a list",
    ),
    "turn-string": (
        "a.jsonl",
        '{"messages": ["hi"]}',
        parse_chat,
        1,
        r"messages\[0\]: is a string; expected an object",
    ),
    "unknown-role": (
        "a.jsonl",
        chat(("human", "a"), ("gtp", "b")),
        parse_chat,
        1,
        r"conversations\[1\]\.from: is 'gtp'; expected system, human, gpt",
    ),
    "role-of-the-other-format": (
        "a.jsonl",
        chat(("user", "a"), ("assistant", "b")),
        parse_chat,
        1,
        r"conversations\[0\]\.from: is 'user'",
    ),
    "role-null": ("a.jsonl", chat((None, "a")), parse_chat, 1, r"conversations\[0\]\.from: is null"),
    "no-value": (
        "a.jsonl",
        '{"conversations": [{"from": "human", "text": "a"}]}',
        parse_chat,
        1,
        r"conversations\[0\]\.value: missing; the row has from, text",
    ),
    "empty-answer": (
        "a.jsonl",
        chat(("human", "a"), ("gpt", "b")) + "\n" + chat(("human", "a"), ("gpt", " ")),
        parse_chat,
        2,
        r"conversations\[1\]\.value: is empty",
    ),
    "value-list": ("a.jsonl", chat(("human", ["a"])), parse_chat, 1, r"conversations\[0\]\.value: is a list"),
    "answer-first": (
        "a.jsonl",
        chat(("gpt", "a"), ("human", "b")),
        parse_chat,
        1,
        r"conversations\[0\]: has role gpt where human is due; human and gpt must alternate",
    ),
    "two-questions": (
        "a.jsonl",
        chat(("system", "s"), ("human", "a"), ("human", "b")),
        parse_chat,
        1,
        r"conversations\[2\]: has role human where gpt is due",
    ),
    "system-in-the-middle": (
        "a.jsonl",
        chat(("human", "a"), ("gpt", "b"), ("system", "s")),
        parse_chat,
        1,
        r"conversations\[2\]: has role system where human is due",
    ),
    "only-system": ("a.jsonl", chat(("system", "s")), parse_chat, 1, "conversations: has no question"),
    # pairs
    "no-question": ("a.jsonl", pair(question=...), parse_pair, 1, "question: missing"),
    "no-chosen": ("a.jsonl", pair(response_chosen=...), parse_pair, 1, "response_chosen: missing"),
    "empty-rejected": ("a.jsonl", pair(response_rejected=""), parse_pair, 1, "response_rejected: is empty"),
    "chosen-list": ("a.jsonl", pair(response_chosen=["a"]), parse_pair, 1, "response_chosen: is a list"),
    "system-number": ("a.jsonl", pair(system=5), parse_pair, 1, "system: is a number"),
    "history-string": ("a.jsonl", pair(history="a"), parse_pair, 1, "history: is a string"),
    "history-flat": (
        "a.jsonl",
        pair(history=["q", "a"]),
        parse_pair,
        1,
        r"history\[0\]: expected \[question",
    ),
    "history-half": ("a.jsonl", pair(history=[["q", "a"], ["q"]]), parse_pair, 1, r"history\[1\]: expected"),
    "history-empty": ("a.jsonl", pair(history=[["q", " "]]), parse_pair, 1, r"history\[0\]: expected"),
    "prompt-ends-with-answer": (
        "a.jsonl",
        json.dumps(json.loads(chat(("human", "a"), ("gpt", "b"))) | {"chosen": "c", "rejected": "d"}),
        parse_pair,
        1,
        "conversations: ends with an answer",
    ),
    "no-chosen-beside-conversation": (
        "a.jsonl",
        chat(("human", "a")),
        parse_pair,
        1,
        "chosen: missing; the row has conversations",
    ),
}


@pytest.mark.parametrize(("name", "content", "parse", "line", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_what_cannot_be_used_is_refused_by_file_line_and_reason(
    tmp_path, name, content, parse, line, message
):
    with pytest.raises(
        DataError, match=rf"^{re.escape(str(tmp_path / name))}:{line}: .*{message}"
    ) as refusal:
        read(tmp_path / name, content, parse)
    assert refusal.value.exit_code == 3
    assert "\n" not in str(refusal.value)


def test_a_bad_row_deep_in_a_big_file_is_named_by_its_true_line(tmp_path):
    lines = ['{"text": "fine"}'] * 30_000 + ['{"text": ""}'] + ['{"text": "fine"}'] * 10
    with pytest.raises(DataError, match=r"big\.jsonl:30001: text: is empty"):
        read(tmp_path / "big.jsonl", "\n".join(lines))


# ---- paths -------------------------------------------------------------------------------------------------


def test_a_missing_path_is_a_wrong_flag_and_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"--train_file_dir .*/nowhere does not exist") as refusal:
        find_files(str(tmp_path / "nowhere"), SUFFIXES, "--train_file_dir")
    assert refusal.value.exit_code == 2


def test_a_directory_without_data_files_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"--train_file_dir .* holds no \.jsonl, \.json, \.txt file"):
        find_files(str(tmp_path), SUFFIXES, "--train_file_dir")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"--train_file_dir takes \.jsonl files, not \.csv"):
        find_files(str(tmp_path / "a.csv"), (".jsonl",), "--train_file_dir")


def test_files_are_found_at_any_depth_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", ".cache/x.jsonl", "a/.hidden.jsonl", "a/y.txt", "a/c.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files(str(tmp_path), (".jsonl", ".txt"), "--train_file_dir")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/y.txt", "a/z.jsonl", "b.jsonl"]


def test_one_file_can_stand_for_a_directory(tmp_path):
    (tmp_path / "a.jsonl").write_text("x")
    assert find_files(str(tmp_path / "a.jsonl"), SUFFIXES, "--train_file_dir") == [tmp_path / "a.jsonl"]


def test_a_fingerprint_of_files_is_their_sha256(tmp_path):
    """printf abc | sha256sum"""
    (tmp_path / "a").write_text("abc")
    assert fingerprint_files([tmp_path / "a"]) == {
        str(tmp_path / "a"): "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }


# ---- training and validation -------------------------------------------------------------------------------


def texts(*values: str) -> list[Text]:
    return [Text(value, f"a:{index}") for index, value in enumerate(values, 1)]


def test_a_split_is_the_same_on_every_call_and_in_every_order():
    records = texts(*(f"document {i}" for i in range(200)))
    train, held = hold_out(records, 5.0)
    assert hold_out(records, 5.0) == (train, held)
    assert set(hold_out(records[::-1], 5.0)[1]) == set(held)
    assert sorted(train + held, key=records.index) == records


def test_a_split_is_decided_by_sha256_of_the_prompt():
    """sha256("c") = 2e7d…, so 0x2e / 0x100 = 18 % of the way: held out at 20 %; "a" ca97…, "b" 3e23… are not."""
    train, held = hold_out(texts("a", "b", "c"), 20.0)
    assert [record.text for record in train] == ["a", "b"]
    assert [record.text for record in held] == ["c"]


def test_about_the_asked_share_is_held_out():
    """1,000 prompts at 10 %: 100 expected, standard deviation 9.5; five of them is 47."""
    _, held = hold_out(texts(*(f"document {i}" for i in range(1000))), 10.0)
    assert 53 < len(held) < 147


def test_no_prompt_stands_on_both_sides():
    records = [
        Chat((Message("user", f"q{i % 40}"), Message("assistant", f"a{i}")), f"a:{i}") for i in range(200)
    ]
    train, held = hold_out(records, 20.0)
    assert held
    assert not {record.key for record in train} & {record.key for record in held}


def test_at_least_one_row_is_held_out():
    """At 0.001 % no hash of "a" ca97…, "b" 3e23… is below the limit: the smallest one goes."""
    train, held = hold_out(texts("a", "b"), 0.001)
    assert [record.text for record in train] == ["a"]
    assert [record.text for record in held] == ["b"]


def test_rows_that_all_share_one_prompt_cannot_be_split():
    with pytest.raises(DataError, match=r"^a:1: all 3 rows share one prompt, .* --do_eval False"):
        hold_out(texts("a", "a", "a"), 5.0)


def test_validation_rows_whose_prompt_is_trained_are_left_out():
    train = [
        Pair(
            (Message("system", "s"), Message("user", "q")),
            Message("assistant", "a"),
            Message("assistant", "b"),
            "t:1",
        )
    ]
    same = Pair((Message("user", "q"),), Message("assistant", "c"), Message("assistant", "d"), "v:1")
    other = Pair((Message("user", "p"),), Message("assistant", "a"), Message("assistant", "b"), "v:2")
    assert without_shared([same, other], train) == [other]


def load(train_dir: Path, validation_dir: Path | None = None, *, do_eval: bool = True, **options):
    args = DataArguments(
        train_file_dir=str(train_dir),
        validation_file_dir=str(validation_dir) if validation_dir else None,
        **options,
    )
    flags = SimpleNamespace(
        data=args, run=SimpleNamespace(do_eval=do_eval), model=SimpleNamespace(cache_dir=None)
    )
    return load_data(flags, parse_text, SUFFIXES)


def write_texts(directory: Path, *values: str) -> Path:
    directory.mkdir()
    (directory / "data.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return directory


def values(records) -> list[str]:
    return [record.text for record in records]


def test_without_a_validation_directory_rows_are_held_out(tmp_path):
    data = load(write_texts(tmp_path / "train", "a", "b", "c"), validation_split_percentage=20.0)
    assert (values(data.train), values(data.validation), data.num_read) == (["a", "b"], ["c"], 3)


@pytest.mark.parametrize("spelling", ["train", "train/", "other/../train", "link"])
def test_the_training_directory_for_both_means_held_out_rows(tmp_path, spelling):
    train = write_texts(tmp_path / "train", "a", "b", "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(train)
    data = load(train, Path(f"{tmp_path}/{spelling}"), validation_split_percentage=20.0)
    assert (values(data.train), values(data.validation)) == (["a", "b"], ["c"])


def test_a_validation_directory_of_its_own_leaves_all_training_rows(tmp_path):
    data = load(write_texts(tmp_path / "train", "a", "b"), write_texts(tmp_path / "valid", "x", "y"))
    assert (values(data.train), values(data.validation)) == (["a", "b"], ["x", "y"])
    assert sorted(data.files) == [f"{tmp_path}/train/data.jsonl", f"{tmp_path}/valid/data.jsonl"]


def test_validation_rows_that_are_also_trained_are_removed_and_counted(tmp_path):
    data = load(write_texts(tmp_path / "train", "a", "b"), write_texts(tmp_path / "valid", "b", "x", "a"))
    assert (values(data.train), values(data.validation)) == (["a", "b"], ["x"])
    assert data.log.counts["validation_rows_also_in_training"] == 2


def test_validation_data_that_is_all_trained_is_refused(tmp_path):
    train, valid = write_texts(tmp_path / "train", "a", "b"), write_texts(tmp_path / "valid", "b")
    with pytest.raises(
        DataError, match=r"--validation_file_dir .*/valid: all 1 prompts occur in the training"
    ):
        load(train, valid)


def test_without_evaluation_every_row_is_trained_and_validation_files_are_not_read(tmp_path):
    data = load(write_texts(tmp_path / "train", "a", "b"), tmp_path / "nowhere", do_eval=False)
    assert (values(data.train), data.validation) == (["a", "b"], [])
    assert list(data.files) == [f"{tmp_path}/train/data.jsonl"]


def test_limits_take_the_first_rows_and_leave_the_count_read(tmp_path):
    data = load(
        write_texts(tmp_path / "train", "a", "b", "c"),
        write_texts(tmp_path / "valid", "x", "y", "z"),
        max_train_samples=2,
        max_eval_samples=1,
    )
    assert (values(data.train), values(data.validation), data.num_read) == (["a", "b"], ["x"], 3)


def test_a_limit_on_training_rows_brings_no_row_back_into_validation(tmp_path):
    """ "a" and "b" are cut from training by the limit; "a" in validation would still have been seen as shared."""
    data = load(
        write_texts(tmp_path / "train", "c", "a", "b"),
        write_texts(tmp_path / "valid", "a", "x"),
        max_train_samples=1,
    )
    assert (values(data.train), values(data.validation)) == (["c"], ["x"])


@pytest.mark.parametrize("flag", ["train_file_dir", "validation_file_dir"])
def test_a_missing_data_directory_is_a_wrong_flag_and_names_it(tmp_path, flag):
    paths = {"train_dir": write_texts(tmp_path / "train", "a"), "validation_dir": None}
    paths[flag.replace("file_", "")] = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=rf"--{flag} .*/nowhere does not exist") as refusal:
        load(**paths)
    assert refusal.value.exit_code == 2


# ---- found by an independent tester ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", ['{"text":"b",}', '{"text":"\\ud800"}', '{"text":"a","text":"b"}', '{"text":NaN}', "5"]
)
def test_a_broken_element_of_an_array_is_named_by_its_own_line(tmp_path, bad):
    (tmp_path / "a.json").write_text('[\n{"text":"a"},\n' + bad + "\n]")
    with pytest.raises(DataError, match=r"a\.json:3: "):
        read_records([tmp_path / "a.json"], parse_text, RowLog())


@pytest.mark.parametrize("end", ["", ",\n]", "]\n{}", " {}"])
def test_an_array_that_does_not_end_as_it_should_is_refused(tmp_path, end):
    (tmp_path / "a.json").write_text('[\n{"text":"a"}' + end)
    with pytest.raises(DataError, match=r"a\.json:[234]: "):
        read_records([tmp_path / "a.json"], parse_text, RowLog())


def test_reading_an_array_takes_time_in_proportion(tmp_path):
    """40,000 rows: reading counted every line from the start once, which took minutes."""
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(['{"text": "' + "x" * 100 + '"}'] * 40_000) + "\n]")
    records = read_records([tmp_path / "a.json"], parse_text, RowLog())
    assert records[-1].origin.endswith(":40001")


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.jsonl"])
@pytest.mark.parametrize("data", [b"\xef\xbb\xbf", "\u3000\n".encode()])
def test_a_file_of_nothing_visible_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=":1:"):
        read_records([tmp_path / name], parse_text, RowLog())


def test_a_file_without_rows_is_refused_behind_one_with_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(DataError, match=r"b\.json:1: the file holds no row"):
        read_records([tmp_path / "a.jsonl", tmp_path / "b.json"], parse_text, RowLog())


def test_blank_separated_documents_keep_their_indentation_and_their_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\none\n\n    indented\n    more\n")
    records = read_records([tmp_path / "a.txt"], parse_text, RowLog(), txt_documents="blank")
    assert [(r.text, r.origin.rpartition(":")[2]) for r in records] == [
        ("one", "2"),
        ("    indented\n    more", "4"),
    ]


@pytest.mark.parametrize("more", [{"history": 0}, {"history": ""}, {"system": 0}, {"system": []}])
def test_a_field_of_the_wrong_type_is_refused_also_when_it_is_falsy(tmp_path, more):
    row = {"question": "q", "response_chosen": "a", "response_rejected": "b"} | more
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=next(iter(more))):
        read_records([tmp_path / "a.jsonl"], parse_pair, RowLog())


def test_two_rows_can_always_be_held_apart():
    train, held = hold_out([Text("b", "a:1"), Text("c", "a:2")], 99.0)
    assert len(train) == len(held) == 1


def test_a_row_with_zero_width_characters_is_counted_once_and_stays_as_it_is(tmp_path):
    file = tmp_path / "a.jsonl"
    records, log = read(file, chat(("human", "a\u200b"), ("gpt", "\u200bb")), parse_chat)
    assert log.lines() == [f"zero_width_characters=1 ({file}:1)"]
    assert [message.content for message in records[0].messages] == ["a\u200b", "\u200bb"]


def test_a_wrong_value_of_an_array_ends_with_its_own_reason(tmp_path):
    """Only a broken array says that nothing behind the place was read."""
    with pytest.raises(DataError, match=r"a\.json:1: a row is a number; expected a JSON object$"):
        read(tmp_path / "a.json", '[5, {"text": "a"}]')
    with pytest.raises(DataError, match=r"nothing behind it was read\)$"):
        read(tmp_path / "a.json", '[{"text": "a"} {"text": "b"}]')
