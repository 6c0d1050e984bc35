"""Tables for notebooks: what objects return from ``_repr_html_``."""

from collections.abc import Iterable, Sequence
from html import escape


def table(header: Sequence[str], rows: Iterable[Sequence[str]], above: str = "", below: str = "") -> str:
    """Return an HTML table of texts, which are escaped.

    >>> table(["epoch"], [["1"]])
    '<table><thead><tr><th>epoch</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'

    Args:
        header: A name a column.
        rows: A text a column each.
        above: Lines above the table.
        below: Lines below it.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"{_lines(above)}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{_lines(below)}"


def _lines(text: str) -> str:
    return "<p>" + "<br>".join(escape(line) for line in text.splitlines()) + "</p>" if text else ""
