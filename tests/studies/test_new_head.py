"""A new head for new classes: trained beside the base's own, which stays as it is."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

import forgetless as fl
from forgetless.cli.commands.measuring import measure
from forgetless.core.errors import UserError
from forgetless.core.files import read_jsonl
from forgetless.core.settings import with_overrides
from forgetless.data.examples import load_examples
from forgetless.data.modality import load_processor, modality_of
from forgetless.methods import METHODS
from forgetless.models.heads import add_head, heads_of, own_logits
from forgetless.models.load import load_model
from forgetless.models.state import adapter_off
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies import stages
from forgetless.studies.run import run
from forgetless.training.loop import train
from tests.classifiers import check_start, check_stopped
from tests.images import CLASSES, SWIN_SIZES, VIT_SIZES, save_classifier, save_images
from tests.sentences import save_classifier as save_text_classifier
from tests.sentences import write_rows

pytest_plugins = ["tests.quick_python"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*saw fewer tokens"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT's
]

NEW = ("lines", "rings", "waves", "zebra")
IMAGE_MODELS: dict[str, Any] = {
    "deit": (DeiTForImageClassification, DeiTConfig, VIT_SIZES),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, VIT_SIZES),
    "swin": (SwinForImageClassification, SwinConfig, SWIN_SIZES),
}


def save_family(folder: Path, family: str) -> str:
    """A classifier of three classes with random weights."""
    if family in IMAGE_MODELS:
        kind, config, settings = IMAGE_MODELS[family]
        torch.manual_seed(0)
        kind(config(**settings, id2label=dict(enumerate(CLASSES)))).save_pretrained(folder)
    elif family == "vit":
        save_classifier(folder)
    else:
        save_text_classifier(folder, family)
    return str(folder)


def both_heads(model: Any) -> Any:
    """Name and module."""
    return heads_of(model)


def logits_of(model: Any) -> Tensor:
    probe = modality_of(model).probe(model)
    with torch.no_grad():
        logits: Tensor = model.eval()(**probe).logits
    return logits


def move(model: Any) -> None:
    """Change everything that is trained."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=random))


def plain_peft(base: str, folder: Path) -> Any:
    """What PEFT alone makes of an export."""
    config = AutoConfig.from_pretrained(folder)
    words = "input_ids" in modality_of(base).probe(load_model(base))
    kind = AutoModelForSequenceClassification if words else AutoModelForImageClassification
    model = kind.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("family", ["vit", *IMAGE_MODELS, "bert", "distilbert", "roberta", "llama"])
