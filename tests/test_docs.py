"""What the documents name exists: pages, places on them, functions and tests."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "recipes").rglob("README.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def places(path: Path) -> set[str]:
    """The names that a page's headings get, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)).strip() for heading in headings)
    return {heading.lower().replace(" ", "-") for heading in kept}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, place = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not place or place in places(path), target


def test_the_functions_and_tests_of_paper_to_code_exist():
    text = (ROOT / "docs" / "paper_to_code.md").read_text()
    names, tests = set(re.findall(r"`(gpm_trl\.[\w.]+)`", text)), set(re.findall(r"`(tests/\w+\.py)::(\w+)`", text))
    assert len(names) > 15
    assert len(tests) > 15
    for name in names:
        parts = name.split(".")
        owner = importlib.import_module("gpm_trl")
        for index, part in enumerate(parts[1:], start=2):
            if not hasattr(owner, part):
                importlib.import_module(".".join(parts[:index]))
            owner = getattr(owner, part)
    for path, test in tests:
        assert f"def {test}(" in (ROOT / path).read_text(), test
    for owner, options in re.findall(r"`gpm_trl\.(\w+)`: ((?:`\w+`(?:, )?)+)", text):
        for option in re.findall(r"\w+", options):
            assert option in getattr(importlib.import_module("gpm_trl"), owner).__dataclass_fields__, option
