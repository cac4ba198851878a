"""Faults of validate_jsonl.py that an independent tester found, each with the smallest file that shows it."""

import json
import tracemalloc
from pathlib import Path

import pytest
from test_validate import (
    CHINESE,
    QA,
    TEXT,
    called,
    line,
    openai,
    place,
    read_array,
    share,
    stage,
    validate,
    write,
)
from test_validate_fix import QA2, rejects


def found(reason: str, *values) -> object:
    return pytest.param(*values, id=reason)


DEEP = '{"text": "b", "x": ' + "[" * 950 + "]" * 950 + "}"
ESCAPED = '{"name": "f", "arguments": {"x": "\\u003c|im_end|\\u003e"}}'
ZH = (CHINESE + "。") * 20
# fmt: off
UNREFUSED = [
    found("content beside tool_calls may be a number: TypeError", line(**called(content=5)), 1, "messages[1].content: is a number"),
    found("content beside tool_calls may be a list: accepted", line(**called(content=["x"])), 1, "messages[1].content: is a list"),
    found("a call nested too deeply: RecursionError", share("human q", "function_call " + "[" * 100_000, "observation r", "gpt a"), 1, "nested"),
    found("half a surrogate pair in a call's arguments: accepted", share("human q", 'function_call {"name": "f", "arguments": {"x": "\\ud800"}}', "observation r", "gpt a"), 1, "surrogate"),
    found("NaN in a call's arguments: accepted", share("human q", 'function_call {"name": "f", "arguments": {"x": NaN}}', "observation r", "gpt a"), 1, "NaN"),
    found("an escaped marker in a call's arguments: accepted", share("human q", f"function_call {ESCAPED}", "observation r", "gpt a"), 1, "marker"),
    found("a text of zero-width characters only: accepted", TEXT + line(text="\u200b"), 2, "text: is empty"),
    found("UTF-16 without a mark, mostly Chinese: a stray byte", line(text=ZH).encode("utf-16-le"), 1, "UTF-16"),
    found("GBK in traditional characters: a stray byte", line(text="發熱是體溫高於正常範圍,請多喝水並注意休息").encode("gbk"), 1, "GBK"),
]
UNMENDED = [
    found("a number beyond floats: Infinity is written", "a.jsonl", TEXT + '{"text": "b", "x": 1e999}', None),
    found("a blank .txt: blank lines count as rows", "a.txt", "   \n", None),
    found("a deep row: RecursionError, empty files stay", "a.jsonl", TEXT + DEEP, None),
    found("UTF-16 that is cut off: UnicodeDecodeError, empty files stay", "a.jsonl", (TEXT * 2).encode("utf-16")[:-3], TEXT),
    found("UTF-16 with half a surrogate pair: UnicodeDecodeError", "a.jsonl", TEXT.encode("utf-16") + b"\x41\xd8\n\0", TEXT),
    found("UTF-16 without a mark, mostly Chinese: all rejected", "a.jsonl", line(text=ZH).encode("utf-16-le"), line(text=ZH)),
    found("a good array whose rows begin behind `}, `: all rejected", "a.json", '[{\n  "text": "a"\n}, {\n  "text": "a"\n}]', TEXT * 2),
    found("a good array indented by 0: all rejected", "a.json", json.dumps([json.loads(QA)], indent=0), QA),
    found("a good row of an array on two lines: rejected", "a.json", f'[{{"text":\n"a"}},\n{TEXT}]', TEXT * 2),
    found("a line `{` swallows all rows behind it", "a.jsonl", TEXT + "{\n" + TEXT * 3, TEXT * 4),
    found("a mark at the head of a later line: rejected", "a.jsonl", TEXT + "\ufeff" + TEXT, TEXT * 2),
    found("conversations are cut to the length of messages", "a.jsonl", line(**json.loads(openai("user q", "assistant a")), **json.loads(QA2)), line(**json.loads(openai("user q", "assistant a")), **json.loads(QA2))),
    found("1 and true count as equal values of one key", "a.jsonl", TEXT + '{"text": "b", "x": 1, "x": true}', TEXT),
]
# fmt: on


@pytest.mark.parametrize(("content", "number", "fault"), UNREFUSED)
def test_what_no_stage_can_use_is_refused_for_what_it_is(tmp_path, content, number, fault):
    path = write(tmp_path, content, "a.jsonl")
    code, message = validate(path)
    assert (code, place(path, message), fault in message) == (3, str(number), True)
    kind = "chat" if b"messages" in path.read_bytes() or b"conversations" in path.read_bytes() else "text"
    assert place(path, stage(path, kind)) == str(number)


