"""What a run measures beside its trained weights: repairs, dial, comparators, residual, spectra.

    points/<label>/     scores and items at one setting, laid out like a step on the way
    aftercare.json      every setting with its drift and what it gives up, and the one taken
    repaired/           the adapter at the setting that was taken, a plain LoRA; of a model that was
                        tuned in whole, the model
    spectra.json        what the update of every layer is

The texts, one part to learn from and one held out, and the base's activations on the first part
lie in shared/aftercare/, for all runs of the study. On the new task's text a repair takes those of
the trained model, which are collected for each run and not kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from forgetless.adapters.dial import residual
from forgetless.adapters.repair import STRENGTHS
from forgetless.adapters.settings import Comparator, Ties
from forgetless.adapters.spectra import spectra
from forgetless.core.errors import UserError
from forgetless.core.files import (
    lock,
    new_folder,
    read_json,
    remove,
    temporary_name,
    write_json,
)
from forgetless.core.hashing import first_damaged
from forgetless.core.settings import without_idle
from forgetless.data.examples import source_hash
from forgetless.data.settings import DATA
from forgetless.data.texts import SELF, fingerprint
from forgetless.models.hashes import weights_hash
from forgetless.recipes.identity import base_key
from forgetless.recipes.recipe import Recipe
from forgetless.scores.cache import digest
from forgetless.statistics.moments import Statistics, is_statistics
from forgetless.studies.aftercare import (
    BASE,
    TRAINED,
    Adjustable,
    Bench,
    Point,
    Read,
    Reading,
    Setting,
    choose,
)
from forgetless.studies.folder import adapter_checksums, is_kept, note_files

if TYPE_CHECKING:
    from forgetless.studies.stages import Stages

_log = logging.getLogger(__name__)

RESIDUAL = "residual"
"""The label of the base without the start."""


def settings_of(recipe: Recipe) -> tuple[list[Setting], list[Setting]]:
    """The settings of a recipe's repair and of its dial, without the adapter as trained."""
    repairs: list[Setting] = []
    if recipe.repair is not None:
        strengths = STRENGTHS if recipe.repair.strength == "auto" else recipe.repair.strength
        repairs = [Setting(float(s), c) for s in strengths for c in recipe.repair.scales]
    turned = [Setting(scale=scale) for scale in (recipe.dial.scales if recipe.dial else ())]
    return [s for s in repairs if s != TRAINED], [s for s in turned if s != TRAINED]


