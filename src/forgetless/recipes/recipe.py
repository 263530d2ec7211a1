"""A recipe: everything that decides a run, as data.

A recipe is written in YAML, read into the models below (an unknown key or a bad value is an error
that names what is allowed) and never changes afterwards.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from forgetless.adapters.settings import (
    AdapterSettings,
    Comparator,
    DialSettings,
    ExportSettings,
    RepairSettings,
)
from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import load_yaml
from forgetless.core.settings import Name, Section, validated, with_overrides
from forgetless.data.settings import DATA, CalibrationSettings, DataSettings
from forgetless.models.trust import trust
from forgetless.tasks.settings import TaskSettings
from forgetless.training.settings import ProbeSettings, TrainingSettings


class EarlierSettings(Section):
    """What the inputs of earlier tasks count against the base's text to keep.

    A token of theirs counts ``weight`` times one of the text, and all of them together at most the
    share ``most``.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    most: Annotated[float, Field(gt=0, lt=1)] = 0.9


class SequenceSettings(Section):
    """The place of a run in a sequence of tasks; see docs/sequences.md.

    ``after`` is the id of the run whose task came before, in the same folder. ``between`` says what
    becomes of the earlier adapters: ``continue`` trains that run's weights on; ``stack`` leaves
    them as they are beside a new one; ``merge`` adds them to the weights from which a new one
    starts, in memory alone. What is trained comes to one adapter for the base in any case.
    ``apart`` is the weight of the penalty that keeps a new adapter's inputs orthogonal to those of
    the earlier ones (O-LoRA, normalised).
    ``classes`` are those of the new head over which the loss runs; without, all of it.
    """

    after: Name | None = None
    between: Literal["continue", "stack", "merge"] = "continue"
    earlier: EarlierSettings = EarlierSettings()
    apart: Annotated[float, Field(gt=0)] | None = None
    classes: list[str] | None = None


Placement = Literal["auto", "balanced", "balanced_low_0", "sequential"]

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


class Recipe(Section):
    """Everything that decides one run.

    Paths are taken from the working directory. ``name`` is for people and decides nothing.
    ``trust_remote_code`` lets the Python code that lies beside the base's weights run.
    ``quantise``, ``device_map`` and ``attn_implementation`` say how the base is loaded, see
    `forgetless.models.load.load_model`.
    """

    name: Name | None = None
    base: Name
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantise: Literal["nf4", "int8"] | None = None
    device_map: Placement | dict[str, int | str] | None = None
    attn_implementation: Attention | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    adapter: AdapterSettings = AdapterSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    data: DataSettings
    training: TrainingSettings
    sequence: SequenceSettings | None = None
    probes: ProbeSettings = ProbeSettings()
    penalties: list[dict[str, Any]] = []
    export: ExportSettings = ExportSettings()
    repair: RepairSettings | None = None
    dial: DialSettings | None = None
    comparators: list[Comparator] = []
    residual: bool = False
    spectra: bool = False
    tasks: TaskSettings = TaskSettings()

    @model_validator(mode="after")
    def _trusts(self) -> Self:
        if self.trust_remote_code:
            trust(self.base)
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """The recipe of a YAML file, with dotted ``overrides`` put over it.

        Raises:
            FileNotFoundError: there is no such file.
            RecipeError: one line for each key or value that is wrong.
        """
        return cls.parse(load_yaml(path), overrides, source=str(path))

    @classmethod
    def parse(
        cls,
        content: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        *,
        source: str = "recipe",
    ) -> Self:
        """The recipe of a mapping such as YAML gives; raises ``RecipeError`` with all problems."""
        if "recipe" in content and ("axes" in content or "arms" in content):
            raise RecipeError(source, ["this is a study; run it with 'forgetless study'"])
        return validated(cls, with_overrides(content, overrides or {}), source)

    def override(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with dotted keys replaced, such as ``{"training.steps": 10}``."""
        return self.parse(self.model_dump(), overrides, source=self.name or "recipe")

    @property
    def loading(self) -> dict[str, Any]:
        """How its base is loaded: arguments of `load_model`."""
        names = {"dtype", "quantise", "device_map", "attn_implementation"}
        return self.model_dump(include=names)

    @property
    def after(self) -> str | None:
        """The id of the run whose task came before in a sequence."""
        return None if self.sequence is None else self.sequence.after

    @property
    def starts_anew(self) -> bool:
        """Whether its adapter is attached, and not one that another run trained."""
        return self.sequence is None or not (
            self.sequence.after and self.sequence.between == "continue"
        )

    @property
    def is_repaired(self) -> bool:
        """Whether the repair is part of the training, as in a sequence, and not beside it."""
        return self.sequence is not None and self.repair is not None

    @property
    def text_to_keep(self) -> str:
        """The text that the repair, the dial and the spectra are about.

        Raises:
            UserError: the recipe names none, or several.
        """
        if self.repair is not None and self.repair.keep is not None:
            return self.repair.keep
        sources = [source for source, _ in self.calibration.sources]
        if len(sources) != 1 or sources[0] == DATA:
            raise UserError(
                "the calibration names no single text to keep; give repair.keep, a file or 'self'"
            )
        return sources[0]

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that ``load`` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