@pytest.mark.parametrize(("name", "content", "expected"), UNMENDED)
def test_what_is_written_validates_and_holds_every_good_row(tmp_path, name, content, expected):
    target = tmp_path / f"b{Path(name).suffix.replace('.json', '.jsonl')[:6]}"
    validate(write(tmp_path, content, name), "--fix", target)
    assert expected is None or target.read_text() == expected
    assert not target.exists() or validate(target) == (0, "")


@pytest.mark.parametrize("content", ['[{"text": "a",}]', '[{"text": nul}]'])
def test_broken_json_at_the_end_of_a_whole_array_is_not_called_cut_off(tmp_path, content):
    assert "broken JSON" in validate(write(tmp_path, content, "a.json"))[1]


def test_the_column_of_a_stray_byte_counts_from_the_begin_of_its_line(tmp_path):
    """Before it stand a bracket, 60,000 rows of 22 characters with their commas, and nine characters."""
    content = b"[" + b'{"text":"aaaaaaaaaa"},' * 60_000 + b'{"text":"\xff"}]'
    assert "(column 1320011:" in validate(write(tmp_path, content, "a.json"))[1]


def test_rows_before_a_stray_byte_of_an_array_are_read(tmp_path, capsys):
    path = write(tmp_path, b'[{"text": 5},\n{"text": "b"},\n{"text": "\xff"}]', "a.json")
    assert place(path, validate(path)[1]) == "1"


def test_files_of_one_name_and_two_suffixes_are_not_mended_into_one(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", f"[{TEXT}]", "a.json")
    write(tmp_path / "in", TEXT, "a.jsonl")
    code, _ = validate(tmp_path / "in", "--fix", tmp_path / "out")
    assert code == 2 or len(list((tmp_path / "out").iterdir())) == 2


def test_an_interrupted_mend_leaves_nothing_under_the_targets_name(tmp_path, monkeypatch):
    path = write(tmp_path, TEXT * 2, "a.jsonl")
    monkeypatch.setattr("medicalgpt.row_fixer.mend_row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        validate(path, "--fix", tmp_path / "b.jsonl")
    assert list(tmp_path.iterdir()) == [path]


def test_rejects_that_exist_are_not_overwritten_unasked(tmp_path):
    path, mine = write(tmp_path, TEXT + "{}", "a.jsonl"), write(tmp_path, "mine", "b.jsonl.rejects.jsonl")
    validate(path, "--fix", tmp_path / "b.jsonl")
    assert mine.read_text() == "mine"


def test_a_bad_file_to_compare_with_stays_bad_beside_a_mend(tmp_path):
    path, other = write(tmp_path, TEXT, "a.jsonl"), write(tmp_path, '{"text": 5}', "o.jsonl")
    assert validate(path, "--against", other, "--fix", tmp_path / "b.jsonl")[0] == 3


def test_a_report_in_a_directory_that_is_missing_is_written_or_refused_as_a_flag(tmp_path):
    path = write(tmp_path, TEXT, "a.jsonl")
    assert validate(path, "--report", tmp_path / "new" / "r.json")[0] in (0, 2)


def test_a_reject_holds_the_line_as_it_stands(tmp_path):
    cut = QA.strip()[:-1]
    validate(write(tmp_path, QA + cut, "a.jsonl"), "--fix", tmp_path / "b.jsonl")
    assert rejects(tmp_path / "b.jsonl")[0]["row"] == cut


def test_an_empty_file_is_named_empty_by_the_mend_as_well(tmp_path):
    path = write(tmp_path, "", "a.jsonl")
    assert validate(path, "--fix", tmp_path / "b.jsonl")[1].startswith(f"{path}:1: the file is empty")


@pytest.mark.parametrize(
    "row", [share("r" * 9000 + " q"), line(**{"k" * 9000: 1}), line(**{"a\nb\x1b[31m": 1})]
)
def test_a_problem_is_one_line_of_a_length_that_can_be_read(tmp_path, row):
    message = validate(write(tmp_path, QA + row, "a.jsonl"))[1]
    assert len(message) < 1000 and message.isprintable()


def test_a_large_array_on_one_line_is_mended_in_little_memory(tmp_path):
    row = json.dumps({"text": "x" * 984})
    path = write(tmp_path, f"[{','.join([row] * 10_000)}]", "a.json")
    tracemalloc.start()
    try:
        assert validate(path, "--fix", tmp_path / "b.jsonl") == (0, "")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_a_number_over_the_border_of_two_chunks_is_one_number(tmp_path, monkeypatch):
    monkeypatch.setattr("medicalgpt.json_array.CHUNK_BYTES", 3)
    assert read_array(write(tmp_path, "[1.5, 2]", "a.json")) == ([1.5, 2], "")
