"""What a method needs to know besides the weights: collected on the text to keep and the task's.

need            text                                              made by
second_moment   `calibration.source`                              statistics.collect
task_moment     the training data                                 statistics.collect
gradient        the training data, only the learned tokens        statistics.collect_gradients
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from forgetless.adapters.settings import AdapterSettings
from forgetless.core.errors import UserError
from forgetless.core.files import new_folder
from forgetless.core.processes import Processes
from forgetless.core.tensors import read_tensors, write_tensors
from forgetless.data.examples import load_examples
from forgetless.data.modality import Batch, Processor, modality_of, training_batches
from forgetless.data.settings import DATA, CalibrationSettings, DataSettings
from forgetless.data.texts import SELF, fingerprint, padded
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.collection import collect
from forgetless.statistics.gradients import Gradients, collect_gradients
from forgetless.statistics.moments import Statistics
from forgetless.statistics.own_text import settled_text

ARGUMENT = {"second_moment": "stats", "task_moment": "task_stats", "gradient": "gradients"}
"""Need -> the argument of `attach` that answers it."""

Batches = list[Batch]


def load_inputs(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The arguments of `attach` that hold what lies in a folder for every need."""
    return {
        ARGUMENT[need]: (Gradients if need == "gradient" else Statistics).load(folder)
        for need, folder in folders.items()
    }


@dataclass(frozen=True)
class Collecting:
    """Everything that decides what is collected, but for the model.

    Attributes:
        calibration: the text to keep, and how much of every text.
        data: the training data; None where there is none.
    """

    adapter: AdapterSettings
    calibration: CalibrationSettings
    data: DataSettings | None = None
    seed: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> Collecting:
        """What a recipe asks for."""
        return cls(recipe.adapter, recipe.calibration, recipe.data, recipe.seed)

    def _sources(self, need: str) -> list[tuple[str, float]]:
        """The texts of a need with their weights."""
        return self.calibration.sources if need == "second_moment" else [(DATA, 1.0)]

    def collect(
        self,
        need: str,
        model: PreTrainedModel,
        processor: Processor,
        checkpoint: Path | None = None,
        adapters_on: bool = False,
    ) -> Statistics | Gradients:
        """Collect one need of the method.

        Args:
            need: a key of `ARGUMENT`.
            model: the base.
            processor: the base's.
            checkpoint: a folder from which an interrupted call is resumed; what is returned may
                read from it.
            adapters_on: as in `forgetless.collect`; not for gradients.

        Raises:
            UserError: the training data is needed and there is none; or as `collect`.
        """
        targets, budget = self.adapter.target_modules, self.calibration.memory_budget
        skip_first = self.calibration.skip_first
        if need == "gradient":
            return collect_gradients(model, self._text(DATA, model, processor), targets, budget)
        parts = []
        for number, (source, weight) in enumerate(self._sources(need)):
            # Other batches have sums of their own: less at a time may be tried after a failure.
            own = f"{number}-by-{self.calibration.batch_size}"
            kept = None if checkpoint is None else checkpoint / own
            text = self._text(source, model, processor, kept if source == SELF else None)
            found = collect(
                model,
                text,
                targets,
                budget,
                skip_first=skip_first,
                checkpoint=kept,
                adapters_on=adapters_on,
            )
            parts.append((found, weight))
        return parts[0][0] if len(parts) == 1 else Statistics.mixture(parts)

    def check_texts(self, needs: Iterable[str]) -> None:
        """Raise what is wrong with the texts of these needs, before any weight is loaded.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: a text that cannot be read, or no training data where it is needed.
        """
        for source in sorted({source for need in needs for source, _ in self._sources(need)}):
            if source == DATA:
                load_examples(self._training_data().sources[0][0], limit=1)
            else:
                fingerprint(source)

    def _text(
        self, source: str, model: PreTrainedModel, processor: Processor, folder: Path | None = None
    ) -> Batches:
        """The batches of a source; with a folder, those that it has from an interrupted call.

        What a base says on one machine it does not say on another, and a collection is resumed
        with the same text only.
        """
        settings = self.calibration
        counts: dict[str, Any] = {"samples": settings.count, "batch_size": settings.batch_size}
        if source == DATA:
            data, has_new = self._training_data(), self.adapter.has_new_head
            return training_batches(
                data.sources[0][0],
                model,
                processor.under("new") if has_new else processor,
                max_length=data.max_length,
                **data.reading,
                seed=self.seed,
                **counts,
            )
        length = settings.max_length

        def made() -> Batches:
            modality = modality_of(model)
            if source == SELF and settings.samples == "auto" and modality.own_texts is not None:
                targets = self.adapter.target_modules
                said = settled_text(model, processor, targets, settings, self.seed)
                return padded(said, settings.batch_size)
            how = {"max_length": length, "seed": self.seed, **counts}
            return modality.batches(source, model, processor, **how)

        if folder is None:
            return made()
        file = folder / "text.safetensors"

        def write() -> None:
            if not file.exists():
                flat = {f"{i}.{n}": v for i, batch in enumerate(made()) for n, v in batch.items()}
                with new_folder(folder) as new:
                    write_tensors(flat, new / file.name)

        Processes.current().first(write)
        kept: dict[int, Batch] = {}
        for key, value in read_tensors(file).items():
            number, _, name = key.partition(".")
            kept.setdefault(int(number), {})[name] = value
        return [kept[number] for number in sorted(kept)]

    def _training_data(self) -> DataSettings:
        if self.data is None:
            raise UserError(
                f"the calibration source {DATA!r} stands for the training data of a recipe, and "
                "there is none here; name the file"
            )
        return self.data
