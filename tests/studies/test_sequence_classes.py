"""Sequences of classes: one new head for all tasks, both accuracies, and what they compare with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgetless.core.continual import continual_metrics
from forgetless.core.files import read_json
from forgetless.data.modality import modality_of
from forgetless.models.heads import add_head, learn_among
from forgetless.models.load import load_model
from forgetless.recipes.recipe import Recipe
from forgetless.recipes.sequence import SequenceRecipe
from forgetless.reports import report
from forgetless.studies.folder import RunFolder
from forgetless.studies.sequence import Sequence, sequence
from tests.images import CLASSES, save_classifier, save_images
from tests.killing import draws, in_a_process, killed_until_done, killed_when_touching
from tests.sentences import save_classifier as save_text_classifier
from tests.sentences import write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
pytest_plugins = ["tests.tiny_fixtures", "tests.quick_python"]

TASKS = {"first": ("lines", "waves"), "then": ("rings", "zebra")}
NEW = ["lines", "waves", "rings", "zebra"]
ARMS: dict[str, dict[str, Any]] = {
    "continued": {},
    "full": {"adapter.method": "full"},
    "stacked": {"between": "stack", "adapter.method": "lora_null_v1"},
    "merged": {"between": "merge", "adapter.method": "pissa"},
    "repaired": {"between": "stack", "repair.strength": 0.1},
    "replayed": {"replay": 0.5},
    "ewc": {"penalties": [{"kind": "ewc", "weight": 1.0, "source": "earlier"}]},
    "joint": {"between": "joint"},
    "separate": {"between": "separate"},
}


def definition_of(world: Path, **changes: Any) -> dict[str, Any]:
    """Two tasks of two classes each, of images."""

    def task(name: str, path: str) -> dict[str, str]:
        return {"kind": "image_accuracy", "name": name, "path": path}

    known = task("known", str(world / "known"))
    return {
        "name": "classes",
        "recipe": {
            "base": str(world / "base"),
            "adapter": {"method": "lora", "rank": 2, "alpha": 2, "head": "new"},
            "calibration": {"source": str(world / "known"), "samples": 6},
            "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2}
            | {"head_learning_rate": 5e-2},
            "tasks": {"forgetting": [known]},
        },
        "tasks": [
            {
                "name": name,
                "data": f"{world / 'train'}#{','.join(classes)}",
                "measure": task(name, f"{world / 'test'}#{','.join(classes)}"),
            }
            for name, classes in TASKS.items()
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows three classes, and images of four others."""
    folder = tmp_path_factory.mktemp("world")
    save_classifier(folder / "base")
    save_images(folder / "known", dict.fromkeys(CLASSES, 4))
    save_images(folder / "train", dict.fromkeys(NEW, 8), seed=1)
    save_images(folder / "test", dict.fromkeys(NEW, 4), seed=2)
    return folder


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence:
    """Every way to come from one task to the other."""
    arms = [{"name": name, **changes} for name, changes in ARMS.items()]
    found = sequence(definition_of(world, arms=arms), tmp_path_factory.mktemp("runs"))
    assert not [run.record["reason"] for run in found.failed]
    return found


def of(done: Sequence, arm: str, part: str = "") -> dict[str, Any]:
    """What an arm's sequence came to; by task with "task_incremental"."""
    found = done.matrices[part] if part else done.matrices
    (one,) = (each for each in found["sequences"] if each["arm"] == arm)
    return dict(one)


FRESH = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from peft import PeftModel
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
torch.set_num_threads(1)
base, images, known, *adapters = sys.argv[1:]
processor, found = AutoImageProcessor.from_pretrained(base), []
files = sorted([*Path(images).glob("*/*.png"), *Path(known).glob("*/*.png")])
read = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
for adapter in adapters:
    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForImageClassification.from_pretrained(
        base, config=config, ignore_mismatched_sizes=True
    )
    model, rights = PeftModel.from_pretrained(model, adapter).eval(), {}
    for file, logits in zip(files, model(**read).logits.tolist()):
        rights.setdefault(file.parent.name, []).append(logits)
    found.append([config.id2label, config.own_classes, rights])
