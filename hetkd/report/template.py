"""Pages from the templates beside this file; nothing in them comes from the network."""

from collections.abc import Mapping
from typing import Any


def render(name: str, page: Mapping[str, Any]) -> str:
    """Return a page.

    Args:
        name: Of a template, which extends ``base.html``.
        page: What it shows; ``title``, ``version`` and ``date`` are on all of them.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(autoescape=True, loader=PackageLoader("hetkd.report", ""))
    return environment.get_template(name).render(page)
