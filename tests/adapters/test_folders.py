"""Two of anything on one model and in one folder: adapters, writers, calls that failed before."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

from forgetless.adapters import attachment, folders
from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export, load, save
from forgetless.core.errors import UserError
from forgetless.models.state import as_base
from tests.adapters.test_attachment import ATTACHABLE, gradients, logits, statistics, trainable
from tests.families import FAMILIES

KINDS = ["lora", "pissa", "lora_null_v2", "mica"]
Writer = Callable[..., Any]


def put_on(model: Any, method: str, seed: int, **settings: Any) -> Any:
    """An adapter that has been trained, one could say."""
    usual: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "rank": 2, "alpha": 3}
    model = attach(
        model,
        method,
        stats=statistics("llama"),
        task_stats=statistics("llama", first=20),
        gradients=gradients("llama"),
        **usual | settings,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(model):
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


@cache
def made(method: str, seed: int = 1) -> tuple[Any, Tensor]:
    model = put_on(FAMILIES["llama"].model(), method, seed)
    return model, logits(model, "llama")


def by_peft(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(str(folder))


def loaded(folder: Path, **arguments: Any) -> Any:
    return load(FAMILIES["llama"].model(), folder, **arguments)


# ---- two adapters on one model -------------------------------------------------------------------


@pytest.mark.parametrize("write", [save, export], ids=["native", "exported"])
@pytest.mark.parametrize("method", ATTACHABLE)
def test_a_second_adapter_is_loaded_beside_the_first(
    method: str, write: Writer, tmp_path: Path
) -> None:
    base = logits(FAMILIES["llama"].model(), "llama")
    models = {"one": made(method, 1), "two": made(method, 2)}
    for name, (model, _) in models.items():
        write(model, tmp_path / name)
    both: Any = FAMILIES["llama"].model()
    for name in models:
        both = load(both, tmp_path / name, adapter_name=name)
    for name in ("one", "two", "one"):
        both.set_adapter(name)
        assert torch.equal(logits(both, "llama"), logits(loaded(tmp_path / name), "llama"))
        torch.testing.assert_close(logits(both, "llama"), models[name][1], atol=1e-5, rtol=0)
    with both.disable_adapter():
        assert torch.equal(logits(both, "llama"), base)


def test_native_exported_and_foreign_adapters_stand_side_by_side(tmp_path: Path) -> None:
    save(made("pissa")[0], tmp_path / "native")
    export(made("milora")[0], tmp_path / "exported")
    save(made("mica")[0], tmp_path / "frozen")
    foreign = get_peft_model(
        FAMILIES["llama"].model(),
        LoraConfig(
            r=3, target_modules=["v_proj", "q_proj"], use_dora=True, modules_to_save=["lm_head"]
        ),
    )
    for weight in trainable(foreign):
        weight.data.add_(0.1)
    by_peft(foreign, tmp_path / "foreign")
    names = ["native", "exported", "frozen", "foreign"]
    alone = {name: logits(loaded(tmp_path / name), "llama") for name in names}
    both: Any = FAMILIES["llama"].model()
    for name in names:
        both = load(both, tmp_path / name, adapter_name=name)
    both = put_on(both, "olora", 5, adapter_name="attached", target_modules=["k_proj"])
    for name in [*reversed(names), *names]:
        both.set_adapter(name)
        assert torch.equal(logits(both, "llama"), alone[name]), name
        save(both, tmp_path / f"again-{name}", adapter_name=name)
        assert torch.equal(logits(loaded(tmp_path / f"again-{name}"), "llama"), alone[name])
    with both.disable_adapter():
        assert torch.equal(logits(both, "llama"), logits(FAMILIES["llama"].model(), "llama"))


def test_a_second_attach_warns_of_nothing_and_a_shared_layer_still_does() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = attach(FAMILIES["llama"].model(), "lora", 2, adapter_name="first")
        attach(model, "pissa", 2, adapter_name="second")
    shared: Any = FAMILIES["llama"].model()
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.gate_proj
    for name in ("first", "second"):
        with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.up_proj' is the same module as"):
            shared = attach(shared, "lora", 2, adapter_name=name)


NAMES = [
    "math.v1",
    "",
    "__base__",
    "weight",
    "layers",
    "0",
    "q_proj",
    "lora_A",
    "forward",
    "training",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_peft_cannot_use_is_one_clear_line(name: str, tmp_path: Path) -> None:
    """As a second adapter's name, "layers" would empty what is saved of the first."""
    save(made("lora")[0], tmp_path)
    for model in (FAMILIES["llama"].model(), made("pissa")[0]):
        before = [n for n, _ in model.named_modules()]
        with pytest.raises(UserError, match=r"\Aadapter_name .*\Z"):
            attach(model, "lora", 2, adapter_name=name)
        with pytest.raises(UserError, match=r"\Aadapter_name .*\Z"):
            load(model, tmp_path, adapter_name=name)
        assert [n for n, _ in model.named_modules()] == before


