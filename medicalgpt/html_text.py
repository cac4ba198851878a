"""HTML → the text that a reader sees. Standard library only."""

import re
from html.parser import HTMLParser

UNSEEN = frozenset({"script", "style", "head", "title"})
BREAKING = frozenset(
    """address article aside blockquote br dd div dl dt fieldset figure footer form h1 h2 h3 h4 h5 h6 header
    hr li main nav ol p pre section table tbody tfoot thead tr ul""".split()  # noqa: SIM905  (a list is a page)
)
INLINE = frozenset(
    """a abbr acronym b bdi bdo big body button caption center cite code col colgroup del dfn em embed
    figcaption font html i iframe img input ins kbd label link mark meta noscript object option q s samp
    select small source span strike strong sub sup td textarea th time tt u var video wbr""".split()  # noqa: SIM905
)


class VisibleText(HTMLParser):
    """Collects text; a tag that is none of HTML (<think>, <user>) is text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.unseen = 0  # open tags whose content is not seen

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Leave a tag of HTML out; a block begins a new line."""
        if tag in UNSEEN:
            self.unseen += 1
        elif tag in BREAKING:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        elif tag not in INLINE:
            self.handle_data(self.get_starttag_text())

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        """Take <br/> as <br>: what closes at once hides nothing."""
        if tag not in UNSEEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        """A block ends its line."""
        if tag in UNSEEN:
            self.unseen = max(0, self.unseen - 1)
        elif tag in BREAKING:
            self.parts.append("\n")
        elif tag not in INLINE:
            self.handle_data(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        """Keep text, unless it belongs to a script or the like."""
        if not self.unseen:
            self.parts.append(data)


def html_to_text(text: str) -> str:
    """Return the text without HTML tags, entities as characters, at most one blank line in a row."""
    if "<" not in text and "&" not in text:
        return text
    parser = VisibleText()
    parser.feed(text)
    parser.close()
    visible = "".join(parser.parts).replace("\xa0", " ")
    return re.sub(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+", "\n\n", re.sub(r"[ \t]+\n", "\n", visible)).strip()
