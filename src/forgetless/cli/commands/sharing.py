"""An adapter that is done: exported, merged into its base, asked beside it, uploaded; the rest."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from peft import PeftModel
from torch import Tensor

from forgetless.adapters.folders import (
    START_FILE,
    ExportReport,
    declare_untied,
    export,
    load,
    untie_adapted,
)
from forgetless.adapters.foreign import require_usable
from forgetless.adapters.layer import adapted_layers, delta_weights
from forgetless.adapters.rounding import Rounded, compared, nf4
from forgetless.cli.commands.folders import (
    Trained,
    adapter_and_base,
    known_base,
    load_base,
    require_new,
)
from forgetless.core.errors import UserError, first_line, unknown
from forgetless.core.files import lock, new_folder, remove
from forgetless.data.modality import Batch, Processor, load_processor, modality_of
from forgetless.models.load import device_of, load_model, load_tuned, resolve_base
from forgetless.models.quantised import unavailable
from forgetless.models.state import adapter_off
from forgetless.models.weights import linear_weight
from forgetless.studies.card import write_run_card
from forgetless.studies.folder import RunFolder
from forgetless.studies.out_of_memory import out_of_memory
from forgetless.tasks.asking import as_asked
from forgetless.tasks.generation import generate

UPLOADED = ("adapter_config.json", "adapter_model.safetensors", "config.json", "README.md")
"""What an adapter's repository holds; nothing else that lies in the folder is uploaded."""


KL_OF_ANOTHER_BASE = 0.05
"""Nats per token beyond which a base other than that of the training is warned of."""


def export_adapter(
    source: str | Path, out: str | Path, rank: Any = "exact", base: str | None = None
) -> ExportReport:
    """Write a run's or a folder's adapter as a plain PEFT LoRA for the untouched base."""
    (trained, base), out = adapter_and_base(source, base), Path(out)
    require_new(out)
    model = load(load_base(base, trained.folder), trained.folder)
    with new_folder(out) as folder:
        report = export(model, folder, rank)
        if (run := RunFolder(Path(source))).recipe.exists():
            write_run_card(run, folder, report.relative_error)
    return replace(report, folder=out)


@dataclass(frozen=True)
class Merged:
    """What merging wrote, against the adapter on its base.

    Attributes:
        layers: of every weight that was changed, what rounding left of its update.
        stored: the same over all of them.
        four_bits: what storing the merged weights in 4 bits (nf4) would leave.
        difference: largest difference of the logits, on the probe of the base's modality.
        kl: in nats per token of the same probe, from the adapter on the base that it was trained
            on to the merged model; None where that is the very base.
    """

    layers: Mapping[str, Rounded]
    stored: Rounded
    four_bits: Rounded
    difference: float
    kl: float | None = None


def merge_adapter(
    source: str | Path, out: str | Path, base: str | None = None, dtype: str = "auto"
) -> Merged:
    """Write a model folder whose weights are W + scaling · B A, as it is when it is read back.

    An adapted layer that shares its weight with another module gets one of its own, and the
    folder's config says that the embeddings are not tied.

    Raises:
        UserError: a whole model, an adapter that is not for the base, or a base whose weights are
            packed, to which nothing can be added exactly; ``out`` is not empty.
    """
    require_new(Path(out))
    trained, name = adapter_and_base(source, base)
    model = load_base(name, trained.folder, dtype)
    if getattr(model, "quantization_method", None) is not None:
        raise UserError(f"the weights of {name} are packed; merge into the base before packing")
    require_usable(trained.folder, model)
    probe = modality_of(name).probe(model)
    adapted = load(model, trained.folder)
    wanted = _logits(adapted, probe)
    untie_adapted(adapted)
    with _explaining_refusals(source):
        sums, four_bits = _merge_layers(adapted)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            merged: Any = adapted.merge_and_unload()
    declare_untied(merged)
    in_memory = _logits(merged, probe)
    with new_folder(Path(out)) as folder:
        with _explaining_refusals(source):
            merged.save_pretrained(folder)
        load_processor(name).save_pretrained(folder)
        del model, adapted, merged
        found = _logits(load_model(str(folder), dtype=dtype), probe)
        if not torch.allclose(
            found, in_memory, rtol=1e-3, atol=1e-3 * float(in_memory.abs().max())
        ):
            raise UserError(
                f"{out} would say something else when it is loaded than the merged model does in "
                "memory, by up to "
                f"{float((found - in_memory).abs().max()):.3g} in the logits: its class shares or "
                "makes weights anew; serve the adapter beside the base instead"
            )
    kl = None
    is_other = trained.base is not None and resolve_base(trained.base) != resolve_base(name)
    is_packed = trained.loading.get("quantise") and unavailable(device_of()) is None
    if trained.base is not None and (is_other or is_packed):
        how: Mapping[str, Any] = trained.loading if is_packed else {"dtype": dtype}
        own = load(load_base(trained.base, trained.folder, **how), trained.folder)
        kl = _kl(_logits(own, probe), found)
    return Merged(
        layers={layer: Rounded.over({layer: one}) for layer, one in sums.items()},
        stored=Rounded.over(sums),
        four_bits=Rounded.over(four_bits),
        difference=float((found - wanted).abs().max()),
        kl=kl,
    )


@contextmanager
def _explaining_refusals(source: str | Path) -> Iterator[None]:
    """What PEFT or transformers cannot merge or write, in their words."""
    try:
        yield
    except RuntimeError as problem:
        if out_of_memory(problem):
            raise
        raise UserError(
            f"{source} cannot be merged: {first_line(problem).rstrip('.')}; serve it beside the "
            "base instead"
        ) from problem


