"""Bases that are encoders without a head: what they learn has a new one, and no other is asked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    LlamaModel,
    RobertaModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

import forgetless as fl
from forgetless.cli.commands.aftercare import Asked, adjust, look_into
from forgetless.cli.commands.measuring import measure
from forgetless.cli.commands.sharing import export_adapter, merge_adapter
from forgetless.cli.commands.starts import collect_statistics
from forgetless.core.errors import UserError
from forgetless.core.files import read_json, read_jsonl
from forgetless.core.settings import with_overrides
from forgetless.data.modality import load_processor, modality_of
from forgetless.data.settings import CalibrationSettings
from forgetless.methods import METHODS
from forgetless.models.heads import add_head, heads_of, learn_among, new_modules
from forgetless.models.load import load_model
from forgetless.models.state import adapter_off
from forgetless.models.targets import target_layers
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe
from forgetless.studies.run import run
from tests.classifiers import check_start, check_stopped
from tests.images import SWIN_SIZES, VIT_SIZES, save_images
from tests.images import save_classifier as save_image_classifier
from tests.sentences import CLASSES, FAMILIES, save_classifier, sentences, write_rows

pytest_plugins = ["tests.quick_python"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*saw fewer tokens"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT's
]

NEW = ("lines", "rings", "waves")
IMAGES: dict[str, Any] = {
    "vit": (ViTModel, ViTConfig(**VIT_SIZES)),
    "dinov2": (Dinov2Model, Dinov2Config(**VIT_SIZES)),
    "swin": (SwinModel, SwinConfig(**SWIN_SIZES)),
    "convnext": (ConvNextModel, ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)),
}
TEXTS: dict[str, Any] = {"bert": BertModel, "roberta": RobertaModel, "llama": LlamaModel}
"""What they are without a head; RoBERTa's has a layer of its own before the last one."""


def save_bare(folder: Path, family: str) -> str:
    """An encoder with random weights and what reads its inputs, but no head."""
    if family in IMAGES:
        save_image_classifier(folder)  # of which the processor stays
        model_class, config = IMAGES[family]
    else:
        save_classifier(folder, "bert" if family == "distilbert" else family)
        whole = AutoConfig.from_pretrained(folder)
        model_class, config = TEXTS.get(family), whole
        if family == "distilbert":
            sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}
            model_class = DistilBertModel
            config = DistilBertConfig(vocab_size=whole.vocab_size, **sizes)
    torch.manual_seed(1)
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model = model_class(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0) if weight.ndim == 2 else weight.add_(0.02)
    model.save_pretrained(folder)
    assert read_json(folder / "config.json")["architectures"] == [model_class.__name__]
    return str(folder)


def logits_of(model: Any) -> Tensor:
    probe = modality_of(model).probe(model)
    with torch.no_grad():
        logits: Tensor = model.eval()(**probe).logits
    return logits


