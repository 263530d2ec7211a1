"""What in a task file of lm-eval's form would run code. Neither torch nor lm_eval is imported."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from forgetless.core.errors import UserError
from forgetless.tasks.harness.index import tasks_folder


class _Function(str):
    """The name of a function that the harness would import from a file beside the YAML."""


class _Loader(yaml.SafeLoader):
    """Knows the harness's tag, and runs nothing."""


_Loader.add_constructor("!function", lambda _, node: _Function(f"!function {node.value}"))


def own_code(file: Path) -> list[str]:
    """Every setting of a file, and of those that it includes, that would run code; in words.

    The harness's own files are not looked at, as they come with the package. Templates of Jinja do
    not count: they are rendered in a sandboxed environment.

    Raises:
        UserError: a file cannot be read, so that nobody knows what is in it.
    """
    found: list[str] = []
    left, seen, packaged = [file.resolve()], set(), tasks_folder().resolve()
    while left:
        path = left.pop()
        if path in seen or packaged in path.parents:
            continue
        seen.add(path)
        try:
            with path.open("rb") as opened:
                content = yaml.load(opened, Loader=_Loader)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
            line = " ".join(str(problem).split())
            raise UserError(f"{path} cannot be read: {line}") from None
        found += [f"{where} ({what}) in {path}" for where, what in _calls(content, "")]
        included = content.get("include", []) if isinstance(content, dict) else []
        names = included if isinstance(included, list) else [included]
        left += [(path.parent / str(name)).resolve() for name in names]
    return found


def _calls(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Places below a value that would run code, each with what."""
    if isinstance(value, _Function):
        yield where, value
    elif isinstance(value, dict):
        metric = value.get("metric")
        # A function is found below; any other name than the harness's own is a script's.
        is_script = value.get("hf_evaluate") or metric not in _metrics()
        if type(metric) is str and is_script:
            yield where, f"the metric {metric!r}, a script that the package 'evaluate' loads"
        for key, inner in value.items():
            yield from _calls(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _calls(inner, where)


@lru_cache(maxsize=1)
def _metrics() -> frozenset[str]:
    """The names of the harness's own metrics."""
    text = (tasks_folder().parent / "api" / "metrics.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r"metric=\"([^\"]+)\"", text))
