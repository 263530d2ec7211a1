"""The pages say what is there: names of the package exist, recipes parse, pages are in the site."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from forgetless.core.files import load_yaml
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.search import SearchRecipe
from forgetless.recipes.sequence import SequenceRecipe
from forgetless.recipes.study import StudyRecipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BESIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
TEXTS = [*PAGES, *(ROOT / name for name in BESIDE)]
NAMES = sorted(
    {
        (page.relative_to(ROOT).as_posix(), name)
        for page in TEXTS
        for name in re.findall(r"\bforgetless(?:\.[A-Za-z_]\w*)+", page.read_text("utf-8"))
        if name.rpartition(".")[2] not in ("json", "md", "yaml", "methods", "tasks", "penalties")
    }
)
YAML = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in TEXTS
    for number, block in enumerate(
        re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    )
    if re.search(r"^name: ", block, flags=re.MULTILINE)
]


@pytest.mark.parametrize(("page", "name"), NAMES)
def test_a_name_of_the_package_exists(page: str, name: str) -> None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return


@pytest.mark.parametrize("block", YAML)
def test_a_whole_definition_parses(block: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(block, encoding="utf-8")
    definition = load_yaml(path)
    if {"tasks", "split"} & definition.keys() and "recipe" in definition:
        SequenceRecipe.load(path)
    elif "space" in definition:
        SearchRecipe.load(path).asked()
    elif "recipe" in definition:
        StudyRecipe.load(path).recipes()
    else:
        Recipe.load(path)


def test_every_page_is_in_the_sites_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    made = {"reference/commands.md", "reference/recipe.md", "reference/tasks.md"}
    made |= {"reference/python.md"}
    listed = set(re.findall(r": (\S+\.md)$", text, flags=re.MULTILINE))
    assert listed == made | {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