@pytest.mark.parametrize("family", [*IMAGES, *TEXTS, "distilbert"])
def test_all_beside_the_encoder_is_new_and_nothing_is_lost(family: str, tmp_path: Path) -> None:
    base = save_bare(tmp_path / "base", family)
    with pytest.raises(UserError, match=r"no trained head of classes; set 'adapter.head: new'"):
        load_model(base)
    torch.manual_seed(5)
    model = load_model(base, new_classes=NEW)
    before = logits_of(model)
    assert before.shape == (4, 3)
    assert torch.equal(before, logits_of(load_model(base, new_classes=NEW)))
    assert heads_of(model) is None
    assert add_head(model, NEW) is model
    with pytest.raises(UserError, match="has a new head already"):
        add_head(model, ["a", "b"])
    encoder, bare = model.base_model.state_dict(), AutoModel.from_pretrained(base).state_dict()
    assert all(torch.equal(encoder[n], bare[n]) for n in encoder.keys() & bare.keys())
    expected = {"distilbert": ["pre_classifier", "classifier"], "llama": ["score"]}
    assert new_modules(model) == expected.get(family, ["classifier"])

    adapted = fl.attach(model, "pissa", rank=2, alpha=2)
    assert torch.equal(logits_of(adapted), before)
    layers = target_layers(adapted)
    assert layers
    assert not any(name.split(".")[0] in new_modules(adapted) for name in layers)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=random))
    after = logits_of(adapted)
    assert not torch.equal(after, before)
    with adapter_off(adapted):
        assert torch.equal(logits_of(adapted), before)

    fl.save(adapted, tmp_path / "native")
    fl.export(adapted, tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["modules_to_save"] == list(
        new_modules(adapted)
    )
    loaded = fl.load(load_model(base, new_classes=NEW), tmp_path / "native")
    assert torch.equal(logits_of(loaded), after)
    is_image = family in IMAGES
    kind = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
    plain = kind.from_pretrained(base, num_labels=3)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.allclose(logits_of(theirs), after, atol=1e-5)
    ours = fl.load(kind.from_pretrained(base, num_labels=3), tmp_path / "adapter")
    assert torch.allclose(logits_of(ours), after, atol=1e-5)
    assert ours.config.id2label == dict(enumerate(NEW))
    with pytest.raises(UserError, match="a head of 3 classes for a base without one"):
        fl.load(kind.from_pretrained(base, num_labels=2), tmp_path / "adapter")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits_of(load_model(str(tmp_path / "merged"))), after, atol=1e-5)


SCRIPTS: dict[str, tuple[str, Any, int]] = {
    "bert": ("bert", AutoModelForSequenceClassification, 3),
    "reward": ("llama", AutoModelForSequenceClassification, 1),
    "tokens": ("roberta", AutoModelForTokenClassification, 5),
    "answers": ("bert", AutoModelForQuestionAnswering, 2),
    "vit": ("vit", AutoModelForImageClassification, 4),
    "other classes": ("own vit", AutoModelForImageClassification, 4),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_head_that_transformers_drew_is_trained_and_exported_whole(
    script: str, tmp_path: Path
) -> None:
    """A script's own line loads the model; each time the head is another."""
    family, kind, labels = SCRIPTS[script]
    is_own = family.startswith("own")
    base = str(save_image_classifier(tmp_path / "base")) if is_own else save_bare(tmp_path, family)

    def loaded(seed: int) -> Any:
        torch.manual_seed(seed)
        return kind.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)

    def said(model: Any) -> Tensor:
        with torch.no_grad():
            found = model.eval()(**modality_of(model).probe(model))
            logits: Tensor = found["start_logits" if script == "answers" else "logits"]
        return logits

    model = loaded(1)
    before = said(model)
    adapted = fl.attach(model, "pissa", rank=2, alpha=2)
    assert torch.equal(said(adapted), before)
    head = [n for n, w in adapted.named_parameters() if w.requires_grad and ".lora_" not in n]
    assert head
    assert all(".modules_to_save." in name for name in head)
    torch.manual_seed(2)
    for weight in adapted.parameters():
        weight.data += 0.05 * torch.randn(weight.shape) if weight.requires_grad else 0
    fl.export(adapted, tmp_path / "adapter")
    fl.save(adapted, tmp_path / "native")
    theirs = PeftModel.from_pretrained(loaded(3), tmp_path / "adapter")
    assert torch.allclose(said(theirs), said(adapted), atol=1e-5)
    assert torch.equal(said(fl.load(loaded(4), tmp_path / "native")), said(adapted))
    with adapter_off(adapted):
        assert torch.equal(said(adapted), before)
    adapted.save_pretrained(str(tmp_path / "checkpoint"))  # as a Trainer does
    fl.export(fl.load(loaded(5), tmp_path / "checkpoint"), tmp_path / "again")
    classes = read_json(tmp_path / "again" / "config.json")["id2label"]
    assert classes == {str(n): f"LABEL_{n}" for n in range(labels)}