@pytest.mark.parametrize("name", ["lora", "l", "default_0", "a-b", "数学", "best adapter"])
def test_any_other_name_will_do(name: str, tmp_path: Path) -> None:
    model, wanted = made("pissa")
    save(model, tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has fears of names that are parts of "lora_"
        both = load(FAMILIES["llama"].model(), tmp_path / "first", adapter_name=name)
        both = put_on(both, "pissa", 2, adapter_name="second")
    save(both, tmp_path / "again", adapter_name=name)
    assert torch.equal(logits(loaded(tmp_path / "again"), "llama"), wanted)


def test_a_model_with_adapters_of_another_kind_is_refused(tmp_path: Path) -> None:
    from peft import IA3Config

    save(made("lora")[0], tmp_path)
    other = get_peft_model(
        FAMILIES["llama"].model(), IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    )
    bare = made("lora")[0].get_base_model()
    for model, match in ((other, "adapters of the type IA3"), (bare, "pass that PeftModel itself")):
        with pytest.raises(UserError, match=match):
            attach(model, "lora", 2, adapter_name="second")
        with pytest.raises(UserError, match=match):
            load(model, tmp_path, adapter_name="second")


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, wanted = made("pissa")
    save(model, tmp_path / "whole")
    save(model, tmp_path / "damaged")
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "0.mlp" not in name}, file)
    base = FAMILIES["llama"].model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises((UserError, KeyError)):
        load(base, tmp_path / "damaged")
    assert [name for name, _ in base.named_modules()] == names
    first = load(base, tmp_path / "whole")
    with pytest.raises((UserError, KeyError)):
        load(first, tmp_path / "damaged", adapter_name="second")
    second = load(first, tmp_path / "whole", adapter_name="second")
    assert torch.equal(logits(second, "llama"), wanted)


def test_an_attach_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise UserError("no start fits this layer")

    monkeypatch.setattr(attachment, "install", refused)
    base = FAMILIES["llama"].model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(UserError, match="no start fits"):
        attach(base, "lora", 2)
    assert [name for name, _ in base.named_modules()] == names

    monkeypatch.undo()
    first, wanted = put_on(base, "pissa", 1), made("pissa")[1]
    monkeypatch.setattr(attachment, "install", refused)
    with pytest.raises(UserError, match="no start fits"):
        attach(first, "lora", 2, adapter_name="second")
    assert set(first.peft_config) == {"default"}
    assert first.active_adapter == "default"
    assert not any("second" in name for name, _ in first.named_modules())
    assert torch.equal(logits(first, "llama"), wanted)


# ---- two writers into one folder -----------------------------------------------------------------

WRITERS: dict[str, Writer] = {"save": save, "export": export, "peft": by_peft}


