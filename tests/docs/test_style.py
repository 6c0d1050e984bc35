"""What a machine can see of the style of pages: long lines, and turns of phrase that are hard to read."""

import re

import pytest
from conftest import REPOSITORY

GENERATED = {"docs/research/coverage.md", "docs/research/tables.md"}
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for folder in ("docs", "recipes", "adapters", ".")
    for path in (REPOSITORY / folder).glob("*.md" if folder == "." else "**/*.md")
    if str(path.relative_to(REPOSITORY)) not in GENERATED
)
AWKWARD = [
    (r"\bshall\b", "must, should or will"),
    (r"\bthat cannot be(?: is|[.,])", "invalid, impossible"),
    (r"(?:^|[.:!?] )(?:Of|What) (?!.*\?)", "begin with the subject"),
    (r"\bone's own\b", "your own"),
    (r"\bin order to\b", "to"),
    (r"\bgiven up\b", "without"),
    (r"\bthe whole of\b", "all"),
]


def prose(text: str) -> list[tuple[int, str]]:
    """Return the numbered lines that are neither code, tables, formulas, headings nor links alone."""
    lines, inside = [], None
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.match(r"\s*(```|\$\$|<!--)", line)
        if inside:
            inside = None if inside in line else inside
        elif fence and not (fence[1] == "$$" and line.count("$$") == 2) and "-->" not in line:
            inside = {"<!--": "-->"}.get(fence[1], fence[1])
        elif not re.match(r"\s*(\||#|\$\$|:::|<!--|!\[)", line):
            lines.append((number, line))
    return lines


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_are_short(page):
    found = prose((REPOSITORY / page).read_text())
    assert not [(number, len(line)) for number, line in found if len(line) > 120]


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_plain(page):
    found = prose((REPOSITORY / page).read_text())
    assert not [
        f"{page}:{number}: {line.strip()!r}: {cure}"
        for number, line in found
        for pattern, cure in AWKWARD
        if re.search(pattern, re.sub(r"`.*?`|!\[.*", "", line.strip().lstrip("-* ")))
    ]


def test_the_tests_see_what_they_look_for():
    text = "fine\n```\nWhat is code\n```\n| What | is |\n$$\nOf\n$$\nIt holds. What it holds\n"
    assert prose(text) == [(1, "fine"), (9, "It holds. What it holds")]
    assert re.search(AWKWARD[2][0], "It holds. What it holds")
    assert not re.search(AWKWARD[2][0], "What does it hold?")


def test_readme_is_one_screen():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120