def test_a_head_that_was_loaded_is_the_bases_own(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(save_classifier(tmp_path))
    adapted = fl.attach(model, "lora", rank=2)
    assert adapted.peft_config["default"].modules_to_save is None
    assert not hasattr(model.config, "own_classes")


@pytest.mark.parametrize("family", ["dinov2", "roberta"])
def test_the_head_of_a_base_of_16_bits_is_trained_in_32(family: str, tmp_path: Path) -> None:
    base = save_bare(tmp_path, family)
    adapted = fl.attach(load_model(base, dtype="bfloat16", new_classes=NEW), "lora", 2, 2)
    adapted(**modality_of(adapted).probe(adapted)).logits.sum().backward()
    head = [w for n, w in adapted.named_parameters() if ".modules_to_save." in n]
    assert head
    assert all(w.dtype == torch.float32 and w.grad is not None for w in head)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of sentences, what it is to learn, and pairs to find."""
    folder = tmp_path_factory.mktemp("world")
    save_bare(folder / "base", "roberta")
    save_bare(folder / "vit", "vit")
    save_images(folder / "images", dict.fromkeys(NEW, 6))
    write_rows(folder / "train.jsonl", sentences(CLASSES, 8))
    write_rows(folder / "test.jsonl", sentences(CLASSES, 5))
    pairs = [{"sentence1": f"{n} peace goal", "sentence2": f"{n} match {n}"} for n in range(7)]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


def recipe_of(world: Path, method: str = "lora_null_v1", **changes: Any) -> Recipe:
    test = str(world / "test.jsonl")
    content = {
        "base": str(world / "base"),
        "adapter": {"method": method, "rank": 2, "alpha": 2, "head": "new"},
        "calibration": {"source": str(world / "pairs.jsonl"), "samples": 7, "batch_size": 4},
        "data": {"train": str(world / "train.jsonl"), "max_length": 64},
        "training": {"learning_rate": 1e-2, "steps": 6, "batch_size": 4, "log_every": 1}
        | {"head_learning_rate": 5e-2, "probe_steps": 3},
        "tasks": {
            "learning": [{"kind": "sentence_accuracy", "name": "new", "path": test}],
            "forgetting": [
                {"kind": "retrieval", "path": str(world / "pairs.jsonl")},
                {"kind": "neighbours", "path": test, "k": 3},
            ],
        },
    }
    return Recipe.parse(with_overrides(content, changes))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_every_start_is_the_base_bit_for_bit(method: str, world: Path) -> None:
    check_start(method, world / "base", world / "pairs.jsonl", world / "train.jsonl", CLASSES)


FRESH = """
import json, sys, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
base, adapter, file = sys.argv[1:]
names = AutoConfig.from_pretrained(adapter).id2label
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names))
model, found = PeftModel.from_pretrained(model, adapter).eval(), []
tokenizer = AutoTokenizer.from_pretrained(base)
for line in open(file):
    given = tokenizer(json.loads(line)["sentence"], return_tensors="pt")
    given.pop("token_type_ids", None)
    found.append(names[int(model(**given).logits.argmax())])
