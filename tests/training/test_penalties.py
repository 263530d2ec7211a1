"""Penalties: their values, and what they do to a training."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forgetless.adapters.anchored import plain_factors
from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import down_projections, export, save
from forgetless.adapters.layer import adapted_layers
from forgetless.core.errors import UserError
from forgetless.data.examples import load_examples
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.statistics.collection import collect
from forgetless.training import penalties
from forgetless.training.log import TrainingLog
from forgetless.training.loop import train
from forgetless.training.penalties import Penalty, kl, l2_start, make_penalty
from forgetless.training.settings import TrainingSettings
from forgetless.training.trainer import ExactTrainer

pytest_plugins = ["tests.tiny_fixtures"]


@pytest.fixture
def full(tiny_base: Path) -> Any:
    return load_model(str(tiny_base), dtype="float32")


@pytest.fixture
def adapted(tiny_base: Path) -> Any:
    return attach(load_model(str(tiny_base), dtype="float32"), "pissa", rank=2, alpha=2)


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def shaken(model: Any) -> Any:
    """Every trained weight moved a little."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def prepared(model: nn.Module, tokenizer: Any, **spec: Any) -> Any:
    penalty = make_penalty(spec)
    penalty.prepare(model, tokenizer, 0)
    return penalty


@pytest.mark.parametrize("kind", ["l2_start", "kl", "ewc"])
@pytest.mark.parametrize("which", ["full", "adapted"])
def test_the_start_costs_nothing_and_pulls_nowhere(
    kind: str, which: str, tokenizer: Any, tiny_files: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which).train()
    texts = {} if kind == "l2_start" else {"source": str(tiny_files / "old.txt"), "samples": 4}
    penalty = prepared(model, tokenizer, kind=kind, weight=1, **texts)
    before = penalty(model, 0)
    assert before.item() == pytest.approx(0, abs=1e-6)
    before.backward()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    assert gradients
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)
    assert penalty(shaken(model), 0).item() > 1e-4


def test_l2_pulls_towards_the_start(adapted: Any, tokenizer: Any) -> None:
    start = {n: w.detach().clone() for n, w in adapted.named_parameters() if w.requires_grad}
    penalty = prepared(adapted, tokenizer, kind="l2_start", weight=1)
    penalty(shaken(adapted), 0).backward()
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.grad, weight - start[name])


@pytest.mark.parametrize("which", ["full", "adapted"])
def test_kl_is_that_of_the_base_on_the_texts(
    which: str, tokenizer: Any, tiny_base: Path, tiny_files: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    base = load_model(str(tiny_base), dtype="float32")
    source = str(tiny_files / "old.txt")
    penalty = prepared(
        model, tokenizer, kind="kl", weight=1, source=source, samples=4, max_length=20, batch_size=2
    )
    shaken(model)
    for step in range(2):
        batch = penalty.batches[step]
        with torch.no_grad():
            p = base(**batch).logits.double().softmax(-1)
            q = model(**batch).logits.double().softmax(-1)
        kl = (p * (p / q).log()).sum(-1)[batch["attention_mask"].bool()].mean()
        assert penalty(model, step).item() == pytest.approx(kl.item(), rel=1e-4)
    assert penalty(model, 0).item() != penalty(model, 1).item()
    assert penalty(model, 0).item() == penalty(model, len(penalty.batches)).item()


def test_a_penalty_leaves_the_model_as_it_was(
    adapted: Any, tokenizer: Any, tiny_files: Path
) -> None:
    needs = {name: w.requires_grad for name, w in adapted.named_parameters()}
    adapted.train()
    for kind in ("kl", "ewc"):
        penalty = prepared(
            adapted, tokenizer, kind=kind, weight=1, source=str(tiny_files / "old.txt"), samples=4
        )
        penalty(adapted, 0)
    assert {name: w.requires_grad for name, w in adapted.named_parameters()} == needs
    assert all(module.training for module in adapted.modules())
    assert all(w.grad is None for w in adapted.parameters())


def test_ewc_weighs_by_the_mean_squared_gradient(
    full: Any, tokenizer: Any, tiny_files: Path
) -> None:
    texts = {"source": str(tiny_files / "old.txt"), "samples": 3, "max_length": 12}
    reader = prepared(full, tokenizer, kind="kl", weight=1, **texts)
    expected = torch.zeros_like(full.lm_head.weight)
    for batch in reader.batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()][None]
            logits = full(input_ids=ids).logits[0, :-1]
            likelihood = -F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            (gradient,) = torch.autograd.grad(likelihood, full.lm_head.weight)
            expected += gradient.square() / 3
    penalty = prepared(full, tokenizer, kind="ewc", weight=1, **texts)
    start = full.lm_head.weight.detach().clone()
    moved: Tensor = torch.randn_like(start) * 0.1
    with torch.no_grad():
        full.lm_head.weight += moved
    value = (expected * moved.square()).sum() / 2
    assert penalty(full, 0).item() == pytest.approx(value.item(), rel=1e-3)


