"""HTML → the text that a reader sees. Standard library only."""

import html
import re

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


FLAGS = "async|checked|controls|defer|disabled|hidden|multiple|nowrap|readonly|required|selected"
ATTRIBUTE = rf"""\s+(?:[a-zA-Z_:][-\w:.]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)|(?:{FLAGS})\b)"""
TAG = re.compile(rf"<(/?)([a-zA-Z][a-zA-Z0-9]*)(?:{ATTRIBUTE})*\s*/?>")
UNSEEN_BLOCK = re.compile(rf"<({'|'.join(UNSEEN)})(?:{ATTRIBUTE})*\s*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->|<!doctype[^<>]*>", re.IGNORECASE | re.DOTALL)
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")  # only with its semicolon


def replace_tag(match: re.Match) -> str:
    """Return what stands for a tag: a line end, a space or nothing; what is none of HTML (<think>) stays."""
    tag = match[2].lower()
    if tag in BREAKING:
        return "\n"
    if tag in ("td", "th"):
        return " "
    return "" if tag in INLINE else match[0]


def html_to_text(text: str) -> str:
    """Return the text without HTML tags, entities as characters, at most one blank line in a row.

    A tag is a known element's name with nothing but attributes behind it, so that `a<b && c>d` stays. A
    script, style or title goes with its content where it is closed.
    """
    if "<" not in text and "&" not in text:
        return text
    visible = TAG.sub(replace_tag, UNSEEN_BLOCK.sub("", COMMENT.sub("", text)))
    visible = ENTITY.sub(lambda match: html.unescape(match[0]), visible).replace("\xa0", " ")
    return re.sub(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+", "\n\n", re.sub(r"[ \t]+\n", "\n", visible)).strip()