print(json.dumps(found))
"""


def test_a_run_learns_and_a_fresh_process_agrees(world: Path, tmp_path: Path, python: str) -> None:
    longer: dict[str, Any] = {"training.steps": 120, "training.probe_steps": 120}
    recipe = recipe_of(world, **longer)
    assert check(recipe) == []
    done = run(recipe, tmp_path)
    assert done.record["start"]["equals_base"]
    rows = {row["task"]: row for row in done.scores}
    assert all(row["step0_score"] == row["base_score"] for row in rows.values())
    assert rows["new"]["score"] > 0.7
    assert (rows["retrieval"]["kind"], rows["retrieval"]["n"]) == ("forgetting", 7)
    adapter, test = done.folder / "adapter", str(world / "test.jsonl")
    arguments = [str(world / "base"), str(adapter), test]
    out = subprocess.run(
        [python, "-W", "ignore", "-c", FRESH, *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answers = read_jsonl(done.folder / "items" / "final" / "new.jsonl")
    assert json.loads(out.stdout.splitlines()[-1]) == [item["answer"] for item in answers]
    specs = [*recipe.tasks.learning, *recipe.tasks.forgetting]
    found = measure(str(world / "base"), specs, adapter=done.folder)
    assert found.adapted is not None
    for name, row in rows.items():
        again = found.base[name].value, found.adapted[name].value
        assert again == (row["base_score"], row["score"])
    assert export_adapter(done.folder, tmp_path / "again").exact
    card = (adapter / "README.md").read_text()
    assert "num_labels=len(names), ignore_mismatched_sizes=True)" in card


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_stopped_run_comes_to_the_same_weights(method: str, world: Path, tmp_path: Path) -> None:
    check_stopped(recipe_of(world, method, **{"training.checkpoint_every": 2}), tmp_path)


def test_the_verbs_take_a_run_and_an_adapter_of_pefts(world: Path, tmp_path: Path) -> None:
    """PEFT trains the head beside the adapter and does not name its classes."""
    base, pairs = str(world / "base"), str(world / "pairs.jsonl")
    done = run(recipe_of(world), tmp_path / "runs").folder
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    theirs = get_peft_model(plain, config).eval()
    for name, weight in theirs.named_parameters():
        weight.data += 0.1 * torch.randn(weight.shape) if "lora_B" in name else 0
    theirs.save_pretrained(tmp_path / "peft")
    text = CalibrationSettings(source=pairs, samples=7, max_length=32)
    for trained in (str(done), str(tmp_path / "peft")):
        asked = Asked(trained, base, pairs, strengths=(0.1,), calibration=text)
        found = adjust(asked, tmp_path / f"repaired-{Path(trained).name}")
        assert found.chosen is not None
        assert found.chosen.kl is None
        assert 0 < found.chosen.drift < 1
        assert found.folder is not None
        assert measure(base, [{"kind": "retrieval", "path": pairs}], adapter=found.folder).adapted
        assert look_into(trained, base, None, calibration=text).rows
        assert len(collect_statistics(base, text, adapter=trained)) > 0
    export_adapter(tmp_path / "peft", tmp_path / "plain", base=base)
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), tmp_path / "plain"
    )
    assert torch.allclose(logits_of(again), logits_of(theirs), atol=1e-5)
    merge_adapter(tmp_path / "peft", tmp_path / "merged", base=base)
    merged = load_model(str(tmp_path / "merged"))
    assert torch.allclose(logits_of(merged), logits_of(theirs), atol=1e-5)


def test_an_adapter_of_an_encoder_alone_is_for_python(world: Path, tmp_path: Path) -> None:
    base = str(world / "base")
    config = LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    theirs = get_peft_model(AutoModel.from_pretrained(base), config)
    for name, weight in theirs.named_parameters():
        weight.data += 0.1 if "lora_B" in name else 0
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match="holds no head of classes") as refused:
        export_adapter(tmp_path / "peft", tmp_path / "plain", base=base)
    assert f"forgetless.load(transformers.AutoModel.from_pretrained('{base}')" in str(refused.value)
    fl.export(fl.load(AutoModel.from_pretrained(base), tmp_path / "peft"), tmp_path / "plain")


def test_images_too(world: Path, tmp_path: Path) -> None:
    images = str(world / "images")
    tasks = {"learning": [], "forgetting": [{"kind": "neighbours", "path": images, "k": 3}]}
    changes = {"base": str(world / "vit"), "data.train": images, "calibration.source": images}
    recipe = recipe_of(world, **changes, tasks=tasks)
    assert check(recipe) == []
    (row,) = run(recipe, tmp_path).scores
    assert row["step0_score"] == row["base_score"] > 0.9  # the classes have colours of their own


def test_what_only_a_head_can_answer_is_refused(world: Path) -> None:
    base, test = str(world / "base"), str(world / "test.jsonl")
    unasked: dict[str, Any] = {"training.probe_steps": 0, "training.head_learning_rate": None}
    (problem,) = check(recipe_of(world, **{"adapter.head": "own", **unasked}))
    assert problem.startswith("base: ")
    assert "is a RobertaModel, which has no trained head of classes" in problem
    for task, words in (
        ({"kind": "class_kl", "path": test}, "neighbours or retrieval needs none"),
        ({"kind": "sentence_accuracy", "path": test, "head": "own"}, "has no head of its own"),
    ):
        asked: dict[str, Any] = {"tasks.forgetting": [task]}
        problems = check(recipe_of(world, **asked))
        assert len(problems) == 1
        assert words in problems[0]
    for kind in ("kl", "ewc"):
        penalty = {"kind": kind, "weight": 1.0, "source": str(world / "pairs.jsonl")}
        (problem,) = check(recipe_of(world, penalties=[penalty]))
        assert problem == f"penalties.0: {kind} asks the base's own head, and this base has none"
    varied: dict[str, Any] = {"data.augment": {"flip": True}}
    (problem,) = check(recipe_of(world, **varied))
    assert problem.startswith("data.augment: is for images, and ")
    (problem,) = check(recipe_of(world, dial={"scales": [0.5]}))
    assert "own head says, and this base has none" in problem
    model = load_model(base, new_classes=CLASSES)
    with pytest.raises(UserError, match="neighbours or retrieval needs none"):
        fl.evaluate(
            model, {"kind": "class_kl", "path": test}, load_processor(base), reference=model
        )
    with pytest.raises(UserError, match="rows need sentence1 and sentence2"):
        fl.evaluate(model, {"kind": "retrieval", "path": test}, load_processor(base))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pairs_find_each_other_by_mean_states(family: str, world: Path, tmp_path: Path) -> None:
    base = save_bare(tmp_path / "base", family)
    task = {"kind": "retrieval", "path": str(world / "pairs.jsonl")}
    model, processor = load_model(base, new_classes=CLASSES), load_processor(base)
    found = fl.evaluate(model, task, processor, batch_size=3)["retrieval"]
    encoder, words = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)

    def vector(text: str) -> Tensor:
        with torch.no_grad():
            states = encoder(input_ids=words(text, return_tensors="pt")["input_ids"])
        return torch.nn.functional.normalize(states.last_hidden_state[0].mean(0), dim=0)

    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    known = torch.stack([vector(row["sentence2"]) for row in rows])
    expected = [rows[int((known @ vector(row["sentence1"])).argmax())]["sentence2"] for row in rows]
    assert [item.answer for item in found.items] == expected
    right = [row["sentence2"] == answer for row, answer in zip(rows, expected, strict=True)]
    assert found.value == pytest.approx(sum(right) / 7)
    with_own = save_classifier(tmp_path / "own", family)
    again = fl.evaluate(load_model(str(with_own)), task, load_processor(str(with_own)))
    assert again["retrieval"].n == 7


def test_weights_that_the_encoder_lacks_are_not_made_up(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"incomplete: 2 missing, 'bert\.pooler"):
        load_model(str(tmp_path), new_classes=NEW)
    assert FAMILIES["bert"]


def test_a_head_alone_is_learned_among_some_classes_too(tmp_path: Path) -> None:
    model = load_model(save_bare(tmp_path / "base", "bert"), new_classes=NEW)
    probe, labels = modality_of(model).probe(model), torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        whole = model(**probe, labels=labels)
        learn_among(model, NEW[:2])
        some = model(**probe, labels=labels)
    assert torch.equal(some.logits, whole.logits)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :2], labels)
    assert float(some.loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(some.loss) < float(whole.loss)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load_model(str(tmp_path / "saved"))), logits_of(model))