def test_the_own_head_stays_and_nothing_is_lost(family: str, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", family)
    before = logits_of(load_model(base))
    model = fl.attach(add_head(load_model(base), NEW), "pissa", rank=2, alpha=2)
    name, heads = both_heads(model)
    assert logits_of(model).shape == (4, 3 + 4)
    assert torch.equal(logits_of(model)[:, :3], before)
    move(model)
    after = logits_of(model)
    assert not torch.equal(after[:, :3], before)
    assert torch.equal(own_logits(model, after), after[:, :3])
    with adapter_off(model):
        assert torch.equal(logits_of(model)[:, :3], before)
    own = load_model(base).get_submodule(name)
    assert all(torch.equal(w, own.state_dict()[n]) for n, w in heads.own.state_dict().items())

    fl.save(model, tmp_path / "native")
    fl.export(model, tmp_path / "adapter")
    loaded = fl.load(load_model(base), tmp_path / "native")
    assert torch.equal(logits_of(loaded), after)
    exported = fl.load(load_model(base), tmp_path / "adapter")
    theirs = plain_peft(base, tmp_path / "adapter")
    merged = load_model(base)
    fl.load(merged, tmp_path / "native").merge_and_unload().save_pretrained(tmp_path / "merged")
    for found in (exported, theirs, load_model(str(tmp_path / "merged"))):
        assert torch.allclose(logits_of(found), after, atol=1e-5)
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    assert (config.own_classes, [config.id2label[n] for n in range(3, 7)]) == (3, list(NEW))


def test_a_row_is_learned_under_the_head_that_has_its_class(tmp_path: Path) -> None:
    model = add_head(load_model(save_family(tmp_path, "llama")), NEW)
    probe = modality_of(model).probe(model)
    logits = model(**probe).logits
    labels = torch.tensor([1, 4, -100, 6])
    found = model(**probe, labels=labels)
    parts = [logits[0, :3].log_softmax(-1)[1]] + [
        logits[row, 3:].log_softmax(-1)[label] for row, label in ((1, 1), (3, 3))
    ]
    assert torch.allclose(found.loss, -torch.stack(parts).mean())
    model(**probe, labels=torch.tensor([3, 4, 5, 6])).loss.backward()
    assert both_heads(model)[1].new.weight.grad.abs().sum() > 0
    assert not both_heads(model)[1].own.weight.requires_grad


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows three classes, and images of four others to learn."""
    folder = tmp_path_factory.mktemp("world")
    save_classifier(folder / "base")
    save_images(folder / "train", dict.fromkeys(NEW[:3], 8))
    save_images(folder / "keep", dict.fromkeys(CLASSES, 4), seed=1)
    save_images(folder / "test", dict.fromkeys(NEW[:3], 6), seed=2)
    save_images(folder / "both", dict.fromkeys((*CLASSES, *NEW[:3]), 3), seed=3)
    return folder


def recipe_of(world: Path, method: str = "lora_null_v1", **changes: Any) -> Recipe:
    def task(name: str) -> dict[str, str]:
        return {"kind": "image_accuracy", "name": name, "path": str(world / name)}

    content = {
        "base": str(world / "base"),
        "adapter": {"method": method, "rank": 2, "alpha": 2, "head": "new"},
        "calibration": {"source": str(world / "keep"), "samples": 12, "batch_size": 4},
        "data": {"train": str(world / "train")},
        "training": {"learning_rate": 1e-2, "steps": 6, "batch_size": 4, "log_every": 1}
        | {"head_learning_rate": 5e-2, "probe_steps": 3},
        "tasks": {"learning": [task("test"), task("both")], "forgetting": [task("keep")]},
    }
    return Recipe.parse(with_overrides(content, changes))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_every_start_is_the_base_bit_for_bit(method: str, world: Path) -> None:
    check_start(method, world / "base", world / "keep", world / "train", NEW[:3])


FRESH = """
import json, sys, torch
from pathlib import Path
from PIL import Image
from peft import PeftModel
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
base, adapter, *folders = sys.argv[1:]
config = AutoConfig.from_pretrained(adapter)
model = AutoModelForImageClassification.from_pretrained(
    base, config=config, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(model, adapter).eval()
processor, found = AutoImageProcessor.from_pretrained(base), {}
for file in [file for folder in folders for file in sorted(Path(folder).glob("*/*.png"))]:
    logits = model(**processor(Image.open(file).convert("RGB"), return_tensors="pt")).logits[0]
    own, new = logits[: config.own_classes], logits[config.own_classes :]
    names = config.id2label[int(own.argmax())], config.id2label[len(own) + int(new.argmax())]
    found[f"{file.parent.name}/{file.name}"] = names
print(json.dumps(found))
"""


def test_a_run_measures_each_head_and_a_fresh_process_agrees(
    world: Path, tmp_path: Path, python: str
) -> None:
    changes: dict[str, Any] = {"training.probe_steps": 20}
    recipe = recipe_of(world, **changes)
    assert check(recipe) == []
    done = run(recipe, tmp_path)
    assert done.record["start"]["equals_base"]
    rows = {row["task"]: row for row in done.scores}
    assert all(row["step0_score"] == row["base_score"] for row in rows.values())
    assert rows["test"]["score"] > 0.9
    answers = {
        name: read_jsonl(done.folder / "items" / "final" / f"{name}.jsonl")
        for name in ("test", "both", "keep")
    }
    assert {item["answer"] for item in answers["test"]} <= set(NEW)
    assert {item["answer"] for item in answers["keep"]} <= set(CLASSES)
    assert {item["expected"] for item in answers["both"]} == {*CLASSES, *NEW[:3]}
    assert not (done.folder / "probe").exists()

    adapter = done.folder / "adapter"
    arguments = [str(world / "base"), str(adapter), str(world / "keep"), str(world / "test")]
    out = subprocess.run(
        [python, "-W", "ignore", "-c", FRESH, *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    own_and_new = json.loads(out.stdout.splitlines()[-1])
    for name, place in (("keep", 0), ("test", 1)):
        for item in answers[name]:
            assert own_and_new[item["prompt"]][place] == item["answer"]
    found = measure(str(world / "base"), [recipe.tasks.learning[0]], adapter=done.folder)
    assert found.adapted is not None
    again = (found.base["test"].value, found.adapted["test"].value)
    assert again == (rows["test"]["base_score"], rows["test"]["score"])
    card = (adapter / "README.md").read_text()
    assert "ignore_mismatched_sizes=True" in card
    assert "own, new = config.own_classes" in card


def test_varied_images_are_the_same_after_a_stop(world: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data.augment": {"flip": True, "crop": 1}, "training.steps": 9}
    changes["training.checkpoint_every"] = 2
    recipe = recipe_of(world, **changes)
    assert check(recipe) == []
    assert run_id(recipe) != run_id(recipe_of(world, **{**changes, "data.augment": None}))
    check_stopped(recipe, tmp_path)
    empty: dict[str, Any] = {"data.augment": {}}
    with pytest.raises(UserError, match="give flip: true, a crop of so many pixels"):
        recipe_of(world, **empty)


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_stopped_run_comes_to_the_same_weights(method: str, world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, method, **{"training.checkpoint_every": 2})
    check_stopped(recipe, tmp_path)


def test_a_probing_that_is_stopped_goes_on_and_is_not_done_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"tasks": {}, "training.checkpoint_every": 1, "training.steps": 1}
    recipe = recipe_of(world, "lora", **changes)
    whole = run(recipe, tmp_path / "whole")

    def stop(step: int = 2, *_: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    def stopped_in_it(*given: Any, **more: Any) -> Any:
        return train(*given, on_step=stop, **more)

    for name, replaced in (("train", stopped_in_it), ("put_back", lambda *_: stop())):
        with monkeypatch.context() as patch:
            patch.setattr(stages, name, replaced)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, tmp_path / "stopped")
        (log,) = (tmp_path / "stopped").rglob("probe/log.jsonl")
        assert (len(read_jsonl(log)) == 3) == (name == "put_back")
    (file,) = (tmp_path / "stopped").rglob("head.safetensors")
    written, read = file.stat().st_mtime_ns, list[int]()

    def noted(head: Path) -> dict[str, Tensor]:
        read.append(head.stat().st_mtime_ns)
        return load_file(head)

    monkeypatch.setattr(stages, "read_tensors", noted)
    again = run(recipe, tmp_path / "stopped")
    assert read == [written]
    native = Path("native", "adapter_model.safetensors")
    assert (again.folder / native).read_bytes() == (whole.folder / native).read_bytes()


def test_only_the_head_moves_while_it_is_probed(world: Path, tmp_path: Path) -> None:
    rates = {"training.learning_rate": 1e-9, "training.steps": 1, "tasks": {}}
    moved = {}
    for head_rate in (1e-9, 5e-2):
        recipe = recipe_of(world, "lora", **{**rates, "training.head_learning_rate": head_rate})
        moved[head_rate] = load_file(
            run(recipe, tmp_path).folder / "native/adapter_model.safetensors"
        )
    still = fl.attach(add_head(load_model(str(world / "base")), NEW[:3]), "lora", 2, 2)
    for name, weight in moved[5e-2].items():
        is_head = ".new." in name
        assert torch.allclose(weight, moved[1e-9][name], atol=1e-6) != is_head
    start = both_heads(still)[1].new.original_module.weight
    head = moved[1e-9]["base_model.model.classifier.new.weight"]
    assert torch.allclose(head, start, atol=1e-6)


def test_replay_and_penalties_go_with_a_new_head(world: Path, tmp_path: Path) -> None:
    sources = [{"path": str(world / name), "weight": 1.0} for name in ("train", "keep")]
    kept = {"weight": 0.5, "source": str(world / "keep"), "samples": 6, "batch_size": 3}
    penalties = [{"kind": "kl", **kept}, {"kind": "ewc", **kept}, {"kind": "l2_start", "weight": 1}]
    for method in ("lora_ga", "full"):
        recipe = recipe_of(world, method, **{"data.train": sources, "penalties": penalties})
        assert check(recipe) == []
        log = read_jsonl(run(recipe, tmp_path).folder / "log.jsonl")
        assert log[-1]["penalty"] > 0


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_budget_of_drift_goes_back_to_both_heads(
    method: str, world: Path, tmp_path: Path
) -> None:
    drift = {"kind": "class_kl", "name": "drift", "path": str(world / "keep")}
    probes = {"forgetting": [drift], "every": 2, "max_kl": 1e-9, "on_exceed": "rollback"}
    changes = {"probes": probes, "tasks": {"forgetting": [drift]}, "training.probe_steps": 0}
    recipe = recipe_of(world, method, **changes)
    assert check(recipe) == []
    done = run(recipe, tmp_path)
    over = done.record["training"]["exceeded"]
    assert (over["step"], over["kept_step"], over["action"]) == (2, 0, "rollback")
    assert over["value"] > 1e-9
    assert [row["score"] for row in done.scores] == [0]
    start = add_head(load_model(str(world / "base")), NEW[:3])
    if method == "full":
        model = load_model(str(done.folder / "model"))
    else:
        model = fl.load(load_model(str(world / "base")), done.folder / "native")
    assert torch.equal(logits_of(model), logits_of(start))


def test_no_head_is_put_beside_several(tmp_path: Path) -> None:
    config = DeiTConfig(**VIT_SIZES, id2label=dict(enumerate(CLASSES)))
    with pytest.raises(UserError, match="no single linear layer"):
        add_head(DeiTForImageClassificationWithTeacher(config), NEW)


def test_a_base_of_16_bits_has_a_head_of_32(world: Path) -> None:
    before = logits_of(load_model(str(world / "base"), dtype="bfloat16"))
    model = add_head(load_model(str(world / "base"), dtype="bfloat16"), NEW)
    adapted = fl.attach(model, "pissa", 2, 2)
    assert torch.equal(logits_of(adapted)[:, :3], before.float())
    trained = [w.dtype for n, w in adapted.named_parameters() if ".new." in n and w.requires_grad]
    assert trained == [torch.float32] * 2


def test_the_head_decides_the_run(world: Path) -> None:
    recipe = recipe_of(world, "full")
    ids = {
        run_id(recipe.override(changes))
        for changes in (
            {},
            {"adapter.method": "lora"},
            {"training.probe_steps": 0},
            {"training.head_learning_rate": None},
        )
    }
    assert len(ids) == 4
    plain = {"training.probe_steps": 0, "training.head_learning_rate": None}
    own = recipe.override({"adapter.head": "own", **plain})
    assert run_id(own) != run_id(recipe.override(plain))


def test_a_sequence_learns_classes_under_one_new_head(world: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "first", dict.fromkeys(NEW[:2], 6))
    save_images(tmp_path / "then", dict.fromkeys(NEW[2:], 6))
    task = {"kind": "image_accuracy", "name": "first", "path": str(tmp_path / "first")}
    common = {"adapter.head": list(NEW), "tasks": {"forgetting": [task]}}
    first = recipe_of(world, "pissa", **common, **{"data.train": str(tmp_path / "first")})
    assert check(first) == []
    done = run(first, tmp_path / "runs")
    after = {"after": done.folder.name}
    changes = {"data.train": str(tmp_path / "then"), "sequence": after, "training.probe_steps": 0}
    then = first.override(changes)
    assert check(then) == []
    row = {row["task"]: row for row in run(then, tmp_path / "runs").scores}["first"]
    assert row["step0_score"] == {r["task"]: r for r in done.scores}["first"]["score"]
    for head, words in (("new", "share one new head"), (["lines", "rings"], "no class 'waves'")):
        assert any(words in problem for problem in check(then.override({"adapter.head": head})))
    others = {"sequence": {**after, "classes": ["stripes"]}}
    assert any("'stripes' is no class of the new head" in p for p in check(then.override(others)))
    with pytest.raises(ValueError, match="a list of two classes or more"):
        then.override({"adapter.head": ["lines"]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"adapter.head": "own", "training.probe_steps": 0, "training.head_learning_rate": None},
            "data.train: .*no class 'lines', 'rings', 'waves'.*adapter.head: new",
        ),
        (
            {"adapter.head": "own", "data.train": "KEEP", "training.probe_steps": 0}
            | {"tasks.learning": []},
            "training.head_learning_rate: is for a new head",
        ),
        ({"base": "pocket", "calibration.source": "self", "tasks": {}}, "adapter.head: .*classif"),
        ({"data.train": "nowhere"}, "data.train: no such file"),
        (
            {
                "data.train": [
                    {"path": "TRAIN", "weight": 1},
                    {"path": "pocket:digits", "weight": 1},
                ]
            },
            "data.train: .*neither head has the class 'digit 0'",
        ),
    ],
)
def test_what_is_wrong_with_a_head_is_told_before(
    changes: dict[str, Any], words: str, world: Path
) -> None:
    text = json.dumps(changes)
    for name in ("train", "keep"):
        text = text.replace(name.upper(), str(world / name))
    problems = check(recipe_of(world, **json.loads(text)))
    assert len([p for p in problems if re.search(words, p)]) == 1, problems
    if "base" not in changes:
        assert len(problems) == 1


def test_labels_that_both_heads_have_ask_which_is_meant(tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "bert")
    rows = [{"sentence": f"row {n}", "label": n % 2} for n in range(6)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    model = add_head(load_model(base), ["0", "1"])
    task = {"kind": "sentence_accuracy", "name": "rows", "path": str(file)}
    processor = load_processor(base)
    with pytest.raises(UserError, match=r"both have these classes.*head: own"):
        fl.evaluate(model, task, processor)
    answers = {
        head: {i.answer for i in fl.evaluate(model, task | {"head": head}, processor)["rows"].items}
        for head in ("own", "new")
    }
    assert answers["own"] <= {"sport", "trade", "world"}
    assert answers["new"] <= {"0", "1"}
    with pytest.raises(UserError, match="head 'new': this model has no new head"):
        fl.evaluate(load_model(base), task | {"head": "new"}, processor)
    with pytest.raises(UserError, match="head must be own, new or all"):
        fl.evaluate(model, task | {"head": "both"}, processor)
    with pytest.raises(UserError, match="has a new head already"):
        add_head(model, ["a", "b"])
    rows_of = modality_of(model).rows(
        load_examples(file), processor.with_new(["0", "1"]).under("new")
    )
    assert [int(rows_of[n]["labels"]) for n in range(2)] == [3, 4]


def test_an_adapter_knows_the_head_that_it_was_trained_beside(tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "vit")
    fl.export(fl.attach(add_head(load_model(base), NEW), "lora", 2, 2), tmp_path / "adapter")
    other = load_model(base)
    with torch.no_grad():
        other.classifier.weight.add_(1)
    with pytest.raises(UserError, match="beside another head than this base has"):
        fl.load(other, tmp_path / "adapter")
    second = fl.attach(load_model(base), "lora", 2, 2)
    fl.save(second, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
