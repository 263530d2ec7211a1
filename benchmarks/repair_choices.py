"""The choices that a repair has, on the pocket world: each variant on the same trained adapters.

    python benchmarks/repair_choices.py --runs DIR/aftercare --out FILE.json

DIR is that of benchmarks/aftercare.py, whose runs are repaired here in other ways than the package
does it. All of a variant's settings are measured on the same questions; what counts is how many
facts are kept among the settings with at least so much of the skill as trained.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from forgetless.adapters.layer import adapted_layers
from forgetless.adapters.repair import factors_of, on_base
from forgetless.core.files import write_json
from forgetless.core.method import Factors
from forgetless.core.projection import repaired
from forgetless.core.spectra import output_energy
from forgetless.data.modality import training_batches
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.collection import collect
from forgetless.tasks.evaluation import evaluate

STRENGTHS = (0.03, 0.1, 0.3)
LEARNED, KEPT = "pocket_problems", "pocket_recall"

Moments = Mapping[str, Tensor]
"""Layer -> (in, in), float64."""


class Trained:
    """An adapter on the pocket base, with everything that the variants look at.

    Attributes:
        base: the untouched model.
        model: the base with a plain copy of the adapter.
        factors: its A and B.
        C: second moments of the base's inputs on the text to keep.
        T: those on the new task's text.
    """

    def __init__(self, run: Path) -> None:
        self.base = load_model("pocket", dtype="float32", device="cpu")
        self.tokenizer = load_tokenizer("pocket")
        self.keep_text = batches("pocket:knowledge", self.base, self.tokenizer)
        self.task_text = training_batches(
            "pocket:problems", self.base, self.tokenizer, max_length=128
        )
        for batch in self.task_text:
            batch.pop("labels")
        # Before the adapter is on it: PEFT puts its layers into the base itself.
        self.C = self.moments(self.base, self.keep_text)
        self.T = self.moments(self.base, self.task_text)
        self.model, self.name = on_base(run / "native", self.base)
        self.factors = {
            name: Factors(A=f.A.detach().double(), B=f.B.detach().double())
            for name, f in factors_of(self.model, self.name).items()
        }

    def moments(self, model: Any, text: Any) -> Moments:
        """Of every linear layer but the head."""
        found = collect(model, text)
        return {name: layer.second_moment.double() for name, layer in found.items()}

    def weight(self, name: str) -> Tensor:
        """W of a layer of the base, (out, in)."""
        layer = adapted_layers(self.model, self.name)[name]
        weight: Tensor = layer.get_base_layer().weight
        return weight.detach().double()

    def merged(self, changed: Mapping[str, Factors]) -> Any:
        """A copy of the base with these updates in its weights."""
        self.put(changed)
        return copy.deepcopy(self.model).merge_and_unload()

    @torch.no_grad()
    def put(self, changed: Mapping[str, Factors]) -> PeftModel:
        """The model, whose adapter has these factors."""
        for name, layer in adapted_layers(self.model, self.name).items():
            layer.lora_A[self.name].weight.copy_(changed[name].A)
            layer.lora_B[self.name].weight.copy_(changed[name].B)
        return self.model


def with_moments(t: Trained, strength: float, C: Moments, T: Moments | None) -> dict[str, Factors]:
    """The package's own repair, with these moments."""
    return {
        name: Factors(A=repaired(f.A, C[name], None if T is None else T[name], strength), B=f.B)
        for name, f in t.factors.items()
    }


def raw(t: Trained, strength: float) -> Mapping[str, Factors]:
    """Both moments of the base's activations."""
    return with_moments(t, strength, t.C, t.T)


def normalised(t: Trained, strength: float) -> Mapping[str, Factors]:
    """Both moments divided by their mean diagonal, layer by layer."""
    C, T = ({n: m / m.diagonal().mean() for n, m in each.items()} for each in (t.C, t.T))
    return with_moments(t, strength, C, T)


def equal_shares(t: Trained, strength: float) -> Mapping[str, Factors]:
    """Per layer: C and T in units of what the layer's update does on each of the texts."""
    return in_shares(t, strength, t.T)


