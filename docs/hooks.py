"""What the site makes from the code: tables of options, the help of the shell's commands, and formulas as MathML.

mkdocs calls the functions named ``on_...``; mkdocstrings loads `Formulas`.
"""

import argparse
import dataclasses
import html
import inspect
import re
from collections.abc import Callable
from typing import Any

import griffe
from latex2mathml.converter import convert

import hetkd
import hetkd.training
from hetkd.__main__ import parser
from hetkd.methods.common.method import methods
from hetkd.utils.docstrings import described


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill ``<!-- options of NAME -->`` and ``<!-- help of COMMAND -->``, each on a line of its own."""
    markdown = re.sub(r"<!-- options of (\w+) -->", lambda found: options_table(found[1]), markdown)
    return re.sub(r"<!-- help of (\w+) -->", lambda found: command_help(found[1]), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show by themselves."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', mathml("inline"), content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', mathml("block"), content, flags=re.DOTALL)


def mathml(display: str) -> Callable[[re.Match[str]], str]:
    """Return what replaces a formula, ``"inline"`` or as a ``"block"``."""
    return lambda found: convert(html.unescape(found[1]).strip(), display=display)


def options_table(name: str) -> str:
    """Return the options of a method, of `hetkd.training.TrainingOptions` or of a function of hetkd, as a table."""
    subject = methods[name] if name in methods else getattr(hetkd, name, None) or getattr(hetkd.training, name)
    descriptions = described(subject)
    rows = ["| option | default | what |", "|---|---|---|"]
    for option, default in defaults(subject).items():
        rows.append(f"| `{option}` | {default} | {as_cell(descriptions[option])} |")
    return "\n".join(rows)


def defaults(subject: Any) -> dict[str, str]:
    """Return the options of a class or function, and their defaults as they are written."""
    if dataclasses.is_dataclass(subject):
        return {field.name: f"`{field.default!r}`" for field in dataclasses.fields(subject)}
    parameters = inspect.signature(subject).parameters.values()
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    return {
        parameter.name: "needed" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        for parameter in named
    }


def as_cell(description: str) -> str:
    """Return the words of a docstring as a cell of a table."""
    return re.sub(r"``(.*?)``", r"`\1`", as_markdown(description)).replace("|", "\\|")


def command_help(name: str) -> str:
    """Return the help of a command of the shell, as a block of text."""
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return f"```text\n{commands.choices[name].format_help()}```"


def as_markdown(docstring: str) -> str:
    """Turn formulas and examples of a docstring, which are Sphinx's and doctest's, into those of the site."""
    blocks = re.split(r"\n\s*\n", docstring)
    text = "\n\n".join(f"```pycon\n{block}\n```" if block.startswith(">>>") else formula(block) for block in blocks)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r":math:`(.*?)`", r"$\1$", text, flags=re.DOTALL)


def formula(block: str) -> str:
    """Return a block of a docstring with ``.. math::`` as ``$$``."""
    found = re.fullmatch(r"(\s*)\.\. math::(.*)", block, flags=re.DOTALL)
    if not found:
        return block
    body = " ".join(found[2].split())
    return f"{found[1]}$$\\begin{{align}}{body}\\end{{align}}$$" if "&" in body else f"{found[1]}$${body}$$"


class Formulas(griffe.Extension):
    """Formulas of docstrings, for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
