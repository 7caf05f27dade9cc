"""
What the builder of the site is taught: docstrings have the syntax of Hugging Face's doc-builder, and the pages of
commands are their own help.

As a griffe extension, it makes links of "[`Name`]" where the API page has the name, and code where it has not. As a
hook of mkdocs, it puts the help of every command into cli.md, links to files of the repository, and formulas
as MathML.
"""

import contextlib
import html
import io
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

from gpm_trl_cli import main

DOCS = Path(__file__).parent
SHOWN = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """A docstring in doc-builder's syntax as the Markdown that mkdocstrings reads."""
    docstring = re.sub(r"^ *> Parameters? .*(?:\n *\S.*)*?\n\n", "", docstring, flags=re.MULTILINE)  # titles in lists
    docstring = re.sub(r"^( *)> \[!(\w+)\]\n((?:\1>.*\n?)*)", _admonition, docstring, flags=re.MULTILINE)
    docstring = docstring.replace("# doctest: +SKIP", "")
    docstring = re.sub(r"^( +[\w, ]+ \()(.*)(\):)", _plain_type, docstring, flags=re.MULTILINE)
    return re.sub(r"\[`(~?)([\w.]+)(\(\))?`\](?!\()", _link, docstring)


def _admonition(match: re.Match) -> str:
    indent, kind, lines = match.groups()
    text = re.sub(rf"^{indent}> ?", f"{indent}    ", lines, flags=re.MULTILINE)
    return f"{indent}!!! {kind.lower()}\n\n{text}\n"


def _plain_type(match: re.Match) -> str:
    """The type of an argument, of which the signature says the default."""
    kind = re.sub(r", \*optional\*|, defaults to `[^`]*`", "", match[2])
    kind = re.sub(r"\[`~?([\w.]+)`\]", r"\1", kind).replace("`", "").replace("*", "")
    return f"{match[1]}{kind}{match[3]}"


def _link(match: re.Match) -> str:
    is_short, name, call = match.groups()
    text = f"`{name.rsplit('.', 1)[-1] if is_short else name}{call or ''}`"
    last = name.rsplit(".", 1)[-1]
    shown = (path for path in SHOWN if path.endswith(f".{last}") or ("." in path and name.startswith(f"{path}.")))
    target = next(shown, None)
    if target is None:
        return text
    return f"[{text}][{target}]" if target.endswith(f".{last}") else f"[{text}][{name}]"


class DocBuilderSyntax(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def on_config(config: Any) -> None:
    """Where the address of the repository is told, pages link to their source in it."""
    config.edit_uri = "edit/main/docs/" if config.repo_url else None


def on_page_content(content: str, **kwargs: Any) -> str:
    """Formulas, which arithmatex has found, as MathML: browsers draw it without a script."""
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _mathml, content, flags=re.DOTALL)


def _mathml(match: re.Match) -> str:
    if match[1] == "span":
        return convert(html.unescape(match[2]))
    return f'<div style="overflow-x: auto">{convert(html.unescape(match[2]), display="block")}</div>'


def on_page_markdown(markdown: str, config: Any, **kwargs: Any) -> str:
    """Help of commands, where a page asks for it by a line like `<!-- help of gpm -->`; links to the repository."""

    def text(match: re.Match) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([match[1], "--help"])
        return f"```text\n{printed.getvalue()}```"

    if config.repo_url:  # which has what is no page
        markdown = markdown.replace("](../", f"]({config.repo_url.rstrip('/')}/blob/main/")
    return re.sub(r"<!-- help of (\w+) -->", text, markdown)