def in_shares(t: Trained, strength: float, task: Moments) -> Mapping[str, Factors]:
    """With C and T divided, layer by layer, by ‖delta_W X‖² on their own texts."""
    C, T = (
        {name: m[name] / output_energy(t.factors[name], m[name]) for name in t.factors}
        for m in (t.C, task)
    )
    return with_moments(t, strength, C, T)


def task_of_trained(t: Trained, strength: float) -> Mapping[str, Factors]:
    """As the package does it: T of the trained model's own activations."""
    return with_moments(t, strength, t.C, t.moments(t.merged(t.factors), t.task_text))


def equal_shares_of_trained(t: Trained, strength: float) -> Mapping[str, Factors]:
    """Equal shares, with that T."""
    return in_shares(t, strength, t.moments(t.merged(t.factors), t.task_text))


def identity(t: Trained, strength: float) -> Mapping[str, Factors]:
    """No task text: T is the identity at C's mean diagonal."""
    return with_moments(t, strength, t.C, None)


def rescaled(t: Trained, strength: float) -> Mapping[str, Factors]:
    """The repaired update of each layer, times what fits the old one best on the task's text."""
    found = {}
    for name, f in raw(t, strength).items():
        gram, old, T = f.B.mT @ f.B, t.factors[name].A, t.T[name]
        scale = ((old @ T @ f.A.mT) * gram).sum() / ((f.A @ T @ f.A.mT) * gram).sum()
        found[name] = Factors(A=scale * f.A, B=f.B)
    return found


def rounds(t: Trained, strength: float) -> Mapping[str, Factors]:
    """Twice more, with the moments of the model as it was repaired in the round before."""
    found: Mapping[str, Factors] = raw(t, strength)
    for _ in range(2):
        model = t.merged(found)
        C, T = t.moments(model, t.keep_text), t.moments(model, t.task_text)
        found = with_moments(t, strength, C, T)
    return found


def both_sides(t: Trained, strength: float) -> Mapping[str, Factors]:
    """B likewise, by the second moments W C Wᵀ and W T Wᵀ of the layer's outputs.

    Where an update writes and the weight does not, both are 0 and B has to stay: so the ridge,
    1e-4 of the mean, is on both sides of the fraction.
    """
    found = {}
    for name, f in raw(t, strength).items():
        W = t.weight(name)
        keep, task = W @ t.C[name] @ W.mT, W @ t.T[name] @ W.mT
        ridge = 1e-4 * (task + keep).diagonal().mean() * torch.eye(len(task), dtype=task.dtype)
        B = torch.linalg.solve(task + strength * keep + ridge, (task + ridge) @ f.B)
        found[name] = Factors(A=f.A, B=B)
    return found


VARIANTS: dict[str, Callable[[Trained, float], Mapping[str, Factors]]] = {
    each.__name__: each
    for each in (
        raw,
        normalised,
        equal_shares,
        task_of_trained,
        equal_shares_of_trained,
        identity,
        rescaled,
        rounds,
        both_sides,
    )
}


def measured(
    run: Path, variants: Sequence[str], strengths: Sequence[float]
) -> list[dict[str, Any]]:
    """One row a variant and strength, and one as trained."""
    trained = Trained(run)
    tasks: list[dict[str, Any]] = [{"kind": LEARNED, "limit": 200}, {"kind": KEPT}]

    def scores(factors: Mapping[str, Factors]) -> dict[str, float]:
        model = trained.put(factors)
        with torch.no_grad():
            found = evaluate(model, tasks, trained.tokenizer)
        return {name: result.value for name, result in found.items()}

    rows = [{"run": run.name, "variant": "trained", "strength": 0.0, **scores(trained.factors)}]
    for name in variants:
        for strength in strengths:
            found = scores(VARIANTS[name](trained, strength))
            rows.append({"run": run.name, "variant": name, "strength": strength, **found})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["lora", "pissa"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--strengths", nargs="+", type=float, default=list(STRENGTHS))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for method in asked.methods:
        for run in sorted(asked.runs.glob(f"{method}-*")):
            rows += measured(run, asked.variants, asked.strengths)
            write_json(asked.out, rows)


if __name__ == "__main__":
    main()
