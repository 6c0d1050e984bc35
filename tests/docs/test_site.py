"""What the site makes from the code: tables of options, help of the commands, formulas."""

import dataclasses
import importlib.util
import inspect
import re

import pytest
import yaml
from conftest import REPOSITORY

import hetkd
import hetkd.training
from hetkd import list_methods
from hetkd.methods.common.method import methods
from hetkd.training import TrainingOptions

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("latex2mathml")
    pytest.importorskip("griffe")
    specification = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list_methods())
def test_a_method_has_all_its_options(name, hooks):
    table = hooks.on_page_markdown(f"<!-- options of {name} -->")
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.+) \|$", table, flags=re.MULTILINE)
    assert {option: default for option, default, _ in rows} == {
        option: repr(parameter.default) for option, parameter in inspect.signature(methods[name]).parameters.items()
    }
    assert "``" not in table
    assert ":math:" not in table


def test_training_has_all_its_options(hooks):
    table = hooks.on_page_markdown("<!-- options of TrainingOptions -->")
    names = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert names == [field.name for field in dataclasses.fields(TrainingOptions)]


def test_the_help_of_a_command(hooks):
    assert "usage: hetkd export" in hooks.on_page_markdown("<!-- help of export -->")


def test_formulas_become_mathml(hooks):
    assert hooks.on_page_content('<span class="arithmatex">\\(a &lt; b\\)</span>').startswith("<math")
    assert 'display="block"' in hooks.on_page_content('<div class="arithmatex">\\[\nx\n\\]</div>')


def test_formulas_of_docstrings(hooks):
    text = "Loss.\n\n.. math:: L = 1 \\\\\n    + 2\n\nwith :math:`x`.\n\n>>> 1\n1"
    assert hooks.as_markdown(text) == "Loss.\n\n$$L = 1 \\\\ + 2$$\n\nwith $x$.\n\n```pycon\n>>> 1\n1\n```"


@pytest.mark.parametrize("name", list_methods())
def test_a_method_has_a_page(name):
    page = (DOCS / "methods" / f"{name}.md").read_text()
    headings = re.findall(r"^## (.*)", page, flags=re.MULTILINE)
    assert [h for h in headings if h != "Parts"] == [
        "Formula",
        "Options",
        "Cost",
        "When to use it",
        "Source and differences",
    ]
    assert f"<!-- options of {name} -->" in page
    assert "arxiv.org/abs" in page or name == "ce"
    (picture,) = re.findall(r"!\[([^\]]{40,})\]\((images/\w+\.svg)\)", page)
    assert (DOCS / "methods" / picture[1]).is_file()


@pytest.mark.parametrize("module", [hetkd, hetkd.training, hetkd.spectral])
def test_every_public_name_is_in_the_reference(module):
    pages = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    assert [name for name in module.__all__ if f"::: {module.__name__}.{name}\n" not in pages] == []


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    shown = set(re.findall(r"[\w/-]+\.md", str(yaml.load((REPOSITORY / ".mkdocs.yml").read_text(), Loader)["nav"])))
    assert shown == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
