"""A model's own chat template → Template, read off from what it renders, and proved on a probe set.

Words that occur nowhere else stand in for the messages of a few short conversations; what the model's
template puts around them is the format. Whether it is, is decided by rendering the whole probe set with both.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from medicalgpt.rendering import Renderer
from template import Message, Template

# (messages as dicts, add_generation_prompt) → text; raises ValueError where the template refuses.
Render = Callable[[Sequence[Message], bool], str]

SYSTEM, ASK, TELL, ASK_AGAIN, TELL_AGAIN, THOUGHT = (
    "Zsystemz",
    "Zaskz",
    "Ztellz",
    "Zagainz",
    "Zlastz",
    "Zthinkz",
)
TALK = [Message("user", ASK), Message("assistant", TELL), Message("user", ASK_AGAIN)]
BODIES = (
    [("user", "hi")],
    [("user", "hi"), ("assistant", "yo")],
    [("user", " lead\n"), ("assistant", "  trail\n\n"), ("user", "\n\nq2")],
    [("user", "a"), ("assistant", "x\n"), ("user", "b"), ("assistant", "\nc ")],
    [("user", "你好😀"), ("assistant", "def f():\n    return {1: 2}"), ("user", "b")],
    [("user", "it's {content} \\n {{ x }}"), ("assistant", "'a'")],
    [(("user", "assistant")[i % 2], f"turn {i}") for i in range(10)],
)
SYSTEMS = ([], [("system", "Be kind.")], [("system", " 说中文 \n")], [("system", "")])


def probes() -> list[list[Message]]:
    """Return the conversations on which a model's own template and ours must agree."""
    return [[Message(*item) for item in (*system, *body)] for system in SYSTEMS for body in BODIES]


class Unreadable(ValueError):
    """A chat template that is none of the formats that can be read off; says why."""


@dataclass(frozen=True)
class Difference:
    """Where two renderings part."""

    messages: Sequence[Message]
    own: str
    ours: str

    def __str__(self) -> str:
        pairs = zip(self.own, self.ours, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.own), len(self.ours)))
        begin = max(0, at - 20)
        said = [message.content for message in self.messages][:3]
        return (
            f"for {said!r} the model's template gives …{self.own[begin : at + 30]!r} where "
            f"{self.ours[begin : at + 30]!r} was expected"
        )


def compare(render: Render, template: Template, *, bos: str, eos: str) -> tuple[int, Difference | None]:
    """Return how many probes were compared, and the first difference or None.

    Probes that the model's template refuses (no system prompt) are left out. A stop that only the last
    answer carries is ours alone, and so is the thought of an answer that the prompt opens.
    """
    renderer, compared = Renderer(template, bos, eos), 0
    for messages in probes():
        is_prompt = messages[-1].role == "user"
        if template.system_in == "last_user" and messages[0].role == "system" and not is_prompt:
            continue  # the official template drops the system prompt of a finished conversation, we do not
        try:
            own = render(messages, is_prompt)
        except ValueError:
            continue
        compared += 1
        segments = [s for turn in renderer.render(messages) for s in turn if not s.hidden]
        ours = "".join(segment.text for segment in segments)
        if not is_prompt and not template.stop_between:
            ours = ours.removesuffix(renderer.expand(template.stop) + renderer.expand(template.end))
            own = own.removesuffix(renderer.expand(template.end))
        if own != ours and (is_prompt or not is_without_thought(template, own, ours)):
            return compared, Difference(messages, own, ours)
    return compared, None


def is_without_thought(template: Template, own: str, ours: str) -> bool:
    """Return whether `own` is `ours` without its last answer's empty thought, which the prompt brings."""
    if not template.prompt_thought:
        return False
    before, after, rest = ours.rpartition("".join(template.thought))
    return bool(after) and own.startswith(before) and own[len(before) :].lstrip("\n") == rest.lstrip("\n")


# ---- reading a template ------------------------------------------------------------------------------------


