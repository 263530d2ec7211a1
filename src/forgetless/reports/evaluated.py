"""The report of an evaluation: the same page, for a base and what was made from it elsewhere."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from forgetless.core.errors import UserError
from forgetless.core.files import folder_name, read_json, remove, write_json, write_text
from forgetless.scores.files import write_score
from forgetless.studies.folder import RunFolder, run_folders
from forgetless.tasks.base import TaskResult

CONFIG_FILE = "adapter_config.json"


def write_evaluation(
    folder: str | Path,
    base: str,
    adapter: str | Path,
    before: Mapping[str, TaskResult],
    after: Mapping[str, TaskResult],
    *,
    learning: Collection[str] = (),
    command: str | None = None,
) -> Path:
    """Write the scores of a base and of an adapter on it so that `report` can show them.

    Further adapters may be written into the same folder: each becomes one arm of the page.

    Args:
        folder: of evaluations, as a study's folder is one of runs; need not exist.
        base: its name.
        adapter: the adapter, run or model that was scored; its folder's name names the arm.
        before: the base's scores.
        after: the adapter's.
        learning: tasks that training should raise; the others are of forgetting.
        command: what measured them, for the page.

    Returns:
        The folder.

    Raises:
        UserError: `folder` holds something else.
    """
    folder, adapter = Path(folder), Path(adapter)
    if folder.is_dir() and any(folder.iterdir()) and not _holds_evaluations(folder):
        raise UserError(f"{folder} holds something else; give a new folder for the report")
    run = RunFolder(folder / folder_name(adapter.resolve().name))
    remove(run.path)
    for phase, scores in (("base", before), ("final", after)):
        for name, result in scores.items():
            lines = [item.to_json() for item in result.items]
            files = run.scores(phase, name), run.items(phase, name)  # type: ignore[arg-type]
            write_score(*files, result.to_json(), lines)
    recipe = _recipe(base, adapter)
    write_text(run.recipe, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    kinds = {name: "learning" if name in learning else "forgetting" for name in after}
    # Learning comes first, as in a recipe.
    tasks = dict(sorted(kinds.items(), key=lambda entry: entry[1] != "learning"))
    write_json(run.record, {"status": "done", "tasks": tasks, "evaluation": command or True})
    return folder


def _holds_evaluations(folder: Path) -> bool:
    return any(read_json(r.record).get("evaluation") for r in run_folders(folder))


def _recipe(base: str, adapter: Path) -> dict[str, Any]:
    """What is known of how the adapter was made, in the form of a recipe."""
    found = [folder / CONFIG_FILE for folder in (adapter, adapter / "native")]
    config = next((c for path in found if (c := read_json(path))), {})
    start = config.get("start") or {}
    targets = config.get("target_modules")
    return {
        "name": adapter.resolve().name,
        "base": base,
        "seed": None,
        "adapter": {
            "method": start.get("method", "lora" if config else "full"),
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "target_modules": sorted(targets) if isinstance(targets, list) else targets or "all",
        },
        "training": {"learning_rate": None, "steps": None, "weight_decay": None},
    }
