"""The direction of imports, read from the code: no circle, nothing upwards, adapters only through the contract."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

LAYERS = [
    ("hetkd.utils",),
    ("hetkd.models", "hetkd.spectral"),
    ("hetkd.features", "hetkd.data"),
    ("hetkd.tasks",),
    ("hetkd.methods", "hetkd.plan"),
    ("hetkd.teachers",),
    ("hetkd.cache",),
    ("hetkd.assemble",),
    ("hetkd.distillation",),
    ("hetkd.training", "hetkd.speed", "hetkd.runtimes"),
    ("hetkd.report",),
    ("hetkd.inspection",),
    ("hetkd.distiller", "hetkd.student"),
    ("hetkd.benchmarking", "hetkd.deploy", "hetkd.finetuning"),
    ("hetkd", "hetkd.__main__"),
    ("recipes",),
]
"""From low to high; a module imports from its own layer's package, and from lower layers."""
CONTRACT = "hetkd.features"
LONGEST = {"hetkd": (350, 250, 60), "adapters": (350, 250, 60), "recipes": (300, 250, 60), "tests": (400, 400, 400)}
"""Most lines of a file, a class and a function."""


def modules(root: Path) -> dict[str, Path]:
    """Returns the files of the packages by the names of their modules."""
    found = {}
    for top, prefix in (("hetkd", "hetkd"), ("adapters/hetkd_adapters", "hetkd_adapters"), ("recipes", "recipes")):
        for path in (root / top).rglob("*.py"):
            parts = path.relative_to(root / top).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Returns the modules among ``known`` that a file imports anywhere, also within functions and for types alone."""
    recipe = {module.rpartition(".")[2]: module for module in known if module.startswith("recipes.")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {recipe.get(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = recipe.get(node.module or "", node.module or "")
            inside = {f"{home}.{alias.name}" for alias in node.names}
            found |= (inside & known) | ({home} if inside - known else set())
    return {module for module in found if module in known} - {name}


def layer(module: str) -> int:
    """Returns the number of a module's layer: that of the longest name in `LAYERS` that it begins with."""
    fitting = [(len(name), number) for number, names in enumerate(LAYERS) for name in names if is_in(module, name)]
    return max(fitting)[1]


def is_in(module: str, package: str) -> bool:
    """Says whether a module is a package or lies in it."""
    return f"{module}.".startswith(f"{package}.")


def home(module: str) -> str:
    """Returns the part of the house where a module lives."""
    return ".".join(module.split(".")[: 1 if is_in(module, "recipes") else 2])


def violations(root: Path) -> list[str]:
    """Returns a sentence for each import that runs the wrong way."""
    files = modules(root)
    edges = {name: imports(name, path, set(files)) for name, path in files.items()}
    found = []
    for name, targets in edges.items():
        for target in sorted(targets):
            if is_in(name, "hetkd_adapters"):
                if is_in(target, "hetkd") and target != CONTRACT:
                    found.append(f"{name} imports {target}: adapters import from {CONTRACT} only")
            elif is_in(target, "hetkd_adapters"):
                found.append(f"{name} imports {target}: adapters are found through their entry points")
            elif layer(target) >= layer(name) and home(target) != home(name):
                found.append(f"{name} imports {target} upwards: move what both need to a lower layer")
    return found + [f"imports run in a circle: {' -> '.join(circle)}" for circle in circles(edges)]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Returns a path for each module that reaches itself for the first time in a walk over all imports."""
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges[name]):
                walk(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def test_imports_go_down():
    assert violations(REPOSITORY) == []


def test_every_module_has_a_layer():
    packages = {home(module) for module in modules(REPOSITORY) if is_in(module, "hetkd")}
    assert packages - {"hetkd"} == {name for names in LAYERS for name in names} - {"hetkd", "recipes"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"hetkd/utils/a.py": "def f():\n    from hetkd.training import b", "hetkd/training/b.py": ""}, "upwards"),
        ({"hetkd/cache/a.py": "import hetkd.cache.b", "hetkd/cache/b.py": "from hetkd.cache import a"}, "in a circle"),
        ({"adapters/hetkd_adapters/a.py": "from hetkd.features.tap import Tap", "hetkd/features/tap.py": ""}, "only"),
        ({"hetkd/features/a.py": "import hetkd_adapters.b", "adapters/hetkd_adapters/b.py": ""}, "entry points"),
        ({"hetkd/models/a.py": "from recipes import b", "recipes/b.py": ""}, "upwards"),
    ],
)
def test_what_runs_the_wrong_way_is_found(files, words, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (found,) = violations(tmp_path)
    assert words in found


def test_files_classes_and_functions_are_short():
    long = []
    for top, (of_file, of_class, of_function) in LONGEST.items():
        for path in (REPOSITORY / top).rglob("*.py"):
            text, name = path.read_text(), path.relative_to(REPOSITORY)
            lines = text.splitlines()
            long += [f"{name} has {len(lines)} lines"] * (len(lines) > of_file)
            long += [
                f"{name}:{number}: {len(line)} characters" for number, line in enumerate(lines, 1) if len(line) > 120
            ]
            for node in ast.walk(ast.parse(text)):
                most = {ast.ClassDef: of_class, ast.FunctionDef: of_function}.get(type(node), len(lines))
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.end_lineno - node.lineno + 1 > most:
                    long.append(f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert long == []
