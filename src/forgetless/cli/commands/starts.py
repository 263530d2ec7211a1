"""An adapter before its first step, and the statistics that its start may need."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.adapters.folders import load, save
from forgetless.adapters.foreign import require_usable
from forgetless.adapters.settings import AdapterSettings
from forgetless.cli.commands.folders import Trained, load_base, require_new
from forgetless.core.errors import RecipeError, UserError
from forgetless.core.files import new_folder
from forgetless.core.method import Method
from forgetless.data.modality import load_processor
from forgetless.data.settings import CalibrationSettings, DataSettings
from forgetless.methods import find
from forgetless.models.load import load_model, meta_model
from forgetless.models.targets import target_layers
from forgetless.recipes.checking import Checker
from forgetless.statistics.moments import Statistics
from forgetless.studies.inputs import ARGUMENT, Collecting
from forgetless.studies.stages import attached


def collect_statistics(
    base: str,
    settings: CalibrationSettings,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: str = "auto",
    seed: int = 0,
    unfinished: Path | None = None,
    adapter: str | None = None,
) -> Statistics:
    """The statistics of the base's activations on a calibration text, or with an adapter on it.

    An interrupted call goes on from the folder ``unfinished``, where other settings have another
    place; the statistics may read from it until they are saved.
    """
    # A name that matches nothing shows here.
    target_layers(meta_model(base, bare=adapter is not None), target_modules)
    asked = AdapterSettings(target_modules=target_modules)
    collecting = Collecting(asked, settings, seed=seed)
    collecting.check_texts({"second_moment"})
    folder = None if adapter is None else Trained.find(adapter).folder
    model, processor = load_base(base, folder, dtype), load_processor(base)
    if folder is not None:
        require_usable(folder, model)
        model = load(model, folder)
    place = hashlib.sha256(repr((base, dtype, collecting, adapter)).encode()).hexdigest()[:16]
    checkpoint = None if unfinished is None else unfinished / place
    found = collecting.collect("second_moment", model, processor, checkpoint, adapter is not None)
    assert isinstance(found, Statistics)
    return found


@dataclass(frozen=True)
class Start:
    """An adapter before its first step, written into a folder.

    Attributes:
        obstacle: why a trainer that knows only PEFT cannot continue it as the method means; None
            where it can.
    """

    folder: Path
    obstacle: str | None


def init(
    base: str,
    settings: AdapterSettings,
    out: str | Path,
    *,
    source: CalibrationSettings | Statistics | None = None,
    data: DataSettings | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Start:
    """Write the start of an adapter, for whatever trains it.

    A start that adds nothing to the base and trains both factors is a plain LoRA, which every
    PEFT-based trainer continues. The others are written in the package's own form.

    Raises:
        RecipeError: unknown method or option, a rank that does not fit, no such layers.
        UserError: the method needs statistics and ``source`` is None; ``out`` is not empty.
    """
    out = Path(out)
    require_new(out)
    problems = Checker().adapter(base, settings)
    if problems:
        raise RecipeError("init", problems)
    method = find(settings.method)
    if method.factors is None:
        raise UserError("method 'full' trains the weights themselves: there is no adapter to start")
    _check_inputs(method, source, data)
    given = {"stats": source} if isinstance(source, Statistics) else {}
    asked = source if isinstance(source, CalibrationSettings) else CalibrationSettings()
    collecting = Collecting(settings, asked, data, seed)
    needs = sorted(need for need in method.needs if ARGUMENT[need] not in given)
    collecting.check_texts(needs)
    model = load_model(base, dtype=dtype)
    processor = load_processor(base) if needs else None
    inputs = {ARGUMENT[need]: collecting.collect(need, model, processor) for need in needs}
    model = attached(settings, model, given | inputs, seed)
    with new_folder(out) as folder:
        save(model, folder)
    return Start(out, _obstacle(settings.method, model.peft_config["default"].start))


def _check_inputs(
    method: Method, source: CalibrationSettings | Statistics | None, data: DataSettings | None
) -> None:
    """Raise unless there is a text for every need of the method."""
    if "second_moment" in method.needs and source is None:
        raise UserError(
            f"method {method.name!r} needs to know what to keep: give --calibration FILE, "
            "--calibration self (text sampled from the base), or --stats FOLDER"
        )
    if method.needs - {"second_moment"} and data is None:
        raise UserError(
            f"method {method.name!r} looks at the new task: give its training data by --data FILE"
            + ("" if source is None else "; --stats and --calibration are of the text to keep")
        )


def _obstacle(method: str, start: Mapping[str, Any]) -> str | None:
    """Why a trainer that knows only PEFT cannot train this start as the method means it."""
    if start["anchored"]:
        return (
            f"{method!r} does not start from the base itself: a plain LoRA with these factors "
            "would change the base before the first step"
        )
    frozen = {"A", "B"} - set(start["trains"])
    if frozen:
        return f"{method!r} keeps {frozen.pop()} frozen, and PEFT would train it"
    return None
