"""The examples in docstrings, run as printed."""

import doctest
import importlib
import inspect
import pkgutil

import hetkd_adapters
import pytest

import hetkd
import hetkd.spectral
from hetkd.features.registry import adapters
from hetkd.methods.common.method import methods

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [
    name
    for package in (hetkd, hetkd_adapters)
    for name in [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]
]


@pytest.fixture
def registries(monkeypatch):
    """Names that an example registers are gone after it."""
    hetkd.list_adapters()  # loads the entry points, once for the process
    for registry in (methods, adapters):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, registries):
    module = importlib.import_module(name)
    examples = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    if not examples:
        return
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    output: list[str] = []
    for example in examples:
        runner.run(example, out=output.append)
    assert not runner.failures, "".join(output)


@pytest.mark.parametrize("package", [hetkd, hetkd.spectral])
def test_public_functions_and_classes_that_users_make_have_an_example(package):
    public = [getattr(package, name) for name in package.__all__]
    functions = [x for x in public if inspect.isfunction(x)]
    without = [x.__name__ for x in functions if ">>>" not in (inspect.getdoc(x) or "")]
    assert without == []
