"""The pictures of the methods."""

from xml.etree import ElementTree

import pictures
import pytest
from conftest import REPOSITORY

from hetkd import list_methods

METHODS = REPOSITORY / "docs" / "methods"


def test_every_method_has_a_picture():
    assert sorted(pictures.PICTURES) == sorted(list_methods())


@pytest.mark.parametrize("name", list(pictures.PICTURES))
def test_pictures_are_as_they_would_be_drawn(name, tmp_path):
    pictures.main(["--output", str(tmp_path)])
    drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<text" in drawn
    assert len(drawn.encode()) < 20_000
    assert drawn == (METHODS / "images" / f"{name}.svg").read_text(encoding="utf-8"), "run pictures.py again"


@pytest.mark.parametrize("name", list(pictures.PICTURES))
def test_pages_say_in_words_what_their_picture_shows(name):
    page = " ".join((METHODS / f"{name}.md").read_text(encoding="utf-8").split())
    assert f"![{pictures.in_words(name)}](images/{name}.svg)" in page