class Beside:
    """What is measured beside the trained weights of one run."""

    def __init__(self, stages: Stages) -> None:
        self.stages, self.recipe, self.run = stages, stages.recipe, stages.folder

    # ------------------------------------------------------------------- repairs and the dial

    def aftercare(self) -> str | None:
        """Measure the settings that are not measured yet; how many scores that were, in words."""
        known, key = read_json(self.run.aftercare, damaged_as_missing=True), self._key()
        if known.get("key") != key:
            for label in known.get("points", ()):
                remove(self.run.point(label).path)
        elif first_damaged(self.run.repaired, known.get("files", {})) is None and not any(
            self.stages._missing("final", self.run.point(n)) for n in known["scored"]
        ):
            return None
        # With the name of what a killed process leaves, which the next one removes.
        name = temporary_name(self.run.path / "held").name
        with TemporaryDirectory(prefix=f"{name}-", dir=self.run.path) as place:
            return self._measured(key, Path(place))

    def _measured(self, key: str, place: Path) -> str:
        """How much was measured now, with the parts of the task's text in this folder."""
        repairs, turned = settings_of(self.recipe)
        adjustable, bench = self._bench(repairs, place)
        others = [Setting(comparator=label) for label in adjustable.comparators]
        held = bench.curve([BASE, TRAINED, *repairs, *turned, *others])
        taken = self._taken([p for p in held if p.setting in {TRAINED, *repairs}], repairs)
        scored = [*repairs, *turned, *others]
        if self.recipe.repair is not None and self.recipe.repair.strength == "auto":
            scored = [*({taken} if taken else ()), *turned, *others]
        scored = [setting for setting in dict.fromkeys(scored) if setting != TRAINED]
        if taken is not None:
            with new_folder(self.run.repaired) as folder:
                adjustable.write(taken, folder, self.stages.processor)
        count = sum(self._score(s.label, adjustable.at(s)) for s in scored)
        labels = [setting.label for setting in scored]
        if self.recipe.residual:
            start = adjustable.model.peft_config[adjustable.own].start or {}
            # Without a start the residual is the base.
            alone = residual(adjustable.model) if start.get("anchored") else adjustable.at(BASE)
            count += self._score(RESIDUAL, alone)
            labels.append(RESIDUAL)
        content = {
            "key": key,
            "points": {p.setting.label: self._described(adjustable, p) for p in held},
            "scored": labels,
            "repaired": taken.label if taken else None,
            "files": adapter_checksums(self.run.repaired),
        }
        write_json(self.run.aftercare, content, checked=True)
        self.stages._held = None  # the model has one more adapter now
        return f"{count} measurements at {len(labels)} settings"

    def _taken(self, points: Sequence[Point], repairs: Sequence[Setting]) -> Setting | None:
        """The only repair that was asked for, or the one to take; None where there is none."""
        wanted = self.recipe.repair
        if wanted is None or not repairs:
            return None
        if len(repairs) == 1:
            return repairs[0]
        try:
            return choose(points, max_kl=wanted.max_kl, max_drop=wanted.max_drop).setting
        except UserError as problem:  # the points are worth having all the same
            _log.warning("%s: no repair is taken: %s", self.run.path, problem)
            return None

    def _score(self, label: str, setting: AbstractContextManager[Any]) -> int:
        """Score the recipe's tasks at a setting where they are missing; how many."""
        folder = self.run.point(label)
        missing = self.stages._missing("final", folder)
        if missing:
            weights = self.stages._weights(self.run)
            with setting as model:
                for task, kind in missing:
                    self.stages._measure(folder, "final", task, kind, model, weights)
        return len(missing)

    def _described(self, adjustable: Adjustable, point: Point) -> dict[str, Any]:
        foreseen = adjustable.forecast(point.setting)
        values = point.to_json()
        del values["scores"]
        if wanted := adjustable.comparators.get(point.setting.comparator):
            told = adjustable.told(point.setting)
            values |= {"words": wanted.words, "lost_at_rank": told.lost_at_rank}
        return {**values, "kept_by_moments": foreseen.kept, "missed_by_moments": foreseen.missed}

    def _bench(self, repairs: Sequence[Setting], place: Path) -> tuple[Adjustable, Bench]:
        """The trained weights, and what measures them on held-out text."""
        trained, base = self.stages._trained_model(self.run), None
        if self.stages.full:
            base = self.stages._load_base()
        keep, task = self._texts(base if base is not None else trained, (trained, place))
        adjustable = Adjustable(
            trained,
            base if base is not None else trained,
            keep.statistics,
            task.statistics,
            [setting.strength for setting in repairs],
            self.recipe.comparators,
        )
        said, held = self.recipe.data.said, self._held_out or task.held
        return adjustable, Bench(adjustable, self.stages.processor, keep.held, held, said=said)

    def _texts(self, model: Any, tuned: tuple[Any, Path] | None = None) -> tuple[Read, Read]:
        """The text to keep and the new task's.

        That one is as the trained model reads it, where one is given with a folder for its parts.
        """
        reading, wanted = self._reading(model), self.recipe.repair
        keep = self._read(self.recipe.text_to_keep, "keep", reading.keep)
        if wanted is not None and wanted.task is None:
            return keep, Read(None, None)
        if tuned is not None:
            trained, place = tuned
            return keep, replace(reading, trained=trained).task(self._task_text(), place)
        return keep, self._read(self._task_text(), "task", reading.task)

    @property
    def _held_out(self) -> str | None:
        """What was held out of the training data; then nothing that was trained on is measured.

        On rows that it was trained on, a repair gives up what was learned of these by heart.
        """
        wanted = self.recipe.repair
        return self.recipe.data.held_out if wanted is None or wanted.task == DATA else None

    def _task_text(self) -> str:
        wanted = self.recipe.repair.task if self.recipe.repair is not None else DATA
        return self.recipe.data.sources[0][0] if wanted in (None, DATA) else str(wanted)

    # -------------------------------------------------------------------------------- spectra

    def spectra(self) -> str | None:
        """Look into the update of every layer."""
        if read_json(self.run.spectra, damaged_as_missing=True):
            return None
        trained = self.stages._trained_model(self.run)
        base = self.stages._load_base() if self.stages.full else trained
        keep, task = self._texts(base)
        with self.stages._spectra(base):
            found = spectra(
                trained,
                base if self.stages.full else None,
                keep.statistics,
                task_stats=task.statistics,
            )
        write_json(self.run.spectra, found.to_json(), checked=True)
        return f"{len(found)} layers"

    # ------------------------------------------------------------------------------ the texts

    def _reading(self, model: Any) -> Reading:
        recipe = self.recipe
        return Reading(
            model,
            self.stages.processor,
            recipe.adapter.target_modules,
            recipe.calibration,
            recipe.data,
            recipe.seed,
        )

    def _read(self, source: str, kind: str, read: Callable[[str, Path], Read]) -> Read:
        """A text, read once for all runs of the study that keep to it."""
        if is_statistics(source):
            return Read(Statistics.load(source), None)
        key = json.dumps(self._text_key(source, kind), sort_keys=True)
        folder = self.stages.shared / "aftercare" / digest(key)
        with lock(folder.with_suffix(".lock")):
            if not is_kept(folder):
                with new_folder(folder) as new:
                    statistics = read(source, new).statistics
                    assert statistics is not None
                    statistics.save(new)
                    note_files(new)
        return Read(Statistics.load(folder), folder / "held.jsonl")

    def _text_key(self, source: str, kind: str) -> dict[str, Any]:
        recipe = self.recipe
        how = recipe.calibration.model_dump(exclude={"source", "memory_budget", "batch_size"})
        if source != SELF:
            how["samples"] = recipe.calibration.count
        task = recipe.data.model_dump(include={"format", "max_length", "limit"})
        return {
            "kind": kind,
            **base_key(recipe),
            "target_modules": recipe.adapter.target_modules,
            "seed": recipe.seed,
            "source": source_hash(source, fingerprint),
            **how,
            **(task if kind == "task" else {}),
        }

    def _key(self) -> str:
        """What decides the settings and their measurement on held-out text."""
        wanted, turned = self.recipe.repair, self.recipe.dial
        content = {
            "repair": wanted and wanted.model_dump(exclude={"keep", "task"}),
            "dial": turned and turned.model_dump(),
            "residual": self.recipe.residual,
            "keep": self._source_key(self.recipe.text_to_keep, "keep"),
            "task": wanted and wanted.task and self._source_key(self._task_text(), "task"),
            "task_on": "trained",
        }
        if self._held_out is not None:
            content["held_out"] = source_hash(self._held_out, fingerprint)
        content |= without_idle(self.recipe.data.said, {"chat_template": "auto", "system": None})
        if self.recipe.comparators:
            content["comparators"] = [self._comparator_key(c) for c in self.recipe.comparators]
        return digest(json.dumps(content, sort_keys=True))

    def _comparator_key(self, wanted: Comparator) -> list[Any]:
        folders = wanted.adapters if isinstance(wanted, Ties) else []
        return [wanted.model_dump(), [weights_hash(folder) for folder in folders]]

    def _source_key(self, source: str, kind: str) -> Any:
        return source if is_statistics(source) else self._text_key(source, kind)
