"""A report as one HTML file, which needs nothing beside it."""

from base64 import b64encode
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from data_prep.common.files import write_text

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_page(path: Path, markdown: str, pictures: Iterable[Path], first_line: str = "") -> None:
    """Writes Markdown as a page that loads nothing and runs nothing.

    Args:
        markdown: begins with its title. HTML in it is shown as text, since much of a report is data.
        pictures: PNG files to put into the page; other images of `markdown` are only named.
        first_line: an HTML comment.
    """
    from jinja2 import Environment
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    headings: list[tuple[str, object]] = []
    for opening, text in pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrSet("id", f"part-{len(headings)}")
            headings.append((text.content, opening.attrs["id"]))
    embedded = {picture.name: b64encode(picture.read_bytes()).decode() for picture in pictures}
    for image in (child for token in tokens for child in token.children or [] if child.type == "image"):
        if content := embedded.get(str(image.attrs["src"])):
            image.attrSet("src", f"data:image/png;base64,{content}")
        else:
            image.type = "text"  # the description of an image of another source
    body = parser.renderer.render(tokens, parser.options, {})
    # A wide table scrolls in a box of its own. `<table>` is never data, whose angle brackets are escaped.
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    (title, _), *contents = headings
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    page = template.render(first_line=Markup(first_line), title=title, contents=contents, body=Markup(body))
    write_text(path, page + "\n")
