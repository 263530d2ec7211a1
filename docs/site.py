"""What the documentation site has beside the pages in this folder; `make docs` runs it.

Pages of reference are made from the code: every command's help, the keys of a recipe, the settings
of every task. Links to files of the repository that are no pages, such as recipes, lead to copies
of them in the site.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("recipes/*.yaml", "examples/**/*.py", "*.md")
"""Files of the repository that pages may link to."""

_LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages and files of this folder, with those made from the code and those linked to."""
    pages = {
        "commands": commands(),
        "recipe": recipe_keys(),
        "tasks": task_settings(),
        "python": python_names(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            place = _copy_of(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, place, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links out of this folder turned to the copies."""
    folder = PurePosixPath(page.file.src_uri).parent

    def turned(link: re.Match[str]) -> str:
        target = os.path.normpath(f"docs/{folder}/{link[2]}{link[3]}")
        if target.startswith("docs/"):
            return link[0]
        return link[1] + os.path.relpath(_copy_of(target), str(folder))

    return _LINK.sub(turned, markdown)


def _copy_of(path: str) -> str:
    """Where the site has a file of the repository: as plain text, so that browsers show it."""
    return f"source/{path}.txt"


def commands() -> str:
    """Every command with its help, in the order of ``forgetless --help``."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from forgetless.cli.app import app

    group: Any = get_command(app)
    parts = ["# Commands\n\nEvery command answers `--help` with what stands here.\n"]
    for name, command in group.commands.items():
        if not command.hidden:
            env = {"COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
            shown = CliRunner().invoke(app, [name, "--help"], prog_name="forgetless", env=env)
            parts.append(f"## {name}\n\n```text\n{shown.stdout.strip()}\n```\n")
    return "\n".join(parts)


def recipe_keys() -> str:
    """The keys of a recipe: what each section says of them, and a table of types and defaults."""
    from forgetless.recipes.recipe import Recipe

    example = (ROOT / "recipes" / "own-model.yaml").read_text(encoding="utf-8")
    head = (
        "# Recipes\n\nA run is decided by its recipe alone: YAML with the keys below. "
        "`forgetless run recipe.yaml --check` says what is wrong with one, and `--set key=value` "
        f"changes a key from the command line.\n\nOne with every key:\n\n```yaml\n{example}```\n"
    )
    return "\n".join([head, *_sections("recipe", Recipe, set())])


def _sections(name: str, model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    seen.add(model)
    rows, below = [], []
    for key, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_shown(field.default)}`"
        kind = re.sub(r"[\w.]+\.(?=[A-Z])", "", str(field.annotation))
        kind = re.sub(r"<class '(\w+)'>|Annotated\[(\w+).*\]", r"\1\2", kind).replace("|", "or")
        rows.append(f"| `{key}` | {kind} | {default} |")
        below += [(key, part) for part in _models(field.annotation) if part not in seen]
    table = "\n".join(["| key | type | default |", "| --- | --- | --- |", *rows])
    text = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
    yield f"## {name}\n\n{text}\n\n{table}\n"
    for key, part in below:
        if part not in seen:
            kind = part.model_fields.get("kind")
            title = key if name == "recipe" else f"{name}.{key}"
            title += f": {get_args(kind.annotation)[0]}" if kind else ""
            yield from _sections(title, part, seen)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _shown(default: Any) -> str:
    """A default as YAML has it."""
    if isinstance(default, BaseModel):
        return "see below"
    return json.dumps(default, default=str).strip('"')


_PLAIN = """\
    options:
      show_root_heading: false
      show_root_toc_entry: false
      show_bases: false
      members: false
"""


def task_settings() -> str:
    """Every kind of task with what its class says of it."""
    from forgetless.tasks import TASKS

    parts = ["# Task settings\n\nWhat each `kind` of [task](../tasks.md) measures and takes.\n"]
    for kind, task in TASKS.items():
        parts.append(f"## {kind}\n\n::: {task.__module__}.{task.__name__}\n{_PLAIN}")
    return "\n".join(parts)


def python_names() -> str:
    """What `import forgetless` has, functions first."""
    import forgetless as fl

    parts = [
        "# Python\n\n`import forgetless as fl`. These names stay; what lies deeper may "
        "move between versions.\n"
    ]
    for name in sorted(fl.__all__, key=lambda name: (not name.islower(), name)):
        home = getattr(getattr(fl, name), "__module__", None) or "forgetless.methods"
        parts.append(f"::: {home}.{name}\n    options: {{inherited_members: false}}\n")
    return "\n".join(parts)
