"""The chat: its commands, what it forgets, what a stream may show and a terminal may obey."""

import io
import json
import sys

from medicalgpt.chat_session import Ended, Refused, Session
from medicalgpt.generation import Answer, PrintStream, split_thought
from medicalgpt.records import parse_chat
from medicalgpt.row_log import RowLog
from medicalgpt.terminal import DIM, NORMAL, Screen, is_rich
from medicalgpt.tokenization import ChatEncoder, ChatFormat
from template import TEMPLATES, Message

import pytest


class Parrot:
    """A generator that answers with a number, and remembers the prompts it was given."""

    def __init__(self):
        self.prompts = []
        self.settings = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 20}

    def answer(self, prompts, *, write, interrupted):
        self.prompts += prompts
        text = f"Answer {len(self.prompts)}."
        write(text)
        return [Answer(text, "interrupted" if interrupted() else "stop", len(prompts[0]), 3)]


@pytest.fixture
def session(tokenizer):
    encoder = ChatEncoder(tokenizer, ChatFormat.of(TEMPLATES["chatml"], tokenizer), max_length=200)
    said, notices = [], []
    talk = Session(Parrot(), encoder, said.append, notices.append)
    talk.said, talk.notices = said, notices
    return talk


def contents(session) -> list[str]:
    return [message.content for message in session.history]


def test_a_question_is_answered_with_its_history_and_the_speed_is_told(session):
    session.ask("one")
    session.ask("two")
    assert contents(session) == ["one", "Answer 1.", "two", "Answer 2."]
    expected = session.encoder.encode_prompt(
        [Message("user", "one"), Message("assistant", "Answer 1."), Message("user", "two")]
    )[0]
    assert session.generator.prompts[1] == expected
    assert "tokens/s" in session.notices[-1]


def test_retry_asks_the_same_again_and_undo_takes_it_back(session):
    session.ask("one")
    session.ask("two")
    session.command("/retry")
    assert contents(session) == ["one", "Answer 1.", "two", "Answer 3."]
    assert session.generator.prompts[2] == session.generator.prompts[1]
    session.command("/undo")
    assert contents(session) == ["one", "Answer 1."]
    session.command("/clear")
    assert contents(session) == []
    for line in ("/retry", "/undo", "/save x"):
        with pytest.raises(Refused, match="nothing was"):
            session.command(line)


def test_a_saved_conversation_is_training_data_and_can_be_loaded(session, tmp_path):
    session.command("/system Be kind.")
    session.ask("一 question\nwith two lines")
    path = tmp_path / "talk.jsonl"
    session.command(f"/save {path}")
    chat = parse_chat(json.loads(path.read_text(encoding="utf-8")), "f:1", RowLog())
    assert list(chat.messages) == session.messages
    with pytest.raises(Refused, match="exists; give another name"):
        session.command(f"/save {path}")
    before = session.messages
    session.command("/clear")
    session.command("/system Other.")
    session.command(f"/load {path}")
    assert session.messages == before


@pytest.mark.parametrize(
    "content", ["", "no json\n", "[1]\n", '{"conversations": [{"from": "gpt", "value": "a"}]}\n']
)
def test_a_file_that_is_no_conversation_is_not_loaded(session, tmp_path, content):
    session.ask("one")
    (tmp_path / "x").write_text(content)
    with pytest.raises(Refused, match="x"):
        session.command(f"/load {tmp_path / 'x'}")
    with pytest.raises(Refused, match="No such file"):
        session.command(f"/load {tmp_path / 'missing'}")
    assert contents(session) == ["one", "Answer 1."]


def test_params_are_set_within_their_ranges(session):
    session.command("/params temperature 0")
    assert session.generator.settings == {"do_sample": False, "max_new_tokens": 20}
    session.command("/params temperature 0.3")
    assert session.generator.settings["do_sample"] is True
    for line, message in [("top_p 2", "top_p 2.0 is not allowed"), ("top_k x", "expected int"), ("seed 1", "cannot be set"),
                          ("max_new_tokens 213", "expected 1 to 212")]:  # fmt: skip
        with pytest.raises(Refused, match=message):
            session.command(f"/params {line}")


