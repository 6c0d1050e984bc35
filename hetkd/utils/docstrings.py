"""Descriptions of options, read from Google-style docstrings: for flags of the shell and for the site."""

import inspect
import re
from typing import Any


def described(subject: Any) -> dict[str, str]:
    """Return what the docstring of a function, or of a class and its bases, says of arguments and attributes.

    >>> described(described)
    {'subject': 'A function or class.'}

    Args:
        subject: A function or class.
    """
    bases = subject.__mro__ if isinstance(subject, type) else (subject,)
    found: dict[str, str] = {}
    for base in reversed(bases):
        text = inspect.getdoc(base) or ""
        for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", text, flags=re.MULTILINE):
            entries = re.findall(r"^    (\w+): ((?:.*\n?)(?:^        .*\n?)*)", section, flags=re.MULTILINE)
            found |= {name: " ".join(words.split()) for name, words in entries}
    return found