print(json.dumps(found))
"""


def test_one_plain_adapter_gives_the_last_row_in_a_fresh_process(
    done: Sequence, world: Path, python: str
) -> None:
    arms = [name for name in ARMS if name not in ("full", "separate")]
    adapters = [done.folder / of(done, arm)["runs"][-1] / "adapter" for arm in arms]
    arguments = map(str, [world / "base", world / "test", world / "known", *adapters])
    out = subprocess.run(
        [python, "-W", "ignore", "-c", FRESH, *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for arm, (names, own, rights) in zip(
        arms, json.loads(out.stdout.splitlines()[-1]), strict=True
    ):
        number = {name: int(key) for key, name in names.items()}
        assert [name for key, name in names.items() if int(key) >= own] == NEW

        def share(
            classes: Any, among: list[int], rights: Any = rights, number: Any = number
        ) -> float:
            asked = [(number[c], logits) for c in classes for logits in rights[c]]
            best = [max(among, key=logits.__getitem__) for _, logits in asked]
            hits = [b == n for b, (n, _) in zip(best, asked, strict=True)]
            return float(sum(hits) / len(hits))

        new = list(range(own, len(number)))
        row = [share(CLASSES, list(range(own))), *(share(c, new) for c in TASKS.values())]
        assert of(done, arm)["R"][-1] == pytest.approx(row)
        by_task = [share(c, [number[name] for name in c]) for c in TASKS.values()]
        assert of(done, arm, "task_incremental")["R"][-1] == pytest.approx([row[0], *by_task])


def test_both_accuracies_have_their_matrix_and_metrics(done: Sequence) -> None:
    classes, by_task = of(done, "continued"), of(done, "continued", "task_incremental")
    for name, found in (("", classes), ("task_accuracy", by_task)):
        R = np.array(found["R"])
        for i, run_id in enumerate(found["runs"], start=1):
            run = RunFolder(done.folder / run_id)
            for j, task in enumerate(TASKS, start=1):
                score = read_json(run.scores("final", task))
                assert R[i, j] == (score["extra"][name] if name else score["value"])
        expected = continual_metrics(R[1:, 1:], R[0, 1:])
        assert {metric: found["metrics"][metric] for metric in expected} == expected
    assert (np.array(by_task["R"]) >= np.array(classes["R"])).all()
    assert by_task["R"] != classes["R"]
    page = re.sub(r"<script.*?</script>", "", report(done.folder).read_text(), flags=re.DOTALL)
    assert "Class-incremental" in page
    assert "Task-incremental" in page
    assert page.count("all together") == 2
    assert page.count("then alone") == 2


def test_all_tasks_share_one_head_and_the_loss_has_its_data_s_classes(
    done: Sequence, world: Path
) -> None:
    over = {
        arm: [
            Recipe.load(done.folder / run / "recipe.yaml").sequence for run in of(done, arm)["runs"]
        ]
        for arm in ("continued", "replayed", "joint", "separate")
    }
    found = {arm: [each and each.classes for each in runs] for arm, runs in over.items()}
    assert found["continued"] == found["separate"] == [NEW[:2], NEW[2:]]
    assert found["replayed"] == [NEW[:2], NEW]
    assert found["joint"] == [NEW]
    for setting, second in (("seen", NEW), ("all", None)):
        _, recipes = SequenceRecipe.parse(definition_of(world, loss_over=setting)).chains()
        last = [recipe.sequence for recipe in recipes.values()][-1]
        assert last is not None
        assert last.classes == second
    assert {tuple(recipe.adapter.head) for recipe in recipes.values()} == {tuple(NEW)}


def test_a_row_is_learned_against_the_classes_that_are_asked_for(world: Path) -> None:
    model = learn_among(add_head(load_model(str(world / "base")), NEW), NEW[2:])
    probe = modality_of(model).probe(model)
    labels = torch.tensor([5, 6, 1, 4])  # rings, zebra, one of its own, and waves
    logits = model(**probe).logits
    rows = [(0, slice(5, 7), 0), (1, slice(5, 7), 1), (2, slice(0, 3), 1), (3, slice(3, 7), 1)]
    expected = [-logits[row, part].log_softmax(-1)[label] for row, part, label in rows]
    loss = model(**probe, labels=labels).loss
    assert torch.allclose(loss, torch.stack(expected).mean())
    loss.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


def test_what_sequences_are_compared_with(done: Sequence) -> None:
    joint, separate = of(done, "joint"), of(done, "separate")
    (run,) = joint["runs"]
    recipe = Recipe.load(done.folder / run / "recipe.yaml")
    assert recipe.training.steps == 12
    assert [weight for _, weight in recipe.data.sources] == [16, 16]
    assert recipe.after is None
    assert joint["R"][1] == [None] * 3
    known = {name for name, value in joint["metrics"].items() if value is not None}
    assert known == {"ACC", "knowledge lost"}
    assert joint["metrics"]["ACC"] == sum(joint["R"][2][1:]) / 2

    # The first task is learned alone in a sequence too.
    assert separate["runs"][0] == of(done, "continued")["runs"][0]
    assert separate["metrics"]["ACC"] == (separate["R"][1][1] + separate["R"][2][2]) / 2
    assert separate["metrics"]["forgetting"] is None
    assert {each["lost"] for each in separate["lost"]} == {None}


def test_what_has_no_order_is_learned_once(world: Path) -> None:
    definition = definition_of(world, orders=[["then", "first"], ["first", "then"], ["then"]])
    definition["arms"] = [{"between": "joint"}, {"between": "separate"}]
    chains, recipes = SequenceRecipe.parse(definition).chains()
    assert [(c.bound, c.tasks) for c in chains] == [
        (bound, tasks)
        for bound in ("joint", "separate")
        for tasks in (("first", "then"), ("then",))
    ]
    assert len(recipes) == 3


def _do(definition: dict[str, Any], out: Path) -> None:
    sequence(definition, out)


def test_killed_at_random_moments_it_ends_with_the_same_matrices(
    done: Sequence, world: Path, tmp_path: Path
) -> None:
    definition = definition_of(world, arms=[{"name": "stacked", **ARMS["stacked"]}])
    assert killed_until_done(_do, definition, tmp_path) > 0
    found = Sequence(tmp_path / definition["name"]).matrices
    assert found["sequences"] == [of(done, "stacked")]
    assert found["task_incremental"]["sequences"] == [of(done, "stacked", "task_incremental")]


def test_killed_before_three_random_touches_of_its_folder_it_ends_with_the_same_matrix(
    world: Path, tmp_path: Path
) -> None:
    content = definition_of(world, arms=[{"name": "repaired", **ARMS["repaired"]}])
    content["recipe"]["training"] |= {"steps": 2, "checkpoint_every": 1}
    counts = tmp_path / "counts"

    def do(part: str, moment: int | None) -> int | None:
        out = tmp_path / part
        return in_a_process(killed_when_touching, out, counts, moment, _do, content, out)

    assert do("whole", None) == 0
    total, draw = int(counts.read_text()), draws()
    for _ in range(3):  # a quarter of all each, so that there is always something left
        assert do("cut", draw.randint(1, total // 4)) == -signal.SIGKILL
    assert do("cut", None) == 0
    whole, cut = (Sequence(tmp_path / part / content["name"]) for part in ("whole", "cut"))
    assert not cut.failed
    assert cut.matrices == whole.matrices
    assert not list((tmp_path / "cut").rglob(".tmp-*"))


def test_the_classes_of_one_data_set_are_learned_in_several_orders(
    world: Path, tmp_path: Path
) -> None:
    definition = definition_of(world)
    del definition["tasks"]
    measure = {"kind": "image_accuracy", "path": str(world / "test")}
    definition["split"] = {"data": str(world / "train"), "measure": measure, "tasks": 2}
    definition["recipe"]["training"]["steps"] = 2
    definition["orders"] = {"a": NEW, "b": [*NEW[:2], "zebra", "rings"], "c": [*NEW[1:], NEW[0]]}
    done = sequence(definition, tmp_path)
    assert not [run.record["reason"] for run in done.failed]
    assert len(done.runs) == 4
    first, second = done.matrices["sequences"]  # "b" has the tasks of "a", and counts once
    assert first["tasks"] == ["lines, waves", "rings, zebra"]
    assert second["tasks"] == ["rings, waves", "lines, zebra"]
    assert done.matrices["classes"]["rings, waves"] == ["rings", "waves"]
    by_task = done.matrices["task_incremental"]["sequences"]
    for found in (*done.matrices["sequences"], *by_task):
        assert all(value is not None for row in found["R"] for value in row)
        assert found["metrics"]["ACC"] == sum(found["R"][-1][1:]) / 2
    page = report(done.folder)
    assert '<th scope="col">lines, zebra</th>' in page.read_text()
    assert "2 sequences · 2 tasks" in page.read_text()
    assert "lines-zebra" in (page.parent / "results.csv").read_text()


@pytest.mark.parametrize("between", ["continue", "stack"])
def test_sentences_are_learned_so_too(between: str, tmp_path: Path) -> None:
    save_text_classifier(tmp_path / "base")
    rows = {
        name: [{"sentence": f"{label} {n}", "label": label} for n in range(6) for label in classes]
        for name, classes in TASKS.items()
    }
    tasks = []
    for name, found in rows.items():
        file = str(write_rows(tmp_path / f"{name}.jsonl", found))
        measure = {"kind": "sentence_accuracy", "name": name, "path": file}
        tasks.append({"name": name, "data": file, "measure": measure})
    recipe = {
        "base": str(tmp_path / "base"),
        "adapter": {"method": "lora", "rank": 2, "alpha": 2, "head": "new"},
        "data": {"max_length": 32},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-2},
    }
    done = sequence(
        {"name": "words", "recipe": recipe, "tasks": tasks, "between": between}, tmp_path
    )
    assert not [run.record["reason"] for run in done.failed]
    assert done.matrices["knowledge"] is None
    assert done.matrices["sequences"][0]["metrics"]["ACC"] is not None
    assert done.matrices["task_incremental"] is not None