def test_orthogonality_is_the_overlap_of_the_inputs(
    adapted: Any, tokenizer: Any, tiny_base: Path, tmp_path: Path
) -> None:
    earlier = attach(load_model(str(tiny_base), dtype="float32"), "milora", rank=2, alpha=2)
    export(shaken(earlier), tmp_path / "earlier")
    penalty = prepared(
        adapted, tokenizer, kind="orthogonality", weight=1, adapters=[str(tmp_path / "earlier")]
    )
    shaken(adapted)
    overlap: Any = sum(
        (plain_factors(old, "default")[0] @ plain_factors(new, "default")[0].T).square().sum()
        for old, new in zip(
            adapted_layers(earlier).values(), adapted_layers(adapted).values(), strict=True
        )
    )
    assert penalty(adapted, 0).item() == pytest.approx(overlap.item(), rel=1e-4)


def test_a_normalised_orthogonality_is_not_satisfied_by_shrinking(
    adapted: Any, tokenizer: Any, tiny_base: Path, tmp_path: Path
) -> None:
    earlier = attach(load_model(str(tiny_base), dtype="float32"), "lora", rank=2, alpha=2)
    export(shaken(earlier), tmp_path / "earlier")
    given: Any = {"kind": "orthogonality", "weight": 1, "adapters": [str(tmp_path / "earlier")]}
    plain, normalised = (
        prepared(adapted, tokenizer, **given, normalised=value) for value in (False, True)
    )
    shaken(adapted)
    before = plain(adapted, 0).item(), normalised(adapted, 0).item()
    with torch.no_grad():
        for layer in adapted_layers(adapted).values():
            layer.lora_A["default"].weight *= 0.1
            if "default" in getattr(layer, "lora_anchor", {}):
                layer.lora_anchor["default"].anchor_A *= 0.1
    assert plain(adapted, 0).item() == pytest.approx(before[0] / 100, rel=1e-3)
    assert normalised(adapted, 0).item() == pytest.approx(before[1], rel=1e-3)