def cut(text: str, *words: str) -> list[str]:
    """Split a text at words that follow one another in it."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise Unreadable(f"the message {word!r} is not in what the template renders")
        parts.append(before)
    return [*parts, text]


def split_tokens(text: str, tokens: Sequence[str]) -> list[str]:
    """Split a text at control tokens, which stay as parts of their own."""
    names = "|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True)))
    return [part for part in re.split(f"({names})" if names else "(?!)", text) if part]


def shared_start(a: str, b: str, tokens: Sequence[str]) -> str:
    """Return what two texts begin with in common, in whole control tokens and stretches of text."""
    pairs = zip(split_tokens(a, tokens), split_tokens(b, tokens), strict=False)
    return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def read_template(render: Render, tokens: Sequence[str], *, bos: str, eos: str) -> Template:
    """Return the format of a chat template.

    Args:
        tokens: the tokenizer's control tokens, as text.

    Raises:
        Unreadable: with the reason.
    """
    opening, prompt_end = cut(render(TALK[:1], True), ASK)
    _, history, between, _ = cut(render(TALK, True), ASK, TELL, ASK_AGAIN)
    last, tail = cut(render(TALK[:2], False), ASK, TELL)[1:]
    parts = read_answer(render, history, last, prompt_end, tokens)
    stop_after = tail if between.startswith(tail) else shared_start(tail, between, tokens)
    user_before = between[len(stop_after) :]
    parts |= read_stop(stop_after, parts["answer"], tokens, eos) | {"end": tail[len(stop_after) :]}
    if not opening.endswith(user_before):
        raise Unreadable(
            f"the first question begins with {opening[-30:]!r}, a later one with {user_before!r}"
        )
    no_prompt = render(TALK[:1], False).partition(ASK)[2]
    user_after = no_prompt if parts["header"].startswith(no_prompt) else ""
    parts |= {
        "user": f"{user_before}{{content}}{user_after}",
        "header": parts["header"][len(user_after) :],
    }
    parts |= read_system(render, opening, user_before)
    template = Template(name="own", source="the model's own chat template", **parts)
    return proved(render, template, bos=bos, eos=eos)


def read_answer(
    render: Render, history: str, last: str, prompt_end: str, tokens: Sequence[str]
) -> dict[str, object]:
    """Return header, answer and thought.

    `history` and `last` stand before an earlier and the last answer, `prompt_end` ends a prompt.
    """
    if history.startswith(prompt_end) and last == history:
        return {"header": prompt_end, "answer": history[len(prompt_end) :] + "{content}"}
    header = history if prompt_end.startswith(history) else shared_start(history, prompt_end, tokens)
    opened = prompt_end[len(header) :]
    parts = {"header": header, "answer": "{content}"}
    if header != history:
        parts["past_header"] = history
        if "think>" not in opened + history:
            raise Unreadable(f"a prompt ends with {prompt_end!r}, and answers stand behind {history!r}")
    if not opened and last == history:
        return parts
    thinking = [Message("user", ASK), Message("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{TELL}")]
    shown = render(thinking, False)
    if THOUGHT in shown and last != history:
        _, before, after, _ = cut(shown, ASK, THOUGHT, TELL)
        before = before.removeprefix(header)
    elif opened.strip() == "<think>":
        before, after = opened, "\n</think>\n\n"
    else:
        before, after = opened.partition("\n</think>")[0] + "\n", "\n</think>\n\n"
    kinds = {"": "", before: "open", before + after: "empty"}
    if opened not in kinds:
        raise Unreadable(f"a prompt ends with {opened!r} behind the header, which is no thought")
    return parts | {"thought": (before, after), "prompt_thought": kinds[opened]}


def read_stop(stop_after: str, answer: str, tokens: Sequence[str], eos: str) -> dict:
    """Return answer, stop and after: the first control token behind an answer ends it."""
    pieces = split_tokens(stop_after, tokens)
    index = next((i for i, piece in enumerate(pieces) if piece in tokens), None)
    if index is None:
        return {"stop": eos, "after": stop_after, "stop_between": False}
    before = "".join(pieces[:index])
    return {"answer": answer + before, "stop": pieces[index], "after": "".join(pieces[index + 1 :])}


def read_system(render: Render, opening: str, user_before: str) -> dict:
    """Return prefix, system, default system prompt and its place."""
    bare = opening[: len(opening) - len(user_before)]
    try:
        text = render([Message("system", SYSTEM), *TALK], True)
    except ValueError:
        return {"prefix": bare, "system": None}
    if SYSTEM not in text:
        return {"prefix": bare, "system": None}
    if text.index(SYSTEM) > text.index(ASK):
        before, after, _ = cut(text.partition(TELL)[2], SYSTEM, ASK_AGAIN)
        return {
            "prefix": bare,
            "system": before.rpartition(user_before)[2] + "{content}" + after,
            "system_in": "last_user",
        }
    before, after, _ = cut(text, SYSTEM, ASK)
    if not after.endswith(user_before) or not user_before:
        inside = before.removeprefix(bare).removeprefix(user_before)
        return {"prefix": bare, "system": f"{inside}{{content}}{after}", "system_in": "first_user"}
    after = after[: len(after) - len(user_before)]
    if before.startswith(bare):
        return {"prefix": bare, "system": f"{before[len(bare) :]}{{content}}{after}"}
    if bare.startswith(before) and bare.endswith(after):
        default = bare[len(before) : len(bare) - len(after)]
        return {"system": f"{before}{{content}}{after}", "default_system": default}
    return {"system": f"{before}{{content}}{after}", "no_system": bare}


def proved(render: Render, template: Template, *, bos: str, eos: str) -> Template:
    """Return the template with what it does to white space and empty prompts, proved on the probe set.

    Raises:
        Unreadable: with the first difference of the closest form.
    """
    roles = ("system", "user", "assistant", "user_with_system")
    strips = [frozenset(c) for n in range(len(roles) + 1) for c in itertools.combinations(roles, n)]
    closest: tuple[int, Difference | None] = (0, None)
    for strip, empty_system in itertools.product(strips, (True, False)):
        candidate = replace(template, strip=strip, empty_system=empty_system)
        compared, difference = compare(render, candidate, bos=bos, eos=eos)
        if difference is None and compared:
            return candidate
        closest = max(closest, (compared, difference), key=lambda pair: pair[0])
    raise Unreadable(str(closest[1] or "it refuses every conversation of the probe set"))