Sums = dict[str, tuple[float, float, float]]
"""Layer -> what `compared` gives."""


@torch.no_grad()
def _merge_layers(model: PeftModel) -> tuple[Sums, Sums]:
    """Merge layer after layer, and compare each change, and that of 4 bits, with its update."""
    stored: Sums = {}
    four_bits: Sums = {}
    modules = adapted_layers(model)
    for name, before, delta_W in delta_weights(model):
        before = before.clone()  # a view of the weight where that is float32
        modules[name].merge()
        after = linear_weight(modules[name].get_base_layer()).float()
        stored[name] = compared(after - before, delta_W)
        four_bits[name] = compared(nf4(before + delta_W) - nf4(before), delta_W)
    return stored, four_bits


@torch.no_grad()
def _logits(model: Any, probe: Batch) -> Tensor:
    """In float32."""
    logits: Tensor = model.eval()(**probe).logits
    return logits.float()


def _kl(first: Tensor, second: Tensor) -> float:
    """KL(first || second), the mean over all positions."""
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@dataclass(frozen=True)
class Pair:
    """A base and what was trained of it, to be asked the same.

    Attributes:
        model: with the adapter on, or tuned in whole.
        base: of a model tuned in whole; None for the model with its adapter off.
    """

    model: Any
    base: Any
    tokenizer: Processor

    @classmethod
    def load(cls, source: str | Path, base: str | None = None, dtype: str = "auto") -> Pair:
        """Of a run, an adapter or a tuned model.

        Raises:
            UserError: no language model, or as `merge_adapter`.
        """
        trained = Trained.find(source)
        name = known_base(base, trained, source)
        if modality_of(name).own_texts is None:
            raise UserError(f"base {name!r} is a classifier, which gives no answers; see 'eval'")
        model, tokenizer = load_model(name, dtype=dtype), load_processor(name)
        if not trained.is_adapter:
            return cls(load_tuned(trained.folder, model), model, tokenizer)
        require_usable(trained.folder, model)
        return cls(load(model, trained.folder), None, tokenizer)

    def answers(
        self, prompt: str, max_new_tokens: int, template: str = "auto", system: str | None = None
    ) -> tuple[str, str]:
        """The greedy answers of the base and of what was trained.

        Raises:
            UserError: a template other than auto and off, or a system prompt without one.
        """
        if template not in ("auto", "off"):
            raise unknown("template", template, ("auto", "off"))
        prompts, rendered = as_asked([prompt], self.tokenizer, template, system)
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": (), "rendered": rendered}
        with adapter_off(self.model):
            (before,) = generate(self.base or self.model, self.tokenizer, prompts, **how)
        (after,) = generate(self.model, self.tokenizer, prompts, **how)
        return before.strip(), after.strip()


def push_adapter(
    source: str | Path, repository: str, *, private: bool = False, base: str | None = None
) -> str:
    """Upload an adapter, exported where it is none that PEFT loads; the address of what was made.

    Raises:
        UserError: a whole model, or the hub refuses.
    """
    trained, name = adapter_and_base(source, base)
    folder = RunFolder(Path(source)).shipped
    with tempfile.TemporaryDirectory(prefix="forgetless-push-") as place:
        if not folder.is_dir():
            folder = trained.folder
        if (folder / START_FILE).exists():
            folder = export_adapter(source, Path(place) / "adapter", base=name).folder
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            told = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=list(UPLOADED),
                commit_message="Upload a LoRA adapter",
            )
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as problem:
            said = str(problem).strip().splitlines()[0]
            raise UserError(
                f"the hub did not take {folder}: {said}; 'hf auth login' signs in"
            ) from None
    return str(told.commit_url)


# ---- what is left of studies ---------------------------------------------------------------------

_RESTORED = {
    "aftercare": "by the next repair",
    "rates": "by --find-lr",
    "scores": "by the next run",
    "spectra": "by the next start",
    "statistics": "by the next start",
}
"""Part of a study -> what makes it again where it is deleted."""


@dataclass(frozen=True)
class Part:
    """One folder that a study keeps for its next runs.

    Attributes:
        name: such as "spectra".
        size: in bytes.
    """

    name: str
    study: Path
    size: int

    @property
    def restored(self) -> str:
        """What makes it again where it is deleted."""
        return _RESTORED[self.name]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"part": self.name, "study": str(self.study), "bytes": self.size}


def kept_parts(folder: Path) -> list[Part]:
    """What the studies in a folder, or the study that it is, share among their runs, largest first.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give one of studies, such as runs")
    studies = [folder] if (folder / "shared").is_dir() else sorted(folder.glob("*/shared/.."))
    parts = [
        Part(name, study, sum(f.stat().st_size for f in place.rglob("*") if f.is_file()))
        for study in (each.resolve() for each in studies)
        for name in _RESTORED
        if (place := study / "shared" / name).is_dir()
    ]
    return sorted(parts, key=lambda part: -part.size)


def delete_parts(parts: Sequence[Part], names: Collection[str]) -> list[Part]:
    """Delete the parts of these names; those that were deleted.

    Raises:
        UserError: an unknown part, or a run of the study is at work.
    """
    for name in names:
        if name not in _RESTORED:
            raise unknown("part", name, _RESTORED)
    chosen = [part for part in parts if part.name in names]
    with ExitStack() as held:
        for file in {f for part in chosen for f in part.study.glob("*/.lock")}:
            if not held.enter_context(lock(file, wait=False)):
                raise UserError(f"the run {file.parent} is at work; nothing was deleted")
        for part in chosen:
            remove(part.study / "shared" / part.name)
    return chosen
