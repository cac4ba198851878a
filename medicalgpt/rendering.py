"""Conversation → segments of text, in the form that a template gives it.

One walk decides what is marker and what is content, what is trained and what is not; every other form of a
conversation (text, ids, labels) is made from its segments. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from medicalgpt.tool_formats import ToolFormat, get_tool_format
from template import Message, Segment, Template

Turn = list[Segment]


@dataclass(frozen=True)
class Renderer:
    """A template with the tokenizer's own tokens filled in.

    Args:
        bos, eos: the tokenizer's own tokens, as text ("" where it has none).
        tool_format: how tools are offered and called; None: the template's own way.
    """

    template: Template
    bos: str
    eos: str
    tool_format: str | None = None

    @property
    def tools(self) -> ToolFormat:
        """How tools are offered and called."""
        return get_tool_format(self.tool_format or self.template.tool_format)

    def expand(self, text: str, number: int = 0) -> str:
        """Put the tokenizer's own tokens and the question's number in their places."""
        number += self.template.first_round
        return text.replace("{bos}", self.bos).replace("{eos}", self.eos).replace("{round}", str(number))

    def pieces(self, form: str, content: Sequence[Segment] = (), number: int = 0) -> list[Segment]:
        """Return the segments of a form with `content` in the place of `{content}`."""
        before, _, after = form.partition("{content}")
        around = [Segment(self.expand(text, number), True, False) for text in (before, after)]
        return [segment for segment in (around[0], *content, around[1]) if segment.text]

    def stripped(self, role: str, content: str) -> str:
        """Return a message's content as the official format has it."""
        return content.strip() if role in self.template.strip else content

    def render(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[Turn]:
        """Render a conversation into turns of segments.

        Args:
            messages: an optional system message, then questions, calls, observations and answers in turn.
                Ends with an answer or call for training, or with a question or observation for a prompt,
                which then ends with the answer's header.
            tools: what the model may call.

        Returns:
            One turn per question; the first also holds what precedes it. Joined texts of the segments that
            are not hidden equal the official rendering, followed by the last answer's stop token where the
            official one has none.
        """
        system, rest = self.split_system(messages)
        last_user = max(index for index, message in enumerate(rest) if message.role == "user")
        total = sum(message.role == "user" for message in rest)
        opening, in_first, in_last, before_last = self.openings(system, tools)
        turns: list[Turn] = []
        index = 0
        while index < len(rest):
            message, number = rest[index], len(turns)
            if message.role == "user":
                is_last = index == last_user
                inside = (in_first if number == 0 else []) + (in_last if is_last else [])
                turns.append((before_last if is_last else []) + self.question(message, inside, number, total))
            elif message.role == "observation":
                run = observation_run(rest, index)
                turns[-1] += self.observations(run)
                index += len(run) - 1
            else:
                last = index == len(rest) - 1
                turns[-1] += self.answer(message, last, index > last_user, len(turns) - 1, total)
            index += 1
        if rest[-1].role != "assistant":
            turns[-1] += self.header(True, len(turns) - 1, total)
            turns[-1] += self.prompt_thought()
        turns[0][:0] = opening
        return turns

    # ---- what comes before and inside questions ------------------------------------------------------------

    def split_system(self, messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
        """Return (system prompt or None, the other messages); the default system prompt is filled in."""
        messages = [Message(*message) for message in messages]
        if messages and messages[0].role == "system":
            system = self.stripped("system", messages[0].content)
            counts = system or self.template.empty_system
            return (system if counts else self.template.default_system), messages[1:]
        return self.template.default_system, messages

    def openings(self, system: str | None, tools: Sequence[dict]) -> tuple[list[Segment], ...]:
        """Return what opens a conversation, and stands inside the first, in and before the last question."""
        template, gap = self.template, [Segment("\n\n", True, False)]
        parts: dict[str, list[Segment]] = {"first_user": [], "last_user": [], "before_last_user": []}
        without = system is None and template.no_system is not None
        opening = self.pieces(template.no_system if without else template.prefix)
        content = None if system is None or template.system is None else [Segment(system, False, False)]
        if tools:
            offer, place = self.tools.offer(tools), self.tools.place
            if place == "own_system" and template.system and template.system_in == "own":
                opening += self.system_turn(offer, tools)
            elif place in parts:
                parts[place] += offer
            elif template.system is None:
                parts["first_user"] += offer + gap
            elif place == "before_system":
                content = offer + (gap + content if system else [])
            else:
                content = (content + gap if system else []) + offer
        if content is not None:
            target = opening if template.system_in == "own" else parts[template.system_in]
            target += self.system_turn(content, tools)
        return opening, parts["first_user"], parts["last_user"], parts["before_last_user"]

    def system_turn(self, content: list[Segment], tools: Sequence[dict]) -> list[Segment]:
        """Return a system prompt with what stands around it."""
        environment = self.tools.environment if tools else ""
        return self.pieces(self.template.system.replace("{environment}", environment), content)

    def question(self, message: Message, inside: list[Segment], number: int, total: int) -> list[Segment]:
        """Return the segments of a user message, with what the format puts inside it."""
        text = self.stripped("user", message.content)
        if "user_with_system" in self.template.strip:
            text = text.rstrip() if inside else text.strip()
        form = self.template.lone[0] if self.template.lone and total == 1 else self.template.user
        return self.pieces(form, [*inside, Segment(text, False, False)], number)

    def observations(self, run: Sequence[Message]) -> list[Segment]:
        """Return the segments of what tools gave back."""
        native = (self.tool_format or self.template.tool_format) == self.template.tool_format
        results = [self.tools.result(message) for message in run]
        if native and self.template.observation is not None:
            return [s for result in results for s in self.pieces(self.template.observation, result)]
        newline = Segment("\n", True, False)
        joined = [s for result in results for s in (newline, *result)][1:]
        return self.pieces(self.template.user, joined)

    # ---- answers -------------------------------------------------------------------------------------------

    def header(self, last: bool, number: int, total: int, *, past: bool = False) -> list[Segment]:
        """Return what stands before an answer; `past`: to an earlier question than the last."""
        form = self.template.header
        if past and self.template.past_header is not None:
            form = self.template.past_header
        if last and self.template.last_header is not None:
            form = self.template.lone[1] if self.template.lone and total == 1 else self.template.last_header
        return self.pieces(form, number=number)

    def prompt_thought(self) -> list[Segment]:
        """Return what of a thought the prompt holds."""
        if not self.template.prompt_thought:
            return []
        before, after = self.template.thought
        return [Segment(before + after * (self.template.prompt_thought == "empty"), True, False)]

    def answer(
        self, message: Message, last: bool, after_question: bool, number: int, total: int
    ) -> list[Segment]:
        """Return header, answer, stop and what follows; answer and stop are trained."""
        trained = last or self.template.last_header is None
        thought, content = self.split_thought(
            self.stripped("assistant", message.content), last=last, after_question=after_question
        )
        segments = self.header(last, number, total, past=not after_question)
        segments += self.thought_segments(thought)
        if message.calls:
            segments += self.tools.calls(message, content, self.template)
        else:
            segments.append(
                Segment(self.expand(self.template.answer).replace("{content}", content), False, True)
            )
        hidden = not (self.template.stop_between or last)
        stop = (self.template.call_stop if message.calls else None) or self.template.stop
        segments.append(Segment(self.expand(stop), True, True, hidden=hidden))
        if self.template.stop_between or not last:
            segments += self.pieces(self.template.after)
        if last:
            segments += self.pieces(self.template.end)
        if not trained:
            segments = [s._replace(trained=False) for s in segments if not s.hidden]
        return [segment for segment in segments if segment.text]

    def thought_segments(self, thought: str | None) -> list[Segment]:
        """Return a thought with its marks: what the prompt holds of it is not trained."""
        if thought is None:
            return []
        if self.template.prompt_thought == "empty":
            return self.prompt_thought()
        before, after = self.template.thought
        opens = self.template.prompt_thought != "open"
        return [Segment(before, True, opens), Segment(thought, False, True), Segment(after, True, True)]

    def split_thought(self, content: str, *, last: bool, after_question: bool) -> tuple[str | None, str]:
        """Return (thought, or None where the format shows none; the answer).

        As in the models' own templates: history loses its thoughts; an answer to the last question has its
        own or an empty one.
        """
        if not self.template.thought:
            return None, content
        head, mark, answer = content.rpartition("</think>")
        if mark:
            answer = answer.lstrip("\n")
        thought = head.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
        if "assistant" in self.template.strip:
            thought = thought.strip()
        if last or (after_question and (thought or self.template.prompt_thought)):
            return thought, answer.lstrip("\n")
        return None, answer


def observation_run(messages: Sequence[Message], begin: int) -> list[Message]:
    """Return the observations that follow one another from `begin` on."""
    end = begin
    while end < len(messages) and messages[end].role == "observation":
        end += 1
    return list(messages[begin:end])


def render(
    template: Template, messages: Sequence[Message], *, bos: str, eos: str, tools: Sequence[dict] = ()
) -> list[Turn]:
    """Render a conversation with a template; see `Renderer.render`."""
    return Renderer(template, bos, eos).render(messages, tools)


def render_text(
    template: Template, messages: Sequence[Message], *, bos: str, eos: str, tools: Sequence[dict] = ()
) -> str:
    """Return the rendered conversation as one string."""
    turns = render(template, messages, bos=bos, eos=eos, tools=tools)
    return "".join(s.text for turn in turns for s in turn if not s.hidden)