def test_orthogonality_is_that_of_the_adapter_in_training(
    tokenizer: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = load_model(str(tiny_base), dtype="float32")
    first = shaken(attach(base, "lora", rank=2, alpha=2, target_modules=["q_proj", "v_proj"]))
    export(first, tmp_path / "first")
    both = attach(first, "lora", rank=3, adapter_name="second", target_modules=["v_proj", "k_proj"])
    spec: Any = {"kind": "orthogonality", "weight": 1, "adapters": [str(tmp_path / "first")]}
    penalty = prepared(both, tokenizer, **spec)
    earlier = down_projections(tmp_path / "first")
    overlap = sum(
        (earlier[name] @ module.lora_A["second"].weight.T).square().sum()
        for name, module in adapted_layers(both, "second").items()
        if name in earlier
    )
    assert penalty(both, 0).item() == pytest.approx(overlap.item(), rel=1e-4)


def test_orthogonality_needs_an_a_that_moves(
    tokenizer: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = load_model(str(tiny_base), dtype="float32")
    stats = collect(base, [{"input_ids": torch.arange(4, 60)[None]}])
    model = attach(base, "lora_null_v2", rank=2, stats=stats)
    save(model, tmp_path / "earlier")
    with pytest.raises(UserError, match="moves A, which this method freezes"):
        prepared(
            model, tokenizer, kind="orthogonality", weight=1, adapters=[str(tmp_path / "earlier")]
        )


def test_its_own_text_is_that_of_the_base(adapted: Any, tokenizer: Any) -> None:
    spec: Any = {"kind": "kl", "weight": 1, "source": "self", "samples": 2, "max_length": 12}
    (before,) = prepared(adapted, tokenizer, **spec).batches
    with torch.no_grad():
        for module in adapted_layers(adapted).values():
            module.lora_A["default"].weight.fill_(1)
    (after,) = prepared(adapted, tokenizer, **spec).batches
    assert torch.equal(before["input_ids"], after["input_ids"])


def test_fisher_information_is_not_summed_in_16_bits(
    tokenizer: Any, tiny_base: Path, tiny_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_base), dtype="bfloat16")
    module = "forgetless.training.penalties.ewc"
    monkeypatch.setattr(f"{module}.EWC._examples", lambda _: [({"labels": None}, 1)] * 600)
    monkeypatch.setattr(f"{module}.loss_of", lambda _: lambda outputs, labels: outputs.loss)

    def forward(**_: Any) -> Any:
        return SimpleNamespace(loss=model.lm_head.weight.sum())

    monkeypatch.setattr(model, "forward", forward)
    penalty = prepared(model, tokenizer, kind="ewc", weight=1, source=str(tiny_files / "old.txt"))
    found = penalty._fisher["model.embed_tokens.weight"]  # tied
    assert torch.allclose(found, torch.ones_like(found), rtol=1e-4)


@pytest.mark.parametrize("method", ["milora", "lora", "lora_null_v2"])
def test_a_native_folder_has_the_inputs_of_the_exported_one(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    base = load_model(str(tiny_base), dtype="float32")
    stats = collect(base, [{"input_ids": torch.arange(4, 60)[None]}])
    model = shaken(attach(base, method, rank=2, alpha=2, stats=stats))
    save(model, tmp_path / "native")
    export(model, tmp_path / "exported")
    native = down_projections(tmp_path / "native")
    exported = down_projections(tmp_path / "exported")
    assert native.keys() == exported.keys() == adapted_layers(model).keys()
    assert all(torch.equal(native[name], exported[name]) for name in native)


def test_ewc_leaves_the_modes_as_they_were_when_it_fails(
    full: Any, tokenizer: Any, tiny_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert not full.training
        raise KeyError

    monkeypatch.setattr(full, "forward", fail)
    full.train()
    with pytest.raises(KeyError):
        prepared(full, tokenizer, kind="ewc", weight=1, source=str(tiny_files / "old.txt"))
    assert all(module.training for module in full.modules())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "l3", "weight": 1}, "unknown penalty 'l3'"),
        ({"kind": "kl"}, "penalty 'kl' needs a positive weight, got None"),
        ({"kind": "kl", "weight": -1}, "needs a positive weight, got -1"),
        ({"kind": "kl", "weight": 1, "sauce": "a"}, "did you mean 'source'"),
    ],
)
def test_mistakes_in_a_penalty(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_penalty(spec)


def test_a_folder_that_is_no_adapter_is_named_before_anything_is_loaded(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    spec = {"kind": "orthogonality", "weight": 1.0, "adapters": [str(tmp_path)]}
    (found,) = check(Recipe.parse(tiny_recipe, {"penalties": [spec]}))
    assert found == f"penalties.0: {tmp_path} is no adapter: it has no adapter_config.json"


def test_full_fine_tuning_has_no_inputs_to_keep_apart(full: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="full has none"):
        prepared(full, tokenizer, kind="orthogonality", weight=1, adapters=["a"])


def distance(model: Any, base: Any) -> float:
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    squares = [float((w - b).detach().square().sum()) for w, b in pairs]
    return math.sqrt(sum(squares))


def test_a_stronger_penalty_keeps_the_model_nearer(
    tokenizer: Any, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    examples = load_examples(tiny_files / "train.jsonl")
    rows = tokenize(examples, tokenizer, max_length=32)
    base = load_model(str(tiny_base), dtype="float32")
    found = []
    for number, weight in enumerate((0, 10, 30)):
        model = load_model(str(tiny_base), dtype="float32")
        penalties = [{"kind": "l2_start", "weight": weight}] if weight else []
        settings = TrainingSettings(learning_rate=1e-2, steps=20, batch_size=4, optimizer="sgd")
        train(model, tokenizer, rows, settings, tmp_path / str(number), penalties=penalties)
        found.append(distance(model, base))
    assert found[0] > found[1] > found[2]


def test_accumulation_does_not_change_a_penalised_step(
    tokenizer: Any, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    rows = tokenize(load_examples(tiny_files / "train.jsonl"), tokenizer, max_length=32)
    penalties = [
        {"kind": "kl", "weight": 5.0, "source": str(tiny_files / "old.txt"), "samples": 4},
        {"kind": "l2_start", "weight": 10.0},
    ]
    models = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = load_model(str(tiny_base), dtype="float32")
        settings = TrainingSettings(
            learning_rate=1e-2,
            steps=3,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            optimizer="sgd",
        )
        train(model, tokenizer, rows, settings, tmp_path / str(accumulation), penalties=penalties)
        models.append(model)
    assert distance(*models) < 1e-5


def test_a_penalty_sees_the_model_where_it_is_trained(
    adapted: Any, tokenizer: Any, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that a script gives may be on another device than the trainer's."""
    rows = tokenize(load_examples(tiny_files / "train.jsonl"), tokenizer, max_length=32)
    events: list[str] = []
    monkeypatch.setattr(ExactTrainer, "_move_model_to_device", lambda *_: events.append("moved"))
    prepare = l2_start.L2Start.prepare

    def watched(*given: Any) -> None:
        events.append("prepared")
        prepare(*given)

    monkeypatch.setattr(l2_start.L2Start, "prepare", watched)
    penalties = [{"kind": "l2_start", "weight": 1.0}]
    settings = TrainingSettings(steps=1, batch_size=4)
    train(adapted, tokenizer, rows, settings, tmp_path, penalties=penalties)
    assert events[:2] == ["moved", "prepared"]


# ---- in the log ----------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_log_has_the_penalty_beside_the_loss(
    accumulation: int, adapted: Any, tokenizer: Any, tiny_files: Path, tmp_path: Path
) -> None:
    rows = tokenize(load_examples(tiny_files / "train.jsonl"), tokenizer, max_length=32)
    shaken(adapted)
    penalty = {"kind": "kl", "weight": 5.0, "source": str(tiny_files / "old.txt"), "samples": 4}
    expected = 5 * prepared(adapted, tokenizer, **penalty)(adapted.train(), 0).item()
    start = copy.deepcopy(adapted.state_dict())
    settings = TrainingSettings(
        learning_rate=1e-3, steps=2, batch_size=4, gradient_accumulation=accumulation, log_every=2
    )
    train(adapted, tokenizer, rows, settings, tmp_path / "with", penalties=[penalty])
    adapted.load_state_dict(start)
    train(adapted, tokenizer, rows, settings, tmp_path / "without")
    (first, second), (alone, _) = lines(tmp_path / "with"), lines(tmp_path / "without")
    assert first["penalty"] == pytest.approx(expected, rel=1e-5)
    assert first["loss"] - first["penalty"] == pytest.approx(alone["loss"], rel=1e-5)
    assert 0 < second["penalty"] < second["loss"]
    assert "penalty" not in alone


@pytest.mark.parametrize("which", ["full", "adapted"])
def test_in_mixed_precision_the_base_is_no_distance_from_itself(
    which: str, tokenizer: Any, tiny_files: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rows = tokenize(load_examples(tiny_files / "train.jsonl"), tokenizer, max_length=32)
    penalty = {"kind": "kl", "weight": 1.0, "source": str(tiny_files / "old.txt"), "samples": 4}
    settings = TrainingSettings(steps=1, batch_size=4, precision="bf16")
    model = request.getfixturevalue(which)
    with torch.no_grad():  # or rounding to 16 bits would hardly show in the logits
        model.get_output_embeddings().weight.mul_(8)
    train(model, tokenizer, rows, settings, tmp_path, penalties=[penalty])
    assert lines(tmp_path)[0]["penalty"] == 0


def test_a_resumed_training_gives_the_same_penalties(
    tokenizer: Any, tiny_base: Path, tiny_files: Path, tmp_path: Path
) -> None:
    rows = tokenize(load_examples(tiny_files / "train.jsonl"), tokenizer, max_length=32)
    settings = TrainingSettings(
        learning_rate=1e-2, steps=8, batch_size=4, checkpoint_every=3, log_every=2
    )

    def fit(folder: str, on_step: Any = None) -> None:
        model = load_model(str(tiny_base), dtype="float32")
        penalties = [{"kind": "l2_start", "weight": 3.0}]
        more = {"penalties": penalties, "on_step": on_step}
        train(model, tokenizer, rows, settings, tmp_path / folder, **more)

    def stop(done: int, steps: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    fit("a")
    with pytest.raises(KeyboardInterrupt):
        fit("b", stop)
    fit("b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert all(line["penalty"] > 0 for line in lines(tmp_path / "a")[2:])


def test_a_log_from_before_penalties_were_written_is_read(tmp_path: Path) -> None:
    line = {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 9}
    written = json.dumps(line | {"seconds": 0.5}) + "\n"
    (tmp_path / "log.jsonl").write_text(written)
    (read,) = TrainingLog(tmp_path / "log.jsonl", 1).lines
    assert (read.loss, read.penalty) == (2.5, None)
    assert (tmp_path / "log.jsonl").read_text() == written


# ---- the divergence in parts ---------------------------------------------------------------------


def logits_of(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(2, 5, 50), as a model gives them."""
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, 5, 50, generator=draw)).to(dtype)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("chunk", [1, 120, 1 << 23])
def test_parts_give_the_divergence_and_its_gradient(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl, "_CHUNK_LOGITS", chunk)
    ours, exact = logits_of(0).requires_grad_(), logits_of(0).double().requires_grad_()
    value = kl._MeanKL.apply(ours, logits_of(1), MASK)  # type: ignore[no-untyped-call]
    p, q = logits_of(1).double().log_softmax(-1), exact.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[MASK.bool()].mean()
    (7 * value).backward()
    torch.autograd.backward(7 * expected)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)
    assert not ours.grad[1, 3:].any()


def test_the_gradient_of_16_bits_has_16_bits() -> None:
    ours = logits_of(0, torch.bfloat16).requires_grad_()
    same = kl._MeanKL.apply(ours, ours.detach().clone(), MASK)  # type: ignore[no-untyped-call]
    assert same.item() == 0
    value = kl._MeanKL.apply(ours, logits_of(1), MASK)  # type: ignore[no-untyped-call]
    value.backward()
    assert ours.grad is not None
    assert ours.grad.dtype == torch.bfloat16


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that were alive at once, of all storages that were made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t.untyped_storage() for t in tree_leaves(args) if isinstance(t, Tensor)]
        self.seen.update(storage for storage in given if storage not in self.seen)
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.now)
        return found

    def free(self, size: int) -> None:
        self.now -= size


def test_no_softmax_of_all_tokens_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_CHUNK_LOGITS", 1000)
    ours, base = (torch.randn(4, 100, 1000, requires_grad=n == 0) for n in range(2))
    mask = torch.ones(4, 100, dtype=torch.long)
    with Alive() as alive:
        value = kl._MeanKL.apply(ours, base, mask)  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad(value, ours)
    assert gradient.shape == ours.shape
    assert alive.most < 0.1 * ours.nbytes


# ---- a penalty of one's own ----------------------------------------------------------------------


@dataclass
class Named(Penalty):
    """A penalty with a file and a setting, which does not like full fine-tuning."""

    notes: str = ""
    power: int = 2
    files: ClassVar[Sequence[str]] = ("notes",)

    def check(self, method: str) -> None:
        if method == "full":
            raise UserError("'named' needs an adapter")
        Path(self.notes).read_text()

    def prepare(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        self.prepared = seed

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        return torch.zeros((), requires_grad=True)


def test_one_line_makes_a_penalty_known_everywhere(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalties, "PENALTIES", {**penalties.PENALTIES, "named": Named})
    spec = {"kind": "named", "weight": 1.0, "notes": str(tmp_path / "notes.txt"), "power": 3}
    recipe = Recipe.parse(tiny_recipe, {"penalties": [spec]})
    assert check(recipe) == [
        f"penalties.0: [Errno 2] No such file or directory: '{tmp_path / 'notes.txt'}'"
    ]
    (tmp_path / "notes.txt").write_text("one")
    (tmp_path / "moved.txt").write_text("one")
    assert check(recipe) == []
    assert check(recipe.override({"adapter.method": "full"})) == [
        "penalties.0: 'named' needs an adapter"
    ]
    moved = recipe.override({"penalties": [{**spec, "notes": str(tmp_path / "moved.txt")}]})
    assert run_id(moved) == run_id(recipe)
    assert run_id(recipe.override({"penalties": [{**spec, "power": 4}]})) != run_id(recipe)
    (tmp_path / "moved.txt").write_text("other")
    assert run_id(moved) != run_id(recipe)
    assert penalties.words_of(spec) == "named (weight=1.0, notes=notes.txt, power=3)"