def test_a_longer_answer_leaves_less_room_for_the_prompt(session):
    session.command("/params max_new_tokens 120")
    assert (session.context, session.encoder.max_length) == (220, 100)
    with pytest.raises(Refused, match="longer than the context leaves room for"):
        session.ask("word " * 60)
    assert contents(session) == []


def test_what_outgrows_the_context_is_forgotten_by_whole_turns(session):
    for number in range(12):
        session.ask(f"question {number}")
    assert any("no longer fit and are forgotten" in notice for notice in session.notices)
    assert len(session.history) % 2 == 0 and session.history[0].role == "user"
    assert contents(session)[-2] == "question 11"
    assert all(len(prompt) <= 200 for prompt in session.generator.prompts)


def test_an_unknown_command_names_its_neighbours_and_exit_ends(session):
    with pytest.raises(Refused, match=r"/sav is no command; did you mean /save"):
        session.command("/sav x")
    with pytest.raises(Ended):
        session.command("/exit")
    session.command("/help")
    assert "/retry" in session.notices[-1]


# ---- the stream --------------------------------------------------------------------------------------------


def streamed(tokenizer, text: str, stops: list[str]) -> list[str]:
    pieces: list[str] = []
    stream = PrintStream(tokenizer, pieces.append, stops)
    for character in text:
        stream.on_finalized_text(character)
    stream.on_finalized_text("", stream_end=True)
    return pieces


@pytest.mark.parametrize("text, shown", [
    ("Yes.\n### Instruction: more", "Yes.\n"),
    ("Yes ### Instr", "Yes ### Instr"),
    ("  a ## b ### c", "a ## b ### c"),
    ("###", ""),
])  # fmt: skip
def test_a_stop_string_is_never_shown_however_it_arrives(tokenizer, text, shown):
    stops = ["### Instruction:", "###"] if text == "###" else ["### Instruction:"]
    pieces = streamed(tokenizer, text, stops)
    assert "".join(pieces) == shown
    assert all("### I" not in "".join(pieces[:n]) for n in range(len(pieces)) if "more" in text)


@pytest.mark.parametrize("name, text, expected", [
    ("qwen3", "<think>\nhm\n</think>\n\nYes.", ("hm", "Yes.")),
    ("qwen3", "<think>\n\n</think>\n\nYes.", ("", "Yes.")),
    ("qwen3", "<think>\nstill", ("still", "")),
    ("qwen3", "Yes.", ("", "Yes.")),
    ("qwen3_5", "hm\n</think>\n\nYes.", ("hm", "Yes.")),
    ("qwen3_5", "still thinking", ("still thinking", "")),
    ("qwen3_5_nothink", "Yes.", ("", "Yes.")),
    ("chatml", "<think>a</think>b", ("", "<think>a</think>b")),
])  # fmt: skip
def test_thought_and_answer_are_told_apart(name, text, expected):
    assert split_thought(text, TEMPLATES[name]) == expected


def shown_on(screen: Screen, text: str, monkeypatch, size: int = 1) -> str:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    screen.begin()
    for begin in range(0, len(text), size):
        screen.write(text[begin : begin + size])
    screen.end()
    return out.getvalue()


@pytest.mark.parametrize("size", [1, 3, 100])
def test_thoughts_are_dimmed_however_their_marks_arrive(monkeypatch, size):
    text = "<think>\nhm < 3\n</think>\n\nYes <b>"
    assert (
        shown_on(Screen(dims=True), text, monkeypatch, size)
        == f"{DIM}<think>\nhm < 3\n</think>{NORMAL}\n\nYes <b>"
    )
    assert (
        shown_on(Screen(dims=True, opens=True), "hm</think>Yes", monkeypatch, size)
        == f"{DIM}hm</think>{NORMAL}Yes"
    )
    assert shown_on(Screen(dims=True, opens=True), "cut", monkeypatch, size) == f"{DIM}cut{NORMAL}"
    assert shown_on(Screen(dims=False), text, monkeypatch, size) == text


def test_a_model_cannot_send_the_terminal_a_control_sequence(monkeypatch):
    text = shown_on(Screen(dims=True), "a\x1b[2Jb\x07\x9b31mc\r\n\td", monkeypatch)
    assert text == "a\ufffd[2Jb\ufffd\ufffd31mc\ufffd\n\td"


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_pipe_and_a_dumb_terminal_are_plain(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert is_rich() is False
