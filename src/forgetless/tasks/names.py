"""What a task may be called: a kind, a task of lm-eval, a suite of tasks, or a YAML file."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError, unknown
from forgetless.core.files import folder_name, load_yaml, not_there
from forgetless.core.plugins import is_named
from forgetless.data.sources import Source
from forgetless.tasks.harness.index import find, is_installed
from forgetless.tasks.harness.layouts import STANDARD

Settings = dict[str, Any]

_PAPERS = {
    "commonsense": ("hellaswag", "arc_challenge", "winogrande"),
    "world-knowledge": ("triviaqa", "nq_open", "webqs"),
    "math": ("gsm8k", "hendrycks_math"),
    "code": ("humaneval", "mbpp"),
}

SUITES: Mapping[str, tuple[str, ...]] = {
    **_PAPERS,
    "papers": tuple(task for suite in _PAPERS.values() for task in suite),
}
"""Tasks that the papers on forgetting report together, by the suite's name."""

_FILES = (".yaml", ".yml")


def resolved(spec: str | Mapping[str, Any], kinds: Mapping[str, Collection[str]]) -> list[Settings]:
    """The tasks that a spec stands for, each as a mapping with a known kind and its settings.

    Args:
        spec: the name of a kind, with a colon before its file ("perplexity:notes.txt") where it
            reads one, of a task of lm-eval or of a suite; a YAML file with a task of one's own, or
            with one in lm-eval's form; or a mapping with such a name as its "kind" (or "name") and
            settings, which a suite hands on to the tasks that have them.
        kinds: the settings of each kind by its name.

    Raises:
        UserError: a name that is none of these, or a broken file.
    """
    settings: Settings = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = settings.pop("kind", settings.get("name"))
    if kind is None:
        raise UserError(f"a task needs a 'kind', one of {', '.join(kinds)}; got {dict(settings)!r}")
    name = str(kind)
    of, _, file = name.partition(":")
    if file and of in kinds:
        source = Source.of(file)
        called = folder_name(f"{of}_{Path(source.name).stem}{'_held' * source.held}")
        return [{"kind": of, "path": file, "name": called, **settings}]
    if file and not file.isidentifier():
        raise unknown("task", of, [*kinds, *SUITES])
    if name in kinds or is_named(name):
        return [{"kind": name, **settings}]
    if name.endswith(_FILES):
        content = _own_task(Path(name))
        if content is None:
            return [{"kind": "lm_eval", "task": name, **settings}]
        return resolved({**content, **settings}, kinds)
    if name in SUITES:
        settings.pop("name", None)
        tasks = []
        for member in SUITES[name]:
            known = kinds.get(member, kinds["lm_eval"])
            own = {key: value for key, value in settings.items() if key in known}
            tasks += resolved({"kind": member, **own}, kinds)
        return tasks
    if name in STANDARD or (is_installed() and find(name) is not None):
        return [{"kind": "lm_eval", "task": name, **settings}]
    raise unknown("task", name, [*kinds, *SUITES, *STANDARD])


def _own_task(path: Path) -> Settings | None:
    """The settings in the file of a task of one's own; None for a file in lm-eval's form.

    lm-eval's files have no 'kind', and tags that are its own.
    """
    if not path.is_file():
        raise UserError(not_there(path))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    theirs = any(line.startswith(("task:", "include:", "group:")) for line in lines)
    if theirs and not any(line.startswith("kind:") for line in lines):
        return None
    content = load_yaml(path)
    if "kind" not in content:
        raise UserError(
            f"{path}: a task needs a 'kind', one of multiple_choice, generate, perplexity and what "
            "else 'forgetless tasks' lists"
        )
    source = content.get("path")
    if isinstance(source, str) and (path.parent / Source.of(source).name).exists():
        content = {**content, "path": str(path.parent / source)}
    return {"name": path.stem, **content}
