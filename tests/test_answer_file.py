"""A file of prompts: continued where it was stopped, refused when something changed, the same for any number of ranks."""

import json
import subprocess
import sys
from pathlib import Path

import inference
from medicalgpt import answer_file
from medicalgpt.errors import ConfigError, DataError

import pytest
from conftest import write_jsonl

ROWS = [{"prompt": f"Question {i}: " + "word " * (i * 7 % 11), "id": i} for i in range(40)]
FLAGS = [
    "--template_name",
    "chatml",
    "--torch_dtype",
    "float32",
    "--batch_size",
    "2",
    "--max_new_tokens",
    "4",
]


def command(model_dir, tmp_path, name: str, *flags) -> list[str]:
    data = tmp_path / "q.jsonl"
    if not data.exists():
        write_jsonl(data, ROWS)
    return [
        "--base_model",
        str(model_dir),
        "--data_file",
        str(data),
        "--output_file",
        str(tmp_path / name),
        *FLAGS,
        *flags,
    ]


def stop_after(monkeypatch, num_batches: int) -> None:
    """Let the process fail in the midst of a window."""
    answer, count = answer_file.Generator.answer, [0]

    def failing(self, *args, **kwargs):
        count[0] += 1
        if count[0] > num_batches:
            raise RuntimeError("killed")
        return answer(self, *args, **kwargs)

    monkeypatch.setattr(answer_file.Generator, "answer", failing)


def test_a_run_stopped_twice_gives_the_file_of_an_uninterrupted_one(model_dir, tmp_path, monkeypatch):
    """Sampled answers, a window of 16 rows: stopped in the second window, then in the third behind a torn line."""
    inference.main(command(model_dir, tmp_path, "whole.jsonl"))
    for num_batches in (11, 9):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            stop_after(patch, num_batches)
            inference.main(command(model_dir, tmp_path, "cut.jsonl"))
        with open(tmp_path / "cut.jsonl.partial", "a", encoding="utf-8") as file:
            file.write('{"prompt": "torn')
    lines = (tmp_path / "cut.jsonl.partial").read_text().splitlines()
    assert len(lines) == 33  # two windows, and the torn line
    inference.main(command(model_dir, tmp_path, "cut.jsonl"))
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut.jsonl"]
    answers = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == list(range(40))


def test_lines_written_in_the_midst_of_a_window_are_kept(model_dir, tmp_path, monkeypatch):
    inference.main(command(model_dir, tmp_path, "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        stop_after(patch, 1)
        inference.main(command(model_dir, tmp_path, "cut.jsonl"))
    (tmp_path / "cut.jsonl.partial").write_text("".join(whole[:5]))
    inference.main(command(model_dir, tmp_path, "cut.jsonl"))
    assert (tmp_path / "cut.jsonl").read_text() == "".join(whole)


@pytest.mark.parametrize("change, message", [
    (["--seed", "7"], "--seed: 42 → 7"),
    (["--max_new_tokens", "5"], "--max_new_tokens: 4 → 5"),
    (["--system_prompt", "Be brief."], "--system_prompt: None → Be brief."),
])  # fmt: skip
def test_an_unfinished_file_of_another_run_is_refused(model_dir, tmp_path, monkeypatch, change, message):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        stop_after(patch, 9)
        inference.main(command(model_dir, tmp_path, "cut.jsonl"))
    with pytest.raises(ConfigError, match=message):
        inference.main(command(model_dir, tmp_path, "cut.jsonl", *change))
    inference.main(command(model_dir, tmp_path, "cut.jsonl", *change, "--overwrite", "True"))
    assert len((tmp_path / "cut.jsonl").read_text().splitlines()) == 40


def test_an_unfinished_file_of_another_input_is_refused(model_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        stop_after(patch, 9)
        inference.main(command(model_dir, tmp_path, "cut.jsonl"))
    write_jsonl(tmp_path / "q.jsonl", ROWS[1:])
    with pytest.raises(ConfigError, match=r"begun differently .*input: "):
        inference.main(command(model_dir, tmp_path, "cut.jsonl"))


def test_several_answers_are_lists_and_differ(model_dir, tmp_path):
    flags = ("--num_return_sequences", "3", "--temperature", "1.5")
    inference.main(command(model_dir, tmp_path, "a.jsonl", *flags))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(len(row["response"]) == len(row["finish_reason"]) == 3 for row in rows)
    assert any(len(set(row["response"])) > 1 for row in rows)


def test_several_greedy_answers_are_refused(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="--num_return_sequences 3 needs --data_file and sampling"):
        inference.main(
            command(model_dir, tmp_path, "a.jsonl", "--num_return_sequences", "3", "--temperature", "0")
        )


def test_two_models_answer_side_by_side(model_dir, tmp_path):
    flags = ("--compare", str(model_dir), "--temperature", "0")
    inference.main(command(model_dir, tmp_path, "a.jsonl", *flags))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(row["response"] == row["response_compare"] for row in rows)


def test_conversations_tools_and_plain_lines_are_answered(model_dir, tmp_path):
    """A conversation's last answer is left out; the prompt's length tells that the history was read."""
    tool = {"name": "dose", "parameters": {}}
    write_jsonl(tmp_path / "q.jsonl", [
        {"prompt": "Hi"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "old"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "Hi"}], "tools": [tool]},
    ])  # fmt: skip
    inference.main(command(model_dir, tmp_path, "a.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    first, conversation, longer, tools = (row["num_prompt_tokens"] for row in rows)
    assert first == conversation < longer < tools
    assert rows[3]["tool_calls"] == []
    (tmp_path / "q.txt").write_text("Hi\n\nHi\n")
    flags = command(model_dir, tmp_path, "b.jsonl")
    flags[flags.index("--data_file") + 1] = str(tmp_path / "q.txt")
    inference.main(flags)
    assert [json.loads(line)["prompt"] for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [
        "Hi",
        "Hi",
    ]


BAD = {
    "empty": b"", "blank": b"\n\n", "broken": b'{"prompt": \n', "torn": b'{"prompt": "a"}\n{"prompt": "b',
    "null": b'{"prompt": null}\n', "number": b'{"prompt": 3}\n', "missing": b'{"id": 1}\n',
    "order": b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "bytes": b'{"prompt": "\xff"}\n',
    "surrogate": b'{"prompt": "\\ud800"}\n', "gzip": b"\x1f\x8b\x08\x00", "answer": b'{"conversations": []}\n',
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_input_is_named_before_a_model_loads(kind, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(BAD[kind])
    with pytest.raises(DataError, match=r"q\.jsonl"):
        inference.main(command("no such model", tmp_path, "a.jsonl"))
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize(
    "content", [b'\xef\xbb\xbf{"prompt": "Hi"}\n', b'{"prompt": "Hi"}\r\n\r\n', b'{"prompt": "Hi"}']
)
def test_a_byte_order_mark_windows_lines_and_a_missing_last_newline_are_read(content, model_dir, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(content)
    inference.main(command(model_dir, tmp_path, "a.jsonl"))
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "Hi"


def test_two_ranks_write_the_file_of_one(model_dir, tmp_path):
    inference.main(command(model_dir, tmp_path, "one.jsonl"))
    root = Path(inference.__file__).parent
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "inference.py",
    ]
    subprocess.run(
        [*launch, *command(model_dir, tmp_path, "two.jsonl")], cwd=root, check=True, capture_output=True
    )
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
