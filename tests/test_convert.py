"""Other projects' data files become the toolkit's: expected rows are written out by hand."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import convert_dataset
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.html_text import html_to_text
from medicalgpt.tool_flags import parse_tool_arguments

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

ROOT = Path(__file__).resolve().parent.parent


def write_lines(path, rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def read_lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def convert_path(path, *flags, suffix=".jsonl"):
    """Convert a file and return the rows of the result."""
    out = path.with_name(f"{path.stem}-out{suffix}")
    convert_dataset.main(["--in_file", str(path), "--out_file", str(out), "--overwrite", "True", *flags])
    return read_lines_of(out) if suffix == ".jsonl" else json.loads(out.read_text(encoding="utf-8"))


def convert_rows(tmp_path, rows, *flags):
    return convert_path(write_lines(tmp_path / "in.jsonl", rows), *flags)


def rejects_of(path, *flags, match="rejected"):
    """Convert a file of which rows are rejected; return (rows written, rejects)."""
    with pytest.raises(DataError, match=match):
        convert_path(path, *flags)
    out = path.with_name(f"{path.stem}-out.jsonl")
    rejects = read_lines_of(Path(f"{out}.rejects.jsonl")) if Path(f"{out}.rejects.jsonl").exists() else None
    return (read_lines_of(out) if out.exists() else None), rejects


def reason_of(tmp_path, row, *flags):
    """Return why a row is rejected; a good row stands before it."""
    is_pair = {"chosen", "response_chosen"} & set(row)
    path = write_lines(tmp_path / "in.jsonl", [PAIR if is_pair else GOOD, row])
    rows, rejects = rejects_of(path, *flags)
    assert len(rows) == len(rejects) == 1
    assert rejects[0]["origin"] == f"{path}:2"
    assert rejects[0]["row"] == row
    return rejects[0]["reason"]


def turns(*texts, first="human"):
    """q, a, q, … as ShareGPT turns."""
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[index % 2], "value": text} for index, text in enumerate(texts)]


def messages(*texts):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


SYSTEM = {"from": "system", "value": "S"}
GOOD = {"conversations": turns("q", "a")}
CALL = {"name": "dose", "arguments": {"drug": "阿司匹林", "mg": 5}}
TOOLS = [{"type": "function", "function": {"name": "dose", "parameters": {}}}]
CALL_ROW = {
    "conversations": [
        SYSTEM,
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps([CALL, CALL], ensure_ascii=False)},
        {"from": "observation", "value": "r1"},
        {"from": "observation", "value": "r2"},
        {"from": "gpt", "value": "a"},
    ],
    "tools": TOOLS,
}


# ---- dialects → toolkit ------------------------------------------------------------------------------------

CHATS = {
    "the toolkit's own": (GOOD, turns("q", "a")),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, turns("q", "a")),
    "alpaca with input": ({"instruction": "q", "input": "i", "output": "a"}, turns("q\ni", "a")),
    "alpaca with history and system": (
        {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]], "system": "S"},
        [SYSTEM, *turns("q1", "a1", "q2", "a2")],
    ),
    "alpaca without last answer": (
        {"instruction": "q2", "output": "", "history": [["q1", "a1"]]},
        turns("q1", "a1", "q2"),
    ),
    "dolly": ({"instruction": "q", "context": "i", "response": "a"}, turns("q\ni", "a")),
    "qa": ({"Question": "q", "ANSWER": "a"}, turns("q", "a")),
    "qa in Chinese": ({"问题": "q", "回答": "a"}, turns("q", "a")),
    "query, response, history, system": (
        {"system": "S", "history": [["q1", "a1"]], "query": "q2", "response": "a2"},
        [SYSTEM, *turns("q1", "a1", "q2", "a2")],
    ),
    "openai": ({"messages": [{"role": "system", "content": "S"}, *messages("q", "a")]}, [SYSTEM, *turns("q", "a")]),
    "openai content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]},
        turns("q", "a"),
    ),
    "user and assistant in from": (
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        turns("q", "a"),
    ),
    "bot, role and text, under dialogue": (
        {"dialogue": [{"role": "User", "text": "q"}, {"role": "bot", "text": "a"}]},
        turns("q", "a"),
    ),
    "role and value under dialog": (
        {"dialog": [{"role": "human", "value": "q"}, {"role": "gpt", "value": "a"}]},
        turns("q", "a"),
    ),
    "rounds": ({"conversation": [{"assistant": "a", "human": "q"}, {"human": "q2", "assistant": "a2"}]}, turns("q", "a", "q2", "a2")),
    "pairs": ({"conversation": [["q", "a"], ["q2", "a2"]]}, turns("q", "a", "q2", "a2")),
    "system beside": ({"system": "S", "conversations": turns("q", "a")}, [SYSTEM, *turns("q", "a")]),
    "an unanswered last question stays": ({"conversations": turns("q", "a", "q2")}, turns("q", "a", "q2")),
    "json text in a cell": ({"conversations": json.dumps(turns("q", "a"))}, turns("q", "a")),
    "tags in one text": ({"conversations": "<user>: q1 <bot>: a1 <user>: q2 <bot>: a2"}, turns("q1", "a1", "q2", "a2")),
    "Chinese speakers on lines": ({"dialog": "用户：q1\n助手：a1\n第二行\n用户：q2\n助手：a2"}, turns("q1", "a1\n第二行", "q2", "a2")),
    "问 and 答 in one line": ({"dialog": "问：头痛怎么办？答：休息。问：多久？答：一天"}, turns("头痛怎么办？", "休息。", "多久？", "一天")),
    "Human and Assistant": ({"conversations": "\n\nHuman: q1\n\nAssistant: a1 and b\n"}, turns("q1", "a1 and b")),
    "packed history": (
        {"history": "<user>: q1 <bot>: a1", "instruction": "q2", "output": "a2"},
        turns("q1", "a1", "q2", "a2"),
    ),
    "a prompt that ends with the mark of an answer": (
        {"prompt": "Human: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:", "response": "a2"},
        turns("q1", "a1", "q2", "a2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_of_every_dialect_becomes_conversations(tmp_path, name):
    row, expected = CHATS[name]
    assert convert_rows(tmp_path, [row]) == [{"conversations": expected}]


def test_rows_of_all_dialects_may_stand_in_one_file(tmp_path):
    rows = convert_rows(tmp_path, [row for row, _ in CHATS.values()])
    assert rows == [{"conversations": expected} for _, expected in CHATS.values()]


@pytest.mark.parametrize("flags", [(), ("--data_type", "json2jsonl")])
def test_a_row_of_another_kind_than_most_is_a_reject(tmp_path, flags):
    """No stage reads a file of two kinds."""
    path = write_lines(tmp_path / "in.jsonl", [GOOD, {"text": "t"}, GOOD, PAIR])
    rows, rejects = rejects_of(path, *flags)
    assert rows == [GOOD, GOOD]
    assert [(one["origin"], one["reason"].partition(";")[0]) for one in rejects] == [
        (f"{path}:2", "is a text row among chat rows"),
        (f"{path}:4", "is a pair row among chat rows"),
    ]


PAIR = {"question": "q", "response_chosen": "c", "response_rejected": "r"}
PAIRS = {
    "the toolkit's own": (
        {"system": "S", "history": [["q1", "a1"]], **PAIR},
        {"system": "S", "history": [["q1", "a1"]], **PAIR},
    ),
    "empty system and history": ({"system": "", "history": [], **PAIR}, PAIR),
    "conversations": ({"conversations": turns("q"), "chosen": "c", "rejected": "r"}, PAIR),
    "conversations with history": (
        {"conversations": [SYSTEM, *turns("q1", "a1", "q")], "chosen": "c", "rejected": "r"},
        {"system": "S", "history": [["q1", "a1"]], **PAIR},
    ),
    "answers as turns": (
        {"conversations": turns("q"), "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
        PAIR,
    ),
    "prompt": ({"prompt": "q", "chosen": "c", "rejected": "r"}, PAIR),
    "instruction and input": ({"instruction": "q", "input": "i", "chosen": "c", "rejected": "r"}, {**PAIR, "question": "q\ni"}),
    "TRL": ({"prompt": messages("q"), "chosen": messages("q", "c")[1:], "rejected": messages("q", "r")[1:]}, PAIR),
    "TRL with the prompt in the answers": ({"chosen": messages("q", "c"), "rejected": messages("q", "r")}, PAIR),
    "prompt beside whole conversations": (
        {"prompt": "q", "chosen": messages("q", "c"), "rejected": messages("q", "r")},
        PAIR,
    ),
    "system beside whole conversations": (
        {"system": "S", "chosen": messages("q", "c"), "rejected": messages("q", "r")},
        {"system": "S", **PAIR},
    ),
    "common prefix of several turns": (
        {"chosen": messages("q1", "a1", "q", "c"), "rejected": messages("q1", "a1", "q", "r")},
        {"history": [["q1", "a1"]], **PAIR},
    ),
    "two packed texts": (
        {"chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q\n\nAssistant: r"},
        {"history": [["q1", "a1"]], **PAIR},
    ),
    "an answer that is a call": (
        {"messages": messages("q"), "chosen": {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": {"name": "dose", "arguments": json.dumps(CALL["arguments"])}}]}, "rejected": "r", "tools": TOOLS},
        {"conversations": turns("q"), "chosen": {"from": "function_call", "value": json.dumps(CALL, ensure_ascii=False)}, "rejected": "r", "tools": TOOLS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_every_form_becomes_question_and_two_answers(tmp_path, name):
    row, expected = PAIRS[name]
    assert convert_rows(tmp_path, [row]) == [expected]


def test_other_fields_are_kept_and_one_whose_name_is_taken_is_named(tmp_path, caplog):
    row = {
        "question": "q",
        "answer": "a",
        "department": "心血管科",
        "n": 3,
        "messages": None,
        "history": None,
    }
    assert convert_rows(tmp_path, [row]) == [
        {"conversations": turns("q", "a"), "department": "心血管科", "n": 3}
    ]
    row = {"instruction": "q", "output": "a", "chosen": "x"}
    assert convert_rows(tmp_path, [row]) == [{"conversations": turns("q", "a")}]
    assert "not kept" in caplog.text
    assert "chosen (1 rows)" in caplog.text


def test_text_is_a_conversation_only_where_the_user_says_so(tmp_path):
    row = {"text": "问：q\n答：a"}
    assert convert_rows(tmp_path, [row]) == [row]
    assert convert_rows(tmp_path, [row], "--data_type", "sharegpt") == [{"conversations": turns("q", "a")}]


def test_json2jsonl_keeps_rows_as_they_are(tmp_path):
    rows = [{"messages": messages("q", "a"), "anything": [1, None]}, {"instruction": "q", "output": "a"}]
    path = tmp_path / "in.json"
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert convert_path(path, "--data_type", "json2jsonl") == rows
    assert convert_path(path, "--data_type", "json2jsonl", suffix=".json") == rows


def test_json2jsonl_writes_no_row_that_the_stages_would_refuse(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a"}, {"anything": 1}, {"text": ""}])
    written, (first, second) = rejects_of(path, "--data_type", "json2jsonl")
    assert written == [{"text": "a"}]
    assert (first["origin"], second["origin"]) == (f"{path}:2", f"{path}:3")
    assert "no known kind of row, it has anything" in first["reason"]
    assert "text: is empty" in second["reason"]


# ---- and back ----------------------------------------------------------------------------------------------


def test_calls_and_results_become_openai_messages_with_ids(tmp_path):
    (row,) = convert_rows(tmp_path, [CALL_ROW], "--to", "openai")
    arguments = json.dumps(CALL["arguments"], ensure_ascii=False)
    calls = [
        {"id": id_, "type": "function", "function": {"name": "dose", "arguments": arguments}}
        for id_ in ("call00200", "call00201")
    ]
    assert row == {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "r1", "tool_call_id": "call00200"},
            {"role": "tool", "content": "r2", "tool_call_id": "call00201"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": TOOLS,
    }


@pytest.mark.parametrize("form", ["openai", "alpaca"])
def test_conversations_come_back_whole(tmp_path, form):
    rows = [{"conversations": expected, "id": name} for name, (_, expected) in CHATS.items()]
    if form == "alpaca":
        rows = [row for row in rows if row["conversations"][-1]["from"] == "gpt"]
    rows += [CALL_ROW] if form == "openai" else []
    assert convert_rows(tmp_path, convert_rows(tmp_path, rows, "--to", form)) == rows


@pytest.mark.parametrize("form", ["openai", "alpaca"])
def test_pairs_come_back_whole(tmp_path, form):
    rows = [{**expected, "id": name} for name, (_, expected) in PAIRS.items() if "tools" not in expected]
    rows += [PAIRS["an answer that is a call"][1]] if form == "openai" else []
    assert convert_rows(tmp_path, convert_rows(tmp_path, rows, "--to", form)) == rows


def test_a_question_without_answer_is_no_alpaca_row(tmp_path):
    assert "output: is empty" in reason_of(
        tmp_path, {"conversations": turns("q", "a", "q2")}, "--to", "alpaca"
    )


def test_openai_messages_come_back_as_they_were(tmp_path):
    (calls,) = convert_rows(tmp_path, [CALL_ROW], "--to", "openai")
    pair = {"messages": messages("q"), "chosen": messages("q", "c")[1], "rejected": messages("q", "r")[1]}
    for rows in ([{"messages": messages("q", "a", "q2"), "id": 1}, calls], [pair]):
        assert convert_rows(tmp_path, convert_rows(tmp_path, rows), "--to", "openai") == rows


def test_alpaca_rows_are_written_with_history_and_system(tmp_path):
    row = {"conversations": [SYSTEM, *turns("q1", "a1", "q2", "a2")], "id": 7}
    assert convert_rows(tmp_path, [row], "--to", "alpaca") == [
        {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]], "system": "S", "id": 7}
    ]


@pytest.mark.parametrize("row", [CALL_ROW, {"conversations": [{"from": "system", "value": ""}, *turns("q", "a")]}, {"text": "t"}])  # fmt: skip
def test_what_alpaca_cannot_hold_is_rejected(tmp_path, row):
    assert reason_of(tmp_path, row, "--to", "alpaca")


# ---- rejects -----------------------------------------------------------------------------------------------

BAD_ROWS = {
    "two answers in a row": ({"conversations": [*turns("q", "a"), {"from": "gpt", "value": "b"}]}, "must alternate"),
    "two questions in a row": ({"messages": [*messages("q"), *messages("q2", "a")]}, "must alternate"),
    "an answer first": ({"conversations": turns("a", "q", "a", first="gpt")}, "must alternate"),
    "an unknown role": ({"conversations": [*turns("q"), {"from": "医生", "value": "a"}]}, "is '医生'; expected human"),
    "no role": ({"conversations": [{"value": "q"}]}, "names no role"),
    "two texts": ({"conversations": [{"from": "human", "value": "q", "content": "p"}]}, "both value and content"),
    "no answer at all": ({"conversations": turns("q")}, "row_without_answer"),
    "an empty answer": ({"question": "q", "answer": " "}, "answer: is empty"),
    "a number for an answer": ({"question": "q", "answer": 5}, "answer: is a number"),
    "two systems": ({"system": "T", "conversations": [SYSTEM, *turns("q", "a")]}, "differs"),
    "equal answers": ({"prompt": "q", "chosen": "c", "rejected": "c"}, "identical_answers"),
    "no prompt": ({"chosen": "c", "rejected": "r"}, "prompt: missing"),
    "another prompt": ({"prompt": "p", "chosen": messages("q", "c"), "rejected": messages("q", "r")}, "another prompt"),
    "answers of several turns": ({"chosen": messages("q", "c", "x", "y"), "rejected": messages("q", "r")}, "more than"),
    "unknown fields": ({"foo": "q", "bar": "a"}, "foo, bar"),
    "two questions' fields": ({"question": "q", "query": "p", "answer": "a"}, "question and query"),
    "text without marks": ({"conversations": "hello"}, "without role marks"),
    "text beside a call": (
        {"messages": [*messages("q"), {"role": "assistant", "content": "let me see", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]},
        "beside its call",
    ),
    "results in another order": (
        {"messages": [*messages("q"), {"role": "assistant", "content": "", "tool_calls": [{"id": id_, "function": {"name": "f", "arguments": "{}"}} for id_ in "xy"]}, {"role": "tool", "content": "r", "tool_call_id": "y"}, {"role": "tool", "content": "r", "tool_call_id": "x"}, {"role": "assistant", "content": "a"}]},
        "order of their calls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_converted_is_kept_with_its_reason(tmp_path, name):
    row, reason = BAD_ROWS[name]
    assert reason in reason_of(tmp_path, row)


def test_broken_lines_are_rejects_by_their_true_number(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [GOOD, "\n", "{broken\n", "[1]\n", GOOD])
    rows, rejects = rejects_of(path)
    assert rows == [GOOD, GOOD]
    assert [(reject["origin"], reject["row"]) for reject in rejects] == [
        (f"{path}:3", "{broken"),
        (f"{path}:4", [1]),
    ]


def test_a_cut_off_array_gives_what_stands_before_the_cut(tmp_path):
    path = tmp_path / "in.json"
    path.write_text(f"[\n{json.dumps(GOOD)},\n{json.dumps(GOOD)},\n{{", encoding="utf-8")
    rows, (reject,) = rejects_of(path)
    assert rows == [GOOD, GOOD]
    assert reject["origin"] == f"{path}:4"
    assert "nothing behind it was read" in reject["reason"]


def test_only_rejects_are_written_when_no_row_converts(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"conversations": turns("q")}])
    rows, (reject,) = rejects_of(path, match="none of 1 rows.*1 × row_without_answer.*rejects")
    assert rows is None
    assert reject["origin"] == f"{path}:1"


def test_counts_by_reason_are_said_in_one_line(tmp_path):
    unanswered = {"conversations": turns("q")}
    path = write_lines(tmp_path / "in.jsonl", [GOOD, unanswered, unanswered, "{\n"])
    with pytest.raises(
        DataError,
        match=r"3 of 4 rows were rejected: 2 × row_without_answer.*, 1 × a JSON value that runs over several lines",
    ) as info:
        convert_path(path)
    assert "\n" not in str(info.value)


def test_the_rejects_of_an_older_run_go_when_everything_converts(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [GOOD, "{\n"])
    rejects_of(path)
    assert convert_path(write_lines(path, [GOOD])) == [GOOD]
    assert sorted(os.listdir(tmp_path)) == ["in-out.jsonl", "in.jsonl"]


# ---- tables and encodings ----------------------------------------------------------------------------------

HEADER = ["department", "title", "ask", "answer"]
TABLE = [
    ["心血管科", "高血压", "高血压患者能吃\n党参吗？", '他说"可以"，请问医生'],
    ["", "long", "q2, with comma", "120"],
]
EXPECTED = [
    {"conversations": turns(ask, answer), "department": department, "title": title}
    for department, title, ask, answer in TABLE
]


def write_table(path, encoding="utf-8", delimiter=",", rows=TABLE):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([HEADER, *rows])
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
def test_a_table_gives_the_same_rows_in_every_encoding(tmp_path, encoding, caplog):
    caplog.set_level("INFO", "medicalgpt")
    assert convert_path(write_table(tmp_path / "t.csv", encoding)) == EXPECTED
    said = "gb18030" if encoding == "gbk" else encoding
    assert f"detected qa: columns ask -> question, answer -> answer; encoding {said}" in caplog.text


def test_json_in_gb18030_is_read_as_lines_and_as_array(tmp_path):
    rows = [{"问题": "头痛怎么办", "答案": "多休息"}] * 2
    expected = [{"conversations": turns("头痛怎么办", "多休息")}] * 2
    (tmp_path / "a.jsonl").write_bytes(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("gb18030")
    )
    (tmp_path / "b.json").write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode("gb18030"))
    assert convert_path(tmp_path / "a.jsonl") == convert_path(tmp_path / "b.json") == expected


@pytest.mark.parametrize("suffix, delimiter", [(".tsv", "\t"), (".csv", ";")])
def test_cells_may_be_parted_by_other_characters(tmp_path, suffix, delimiter):
    assert convert_path(write_table(tmp_path / f"t{suffix}", delimiter=delimiter)) == EXPECTED


def test_a_workbook_gives_the_rows_of_the_csv(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(HEADER)
    for row in TABLE:
        book.active.append([cell or None for cell in row])
    book.active["D3"] = 120  # a number, as Excel makes of it
    book.save(tmp_path / "t.xlsx")
    assert convert_path(tmp_path / "t.xlsx") == EXPECTED


def test_a_parquet_file_gives_the_rows_of_the_csv(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row[index] or None for row in TABLE] for index, name in enumerate(HEADER)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet", row_group_size=1)
    assert convert_path(tmp_path / "t.parquet") == EXPECTED


def test_nested_parquet_rows_are_conversations(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {
        "messages": [
            {"role": "user", "content": "q", "weight": None},
            {"role": "assistant", "content": "a", "weight": 1},
        ]
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    (converted,) = convert_path(tmp_path / "t.parquet")
    assert converted == {"conversations": [turns("q")[0], {"from": "gpt", "value": "a", "weight": 1}]}


def test_a_text_that_is_in_no_encoding_is_refused_by_its_line(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"ask,answer\nq,caf\xe9\n")
    with pytest.raises(DataError, match=r"t\.csv:2: byte 0xe9 does not decode as utf-8 and .*--encoding"):
        convert_path(path)
    assert convert_path(path, "--encoding", "latin-1") == [{"conversations": turns("q", "café")}]


def test_latin_text_is_not_taken_for_chinese(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("ask,answer\nSchön warm,Größe wählen\n".encode("latin-1"))
    with pytest.raises(DataError, match="does not decode as utf-8"):
        convert_path(path)


def test_ambiguous_columns_are_refused_with_names_and_flags(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("question,query,answer\nq,p,a\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"question and query.*question, query, answer.*--question_column"):
        convert_path(path)
    assert convert_path(path, "--question_column", "query") == [
        {"conversations": turns("p", "a"), "question": "q"}
    ]


def test_unknown_columns_are_refused_with_names_and_flags(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("Frage,Antwort,Rolle\nq,a,S\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Frage, Antwort, Rolle.*--question_column"):
        convert_path(path)
    flags = ["--question_column", "Frage", "--answer_column", "Antwort", "--system_column", "Rolle"]
    assert convert_path(path, *flags) == [{"conversations": [SYSTEM, *turns("q", "a")]}]
    with pytest.raises(ConfigError, match="no question column 'Fragen'"):
        convert_path(path, "--question_column", "Fragen", *flags[2:])


def test_csv_rejects_are_named_by_the_line_where_the_row_begins(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('ask,answer\n"q\n1","a\n1"\n\nq2\nq3,"a" b\nq4,a4\nq5,"open\nq6,a6\n', encoding="utf-8")
    rows, rejects = rejects_of(path)
    assert rows == [{"conversations": turns("q\n1", "a\n1")}, {"conversations": turns("q4", "a4")}]
    assert [(reject["origin"], reject["row"]) for reject in rejects] == [
        (f"{path}:6", ["q2"]),
        (f"{path}:7", 'q3,"a" b\n'),
        (f"{path}:9", 'q5,"open\nq6,a6\n'),
    ]
    for reject, reason in zip(
        rejects, ["1 cells", "closing quote", "never closed (lines 9 to 10"], strict=True
    ):
        assert reason in reject["reason"]


def test_a_column_without_name_is_kept_where_it_holds_something(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("ask,answer,\nq,a,\nq,a,note\n", encoding="utf-8")
    row = {"conversations": turns("q", "a")}
    assert convert_path(path) == [row, {**row, "column_3": "note"}]


@pytest.mark.parametrize("header", ["ask,ask,answer", '"ask,answer'])
def test_a_header_that_cannot_be_used_is_refused(tmp_path, header):
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\nq,a,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.csv:1: the header"):
        convert_path(path)


def test_a_json_file_may_hold_lines(tmp_path):
    assert convert_path(write_lines(tmp_path / "in.json", [GOOD, GOOD])) == [GOOD, GOOD]
    (tmp_path / "in.json").write_text(json.dumps(GOOD, indent=1), encoding="utf-8")
    with pytest.raises(DataError, match="must hold one array of objects"):
        convert_path(tmp_path / "in.json")


@pytest.mark.parametrize("name", ["t.xlsx", "t.parquet", "t.jsonl", "t.xls"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match=r"is no \.xlsx|is no parquet|is gzip|is a \.xls file"):
        convert_path(tmp_path / name)


def test_a_number_that_json_cannot_hold_is_a_reject(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [GOOD, '{"text": "t", "n": 1e400}\n'])
    rows, (reject,) = rejects_of(path)
    assert rows == [GOOD]
    assert reject["row"] == '{"text": "t", "n": 1e400}'


def test_a_long_cell_is_read(tmp_path):
    path = write_table(tmp_path / "t.csv", rows=[["d", "t", "q", "a" * 300_000]])
    assert convert_path(path)[0]["conversations"][1]["value"] == "a" * 300_000


# ---- HTML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "html, text",
    [
        ("<p>one</p><p>two &amp; three</p>", "one\n\ntwo & three"),
        ("a<br/>b<br>c", "a\nb\nc"),
        ("<script>x<y</script><b>bold</b>&nbsp;&lt;b&gt;", "bold <b>"),
        ("pH < 7 and x<5", "pH < 7 and x<5"),
        ("<think>why</think>so", "<think>why</think>so"),
        ("plain", "plain"),
        ("how to use <title> tag in my page?", "how to use <title> tag in my page?"),
        ("if(a<b && c>d) return;", "if(a<b && c>d) return;"),
        ("HbA1c<b and LDL>c", "HbA1c<b and LDL>c"),
        ("url?a=1&copy=2", "url?a=1&copy=2"),
        ("<think>x</think> a &lt; b", "<think>x</think> a < b"),
        ("<p>头痛<br/>怎么办&nbsp;好</p><script>x<y</script>", "头痛\n怎么办 好"),
        ('<a href="h?x=1" target=_blank>l</a><IMG SRC=x hidden>', "l"),
    ],
)
def test_html_becomes_what_a_reader_sees(html, text):
    assert html_to_text(html) == text


def test_html_is_stripped_from_texts_only_on_request(tmp_path):
    row = {"question": "<p>q</p>", "answer": "a&lt;b"}
    assert convert_rows(tmp_path, [row]) == [{"conversations": turns("<p>q</p>", "a&lt;b")}]
    assert convert_rows(tmp_path, [row], "--strip_html") == [{"conversations": turns("q", "a<b")}]
    assert convert_rows(tmp_path, [CALL_ROW], "--strip_html") == [CALL_ROW]


# ---- files and flags ---------------------------------------------------------------------------------------


def test_an_existing_file_is_refused_without_overwrite(tmp_path):
    path, out = write_lines(tmp_path / "a.jsonl", [GOOD]), tmp_path / "b.jsonl"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"b\.jsonl exists.*--overwrite True"):
        convert_dataset.main(["--in_file", str(path), "--out_file", str(out)])
    assert out.read_text(encoding="utf-8") == "mine"


def test_the_input_is_never_replaced(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD])
    rejects = write_lines(tmp_path / "b.jsonl.rejects.jsonl", [GOOD])
    for source, target in ((path, path), (path, tmp_path / "." / "a.jsonl"), (rejects, tmp_path / "b.jsonl")):
        with pytest.raises(ConfigError, match="would replace"):
            convert_dataset.main(["--in_file", str(source), "--out_file", str(target), "--overwrite", "True"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out_file", "x.csv"], r"expected \.jsonl or \.json"),
        (["--out_file", "missing/x.jsonl"], "no directory"),
        (["--in_file", "missing.jsonl"], "does not exist"),
        (["--data_type", "dpo", "--question_column", "q"], "are for qa"),
        (["--data_type", "json2jsonl", "--to", "openai"], "keeps rows"),
        (["--encoding", "nope"], "--encoding nope"),
        (["--to", "nope"], "invalid choice: 'nope'"),
        (["--in-file", "x"], "did you mean --in_file?"),
        (["--strip_html", "maybe"], "expected True or False"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as info:
        convert_dataset.main(["--in_file", "a.jsonl", "--out_file", "b.jsonl", *flags])
    assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    path, calls = write_lines(tmp_path / "a.jsonl", [GOOD, "{\n", GOOD, GOOD]), []

    def interrupted(*values):
        calls.append(values)
        if len(calls) > 2:
            assert len(os.listdir(tmp_path)) == 3  # two files are being written
            raise KeyboardInterrupt
        return GOOD

    monkeypatch.setattr(convert_dataset, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_path(path)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_the_script_ends_with_3_where_a_row_was_rejected_and_answers_help_at_once(tmp_path):
    write_lines(tmp_path / "a.jsonl", [GOOD, {"foo": 1}])
    script = [sys.executable, str(ROOT / "convert_dataset.py")]
    done = subprocess.run(
        [*script, "--in_file", "a.jsonl", "--out_file", "b.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: a.jsonl: 1 of 2 rows were rejected")
    begin = time.monotonic()
    done = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 2
    assert "--question_column" in done.stdout
    assert "(default: auto)" in " ".join(done.stdout.split())


def test_tool_flags_read_numbers_and_leave_defaults():
    import dataclasses

    @dataclasses.dataclass
    class Flags:
        path: str
        count: int = dataclasses.field(default=3, metadata={"help": "how many"})
        share: float | None = None
        dry: bool = False

    assert parse_tool_arguments(Flags, ["--path", "x"], "") == Flags("x")
    assert parse_tool_arguments(Flags, ["--path=x", "--count", "4", "--share", "0.5", "--dry"], "") == Flags(
        "x", 4, 0.5, True
    )
    with pytest.raises(ConfigError, match="required: --path"):
        parse_tool_arguments(Flags, [], "")
    with pytest.raises(ConfigError, match="--count: invalid int value"):
        parse_tool_arguments(Flags, ["--path", "x", "--count", "many"], "")


# ---- forms of well-known data sets -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "instruction": "Human: 头痛\nAssistant: 多久了\nHuman: 三天\nAssistant:",
                "input": "",
                "output": "看医生",
            },
            {"conversations": turns("头痛", "多久了", "三天", "看医生")},
        ),
        (
            {"data": ["问：头痛", "答：多久了", "问：三天", "答：看医生"]},
            {"conversations": turns("头痛", "多久了", "三天", "看医生")},
        ),
        (
            {"text": "<user>: 头痛 <bot>: 多久了 <user>: 三天 <bot>: 看医生"},
            {"conversations": turns("头痛", "多久了", "三天", "看医生")},
        ),
        ({"input": "q", "output": "a"}, {"conversations": turns("q", "a")}),
        (
            {"instruction": "q", "input": "i", "output": ["good", "bad"]},
            {"question": "q\ni", "response_chosen": "good", "response_rejected": "bad"},
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            {"conversations": [{"from": "system", "value": "s"}, *turns("q", "a")]},
        ),
    ],
    ids=["belle", "huatuogpt", "tagged-text", "input-output", "comparison", "developer"],
)
def test_forms_of_well_known_data_sets_are_recognised(tmp_path, row, expected):
    assert convert_rows(tmp_path, [row]) == [expected]


def test_a_text_that_only_quotes_a_dialogue_stays_a_text(tmp_path):
    row = {"text": "The form <user>: … <bot>: … was used before.\n问：什么是发烧？\n答：体温升高。"}
    assert convert_rows(tmp_path, [row]) == [row]


# ---- what looks like HTML, workbooks and columns without values --------------------------------------------


def test_sheets_that_are_not_read_are_named(tmp_path, caplog):
    book = openpyxl.Workbook()
    book.active.title = "empty"
    for title, answer in (("one", "a"), ("two", "b")):
        sheet = book.create_sheet(title)
        sheet.append(["question", "answer"])
        sheet.append(["q", answer])
    book.save(tmp_path / "t.xlsx")
    with caplog.at_level("WARNING", logger="medicalgpt"):
        assert convert_path(tmp_path / "t.xlsx") == [{"conversations": turns("q", "a")}]
    assert "sheet one is read; two are not" in caplog.text


def test_a_missing_number_of_a_parquet_table_is_no_value(tmp_path):
    table = pyarrow.table({"question": ["q"], "answer": ["a"], "score": [float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert convert_path(tmp_path / "t.parquet") == [{"conversations": turns("q", "a"), "score": None}]


def test_an_input_beside_another_question_is_not_lost(tmp_path):
    row = {"instruction": "Translate", "input": "Hello", "response": "Bonjour"}
    assert convert_rows(tmp_path, [row]) == [{"conversations": turns("Translate\nHello", "Bonjour")}]
    assert "input: stands beside prompt" in reason_of(tmp_path, {"prompt": "p", "input": "i", "output": "o"})


def test_a_system_column_may_lack_values_but_not_be_missing(tmp_path):
    rows = [{"q": "q", "a": "a", "S": "s"}, {"q": "q", "a": "a", "S": None}, {"q": "q", "a": "a"}]
    path = write_lines(tmp_path / "in.jsonl", rows)
    system = {"from": "system", "value": "s"}
    assert convert_path(path, "--system_column", "s") == [
        {"conversations": [system, *turns("q", "a")]},
        {"conversations": turns("q", "a"), "S": None},
        {"conversations": turns("q", "a")},
    ]
    with pytest.raises(ConfigError, match="--system_column t: none of the first 3 rows has such a column"):
        convert_path(path, "--system_column", "t", "--overwrite")
