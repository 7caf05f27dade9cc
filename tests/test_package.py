"""The package as a whole: what it exports, what may import what, and that documents do not drift."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpm_trl

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gpm_trl"
ROOMS = {
    "preference": set(),
    "games": set(),
    "saving": set(),
    "models": {"preference"},
    "data": {"models"},
    "scorer": {"preference", "games", "models", "data"},
    "pipeline": {"data", "scorer"},
    "plots": set(),
    "evaluation": {"preference", "games", "models", "data", "scorer"},
    "gpm": {"preference", "models", "data", "saving"},
    "gpo": {"preference", "models", "data", "saving", "scorer", "gpm"},
    "gprl": {"preference", "saving", "gpm", "gpo"},
    "cli": {"models", "data", "games", "preference", "saving", "scorer", "evaluation", "plots", "gpm", "gpo", "gprl"},
}
FOREIGN = {
    "preference": {"torch"},
    "games": {"numpy", "scipy"},
    "saving": {"torch", "transformers", "accelerate", "safetensors", "filelock"},
    "models": {"torch", "transformers", "safetensors", "peft", "accelerate"},
    "data": {"torch", "transformers", "datasets", "accelerate"},
    "scorer": {"torch", "transformers", "accelerate"},
    "pipeline": {"transformers"},
    "plots": {"numpy", "matplotlib"},
    "evaluation": {"numpy", "scipy", "torch", "transformers", "datasets", "accelerate"},
}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_is_light_and_registers_the_model():
    modules = loaded_by(
        "import gpm_trl; from transformers import AutoConfig; assert AutoConfig.for_model('gpm').embedding_dim == 6"
    )
    assert not {"trl", "peft", "datasets"} & modules


@pytest.mark.parametrize("name", gpm_trl.__all__)
def test_public_names_are_documented_functions_with_their_arguments(name):
    thing = getattr(gpm_trl, name)
    assert len(inspect.getdoc(thing)) > 80
    if inspect.isfunction(thing):
        for argument in inspect.signature(thing).parameters:
            assert re.search(rf"\b{argument}\b.*\((`|\[`)", thing.__doc__), argument


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Rooms of the package, and other packages, that a module imports."""
    parts = path.relative_to(PACKAGE).parts
    room = parts[0].removesuffix(".py")
    rooms, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == len(parts):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            rooms.update(name.split(".")[0] for name in names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign.update(alias.name.split(".")[0] for alias in node.names)
    return rooms - {room}, foreign - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    rooms, foreign = imports_of(path)
    if room != "__init__":
        assert rooms <= ROOMS[room]
        assert foreign <= FOREIGN.get(room, foreign)
    if room not in ("gpm", "gpo", "gprl", "cli"):
        assert "trl" not in foreign


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_named_in_documents_exist(document):
    paths = re.findall(r"\b((?:recipes|docs|tests|gpm_trl)/[\w./-]*\w)", document.read_text())
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_changelog_names_the_version():
    assert gpm_trl.__version__.removesuffix(".dev0") in (ROOT / "CHANGELOG.md").read_text()