@pytest.mark.parametrize("order", list(itertools.product(WRITERS, WRITERS)), ids="-".join)
@pytest.mark.parametrize("methods", [("pissa", "lora"), ("mica", "pissa"), ("lora", "mica")])
def test_the_last_writer_of_a_folder_counts(
    methods: tuple[str, str], order: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for method, writer in zip(methods, order, strict=True):
        WRITERS[writer](made(method)[0], tmp_path)
        again = loaded(tmp_path, trainable=True)
        wanted = made(method)[1]
        torch.testing.assert_close(logits(again, "llama"), wanted, atol=1e-5, rtol=0)
        if writer != "export":
            assert torch.equal(logits(again, "llama"), wanted)
        if writer == "save":
            names = {name for name, _ in made(method)[0].named_parameters() if _.requires_grad}
            assert {name for name, _ in again.named_parameters() if _.requires_grad} == names
    left = {file.name for file in tmp_path.iterdir()}
    written = {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}
    more = {"save": {"forgetless.json"}, "export": {"README.md"}, "peft": {"README.md"}}
    assert written | more[order[1]] <= left
    assert (tmp_path / "notes.txt").read_text() == "mine"
    if "peft" not in order:  # which leaves the files of others, and whose card is left
        assert left == written | more[order[1]]


class BrokenError(Exception):
    """The disk is full, say."""


@pytest.mark.parametrize("write", [save, export])
@pytest.mark.parametrize("more", ["", "notes.txt", "notes/of.txt"])
def test_a_writer_that_fails_leaves_the_old_adapter(
    write: Writer, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    save(made("pissa")[0], folder)
    if more:
        (folder / more).parent.mkdir(exist_ok=True)
        (folder / more).write_text("mine")

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    before = content()

    def broken(*_: Any, **__: Any) -> None:
        raise BrokenError

    for name in ("write_tensors", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(folders, name, broken)
            with suppress(BrokenError):
                write(made("lora")[0], folder)
        assert content() == before
        assert list(tmp_path.iterdir()) == [folder]
    write(made("lora")[0], folder)
    assert not more or (folder / more).read_text() == "mine"
    torch.testing.assert_close(logits(loaded(folder), "llama"), made("lora")[1])


def test_a_card_that_somebody_made_their_own_stays(tmp_path: Path) -> None:
    export(made("lora")[0], tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    export(made("pissa")[0], tmp_path / "adapter")
    assert "pissa" in card.read_text()
    card.write_text("# My adapter\n")
    for write in (export, save, export):
        write(made("lora")[0], tmp_path / "adapter")
        assert card.read_text() == "# My adapter\n"


def test_the_working_folder_is_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        export(made("lora")[0], ".")
        assert Path.cwd() == tmp_path
        assert (Path.cwd() / "adapter_config.json").exists()
    torch.testing.assert_close(logits(loaded(Path()), "llama"), made("lora")[1])


# ---- what the files say --------------------------------------------------------------------------


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("write", [save, export])
def test_the_config_holds_what_is_not_usual(write: Writer, method: str, tmp_path: Path) -> None:
    """PEFT 0.13 fails on any key that it does not know, null or not."""
    write(made(method)[0], tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    always = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "bias"}
    always |= {"target_modules", "modules_to_save", "lora_dropout", "fan_in_fan_out"}
    always |= {"use_rslora", "use_dora"}
    anchored = {"start"} if write is save and method == "pissa" else set()
    assert set(found) - {"inference_mode"} == always | anchored
    assert found["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("write", [save, export])
@pytest.mark.parametrize("name", ["adapter_config.json", "forgetless.json"])
def test_a_line_that_is_missing_from_what_the_files_say_is_told(
    name: str, write: Writer, tmp_path: Path
) -> None:
    write(made("pissa")[0], tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    for number in range(len(lines)):
        if "base_model_name_or_path" in lines[number]:  # which people change
            continue
        file.write_text("".join(lines[:number] + lines[number + 1 :]))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                export(loaded(tmp_path / "adapter"), tmp_path / "again")
                said = ""
            except UserError as problem:
                said = str(problem)
        assert name in " ".join([said, *(str(warning.message) for warning in told)]), lines[number]


# ---- more than A and B ---------------------------------------------------------------------------


def with_embeddings(folder: Path, tied: bool, change: bool = True) -> tuple[Tensor, Any]:
    """A folder of PEFT that holds the embeddings, trained or not; its logits, and a base for it."""
    family = "llama" if tied else "qwen2"
    base: Any = FAMILIES[family].model()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for weight in trainable(model):
        weight.data.add_(0.1)
    if change:
        base.get_input_embeddings().weight.data.add_(0.3)
    model.save_pretrained(str(folder), save_embedding_layers=True)
    return logits(model, family), FAMILIES[family].model()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("only_input", [False, True])
def test_trained_embeddings_are_the_adapters_and_not_the_bases(
    tied: bool, only_input: bool, tmp_path: Path
) -> None:
    family = "llama" if tied else "qwen2"
    wanted, base = with_embeddings(tmp_path / "peft", tied)
    untouched = logits(base, family)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    if only_input:
        save_file({n: t for n, t in load_file(file).items() if "lm_head" not in n}, file)
    model = load(base, tmp_path / "peft")
    for again in (
        model,
        load(FAMILIES[family].model(), save(model, tmp_path / "native")),
        load(FAMILIES[family].model(), export(model, tmp_path / "plain").folder),
        PeftModel.from_pretrained(FAMILIES[family].model(), str(tmp_path / "plain")),
    ):
        torch.testing.assert_close(logits(again, family), wanted, atol=1e-5, rtol=0)
        with again.disable_adapter():
            assert torch.equal(logits(again, family), untouched)
    with as_base(model):
        assert torch.equal(logits(model, family), untouched)
    second = put_on(model, "pissa", 1, adapter_name="second")
    second.set_adapter("default")
    torch.testing.assert_close(logits(second, family), wanted, atol=1e-5, rtol=0)


def test_embeddings_that_are_the_bases_own_are_not_kept_twice(tmp_path: Path) -> None:
    wanted, base = with_embeddings(tmp_path / "peft", tied=True, change=False)
    model = load(base, tmp_path / "peft")
    assert torch.equal(logits(model, "llama"), wanted)
    export(model, tmp_path / "plain")
    assert all(".lora_" in name for name in load_file(tmp_path / "plain/adapter_model.safetensors"))


def test_embeddings_of_another_size_say_what_to_do(tmp_path: Path) -> None:
    _, base = with_embeddings(tmp_path, tied=True)
    base.resize_token_embeddings(90)
    with pytest.raises(
        UserError,
        match=r"embed_tokens' is \(90, 32\) and \(100, 32\) in the adapter.*token_embeddings",
    ):
        load(base, tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["lm_head"]}, r"'lm_head' is \(100, 32\), .* for \(103, 32\)"),
        ({"target_modules": ["lm_head", "q_proj"], "use_dora": True}, r"'lm_head' is \(100, 32\)"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "'lm_head' is"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [4, 102]}, "token 102, .* 100"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens' is"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # PEFT's
def test_an_adapter_of_added_tokens_says_what_to_do(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    longer = FAMILIES["qwen2"].model()
    longer.resize_token_embeddings(103, mean_resizing=False)
    get_peft_model(longer, LoraConfig(r=2, **settings)).save_pretrained(tmp_path)
    first: Any = {"target_modules": ["v_proj"], "adapter_name": "earlier"}
    for base in (FAMILIES["qwen2"].model(), attach(FAMILIES["qwen2"].model(), "pissa", 2, **first)):
        with pytest.raises(UserError, match=rf"{named}.*resize_token_embeddings"):
            load(base, tmp_path)


@pytest.mark.parametrize("write", [save, export], ids=["native", "exported"])
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_an_adapter_on_added_tokens_is_as_small_as_any_other(
    method: str, write: Writer, tmp_path: Path
) -> None:
    def longer() -> Any:
        torch.manual_seed(0)
        base = FAMILIES["qwen2"].model()
        base.resize_token_embeddings(102, mean_resizing=False)
        return base

    usual: dict[str, Any] = {"rank": 2, "alpha": 3, "target_modules": ["q_proj", "up_proj"]}
    for name, build in {"more": longer, "usual": FAMILIES["qwen2"].model}.items():
        model = attach(build(), method, **usual)
        with torch.no_grad():
            for weight in trainable(model):
                weight.add_(0.1)
        write(model, tmp_path / name)
        if name == "more":
            wanted = logits(model, "qwen2")
    more, same = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("more", "usual"))
    assert {k: t.shape for k, t in more.items()} == {k: t.shape for k, t in same.items()}
    torch.testing.assert_close(logits(load(longer(), tmp_path / "more"), "qwen2"), wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # PEFT's
def test_the_embeddings_of_a_base_that_was_given_tokens_come_with_it(
    family: str, tmp_path: Path
) -> None:
    """Each time the new rows are drawn anew; the words and the head share them, or do not."""
    FAMILIES[family].model().save_pretrained(tmp_path / "base")

    def longer(seed: int) -> Any:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(102, mean_resizing=False)
        return base

    def said(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(torch.tensor([[5, 101, 7, 100]])).logits
        return found

    model = attach(longer(0), "pissa", rank=2, alpha=3, target_modules=["q_proj", "up_proj"])
    with torch.no_grad():
        for weight in trainable(model):
            weight.add_(0.1)
    wanted = said(model)
    assert not torch.equal(said(longer(0)), said(longer(1)))
    with pytest.warns(UserWarning, match=r"has 102 tokens, and 100 where .*embeddings\(102\)"):
        export(model, tmp_path / "plain")
    save(model, tmp_path / "native")
    theirs = PeftModel.from_pretrained(longer(1), str(tmp_path / "plain"))
    torch.testing.assert_close(said(theirs), wanted)
    for folder in ("plain", "native"):
        base = longer(2)
        loaded = load(base, tmp_path / folder)
        torch.testing.assert_close(said(loaded), wanted)
        with loaded.disable_adapter():
            assert torch.equal(said(loaded), said(longer(2)))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # PEFT's
def test_embeddings_that_the_base_uses_under_several_names_are_not_half_replaced(
    tmp_path: Path,
) -> None:
    """T5's encoder and decoder have the module `shared`; PEFT would replace it where none looks."""
    FAMILIES["t5"].model().save_pretrained(tmp_path / "base")

    def longer(seed: int) -> Any:
        torch.manual_seed(seed)
        base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(102, mean_resizing=False)
        return base

    save(attach(longer(0), "lora", rank=2), tmp_path / "native")
    load(longer(0), tmp_path / "native")
    with pytest.raises(UserError, match=r"other weights of shared than this base has"):
        load(longer(1), tmp_path / "native")


def test_a_head_of_other_classes_says_how_to_load_its_base(tmp_path: Path) -> None:
    def other() -> Any:
        return AutoModelForImageClassification.from_pretrained(
            tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True
        )

    FAMILIES["vit"].model().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    get_peft_model(other(), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(
        UserError, match=r"\(4, 32\) in the adapter; where its head has other class"
    ):
        load(FAMILIES["vit"].model(), tmp_path / "peft")
    assert load(other(), tmp_path / "peft").peft_config["default"].modules_to_save


def test_a_changed_part_of_the_base_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT trains biases in the base itself, and writes over them again."""
    base = FAMILIES["qwen2"].model()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    for weight in trainable(model):
        weight.data.add_(0.1)
    by_peft(model, tmp_path)
    with pytest.raises(UserError, match=r"k_proj\.bias.*would change the base itself"):
        load(FAMILIES["qwen2"].model(), tmp_path)


def test_a_head_that_shares_its_weight_is_warned_of_in_export_and_card(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tied = put_on(FAMILIES["llama"].model(), "lora", 1, target_modules=["lm_head", "q_proj"])
    with pytest.warns(
        UserWarning, match=r"'lm_head' is an adapted layer, and its weight is that of"
    ):
        export(tied, tmp_path / "tied")
    assert "merged into the base it would change both" in (tmp_path / "tied/README.md").read_text()
    untied = FAMILIES["qwen2"].model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(attach(untied, "lora", 2, target_modules=["lm_head"]), tmp_path / "untied")
    assert "would change both" not in (tmp_path / "untied/README.md").read_text()
