"""Template → Jinja chat template, so that any tool renders the format that was trained."""

from medicalgpt.rendering import Renderer
from template import Template

MESSAGE = "message['content']"


class Exporter:
    """Writes one template as Jinja, with the tokenizer's own tokens filled in."""

    def __init__(self, template: Template, *, bos: str, eos: str):
        self.template = template
        self.renderer = Renderer(template, bos, eos)

    def quote(self, text: str) -> str:
        """Return a Jinja expression of a text; {round} becomes the question's number."""
        parts = []
        for part in (
            text.replace("{bos}", self.renderer.bos).replace("{eos}", self.renderer.eos).split("{round}")
        ):
            escaped = part.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
            parts.append(f"'{escaped}'")
        return f" ~ (ns.number + {self.template.first_round - 1}) ~ ".join(parts)

    def around(self, form: str, value: str) -> str:
        """Return the Jinja expression of a form with `value` in the place of {content}."""
        before, _, after = form.partition("{content}")
        return f"{self.quote(before)} ~ {value} ~ {self.quote(after)}"

    def trimmed(self, role: str, value: str) -> str:
        """Return a message's content as the official format has it."""
        return f"({value} | trim)" if role in self.template.strip else value

    def choose(self, usual: str, lone: str | None) -> str:
        """Return an expression that differs where there is one question only."""
        return usual if lone is None else f"(({lone}) if ns.total == 1 else ({usual}))"

    def source(self) -> str:
        """Return the chat template."""
        template, has_end = self.template, bool(self.template.end)
        return "\n".join(
            [
                "{%- if tools -%}{{- raise_exception('this chat template has no tools') -}}{%- endif -%}",
                *self.system_lines(),
                "{%- set ns = namespace(last_user=-1, number=0, total=0) -%}",
                "{%- for message in turns -%}{%- if message['role'] == 'user' -%}",
                "{%- set ns.last_user = loop.index0 -%}{%- set ns.total = ns.total + 1 -%}",
                "{%- endif -%}{%- endfor -%}",
                f"{{{{- {self.quote(template.prefix)} -}}}}",
                *(["{{- system -}}"] if template.system_in == "own" else []),
                "{%- for message in turns -%}{%- if message['role'] == 'user' -%}",
                "{%- set ns.number = ns.number + 1 -%}",
                f"{{{{- {self.question()} -}}}}",
                "{%- else -%}",
                *self.answer_lines(),
                "{%- endif -%}{%- endfor -%}",
                f"{{%- if add_generation_prompt -%}}{{{{- {self.prompt_end()} -}}}}",
                *([f"{{%- else -%}}{{{{- {self.quote(template.end)} -}}}}"] if has_end else []),
                "{%- endif -%}",
            ]
        )

    def system_lines(self) -> list[str]:
        """Return the lines that set `system` (with what stands around it) and `turns`."""
        template = self.template
        default = "none" if template.default_system is None else self.quote(template.default_system)
        first = "messages[0]['content']"
        or_default = "" if template.empty_system else f" or {default}"
        lines = [
            "{%- if messages[0]['role'] == 'system' -%}",
            f"{{%- set system = {self.trimmed('system', first)}{or_default} -%}}",
            "{%- set turns = messages[1:] -%}",
            f"{{%- else -%}}{{%- set system = {default} -%}}{{%- set turns = messages -%}}{{%- endif -%}}",
        ]
        form = (template.system or "").replace("{environment}", "")
        system = "''" if template.system is None else self.around(form, "system")
        return [*lines, f"{{%- set system = '' if system is none else {system} -%}}"]

    def question(self) -> str:
        """Return the expression of a user message."""
        template, value = self.template, self.trimmed("user", MESSAGE)
        if template.system_in != "own":
            place = "loop.first" if template.system_in == "first_user" else "loop.index0 == ns.last_user"
            value = f"((system if {place} else '') ~ {value})"
            value = f"({value} | trim)" if "user_with_system" in template.strip else value
        lone = self.around(template.lone[0], value) if template.lone else None
        return self.choose(self.around(template.user, value), lone)

    def header(self, form: str) -> str:
        """Return the expression of a last answer's header."""
        return self.choose(
            self.quote(form), self.quote(self.template.lone[1]) if self.template.lone else None
        )

    def prompt_end(self) -> str:
        """Return the expression of what ends a prompt."""
        template = self.template
        thought = ""
        if template.prompt_thought:
            thought = template.thought[0] + template.thought[1] * (template.prompt_thought == "empty")
        return f"{self.header(template.last_header or template.header)} ~ {self.quote(thought)}"

    def answer_lines(self) -> list[str]:
        """Return the lines of an answer with its header, stop and what follows."""
        template = self.template
        header = self.quote(template.header)
        if template.last_header is not None:
            header = f"({self.header(template.last_header)} if loop.last else {header})"
        stop, after = self.quote(template.stop), self.quote(template.after)
        thought = "thought ~ " if template.thought else ""
        ends = (
            f"{{{{- {stop} ~ {after} -}}}}"
            if template.stop_between
            else f"{{{{- {stop} if loop.last else {after} -}}}}"
        )
        return [
            f"{{%- set text = {self.trimmed('assistant', MESSAGE)} -%}}",
            *self.thought_lines(),
            f"{{{{- {header} ~ {thought}{self.around(template.answer, 'text')} -}}}}",
            ends,
        ]

    def thought_lines(self) -> list[str]:
        """Return the lines that treat thoughts as `Renderer.split_thought` does."""
        template = self.template
        if not template.thought:
            return []
        before, after = map(self.quote, template.thought)
        trim = " | trim" if "assistant" in template.strip else ""
        always = "true" if template.prompt_thought else "own"
        shown = f"{before} ~ {after}" if template.prompt_thought == "empty" else f"{before} ~ own ~ {after}"
        return [
            "{%- set own = '' -%}{%- if '</think>' in text -%}",
            "{%- set own = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1] -%}",
            f"{{%- set own = own.strip('\\n'){trim} -%}}",
            "{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}",
            f"{{%- if loop.last or (loop.index0 > ns.last_user and {always}) -%}}",
            f"{{%- set thought = {shown} -%}}{{%- set text = text.lstrip('\\n') -%}}",
            "{%- else -%}{%- set thought = '' -%}{%- endif -%}",
        ]


def jinja(template: Template, *, bos: str, eos: str) -> str:
    """Return a Jinja chat template that renders what `render` does, for conversations without tools."""
    return Exporter(template, bos=bos, eos=eos).source()
