"""Second moments of layer inputs: exact, whatever the batches, the padding and the passes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DebertaV2Config,
    DebertaV2Model,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from forgetless.core.errors import UserError
from forgetless.models.targets import target_layers
from forgetless.statistics.collection import collect
from forgetless.statistics.gradients import Gradients
from forgetless.statistics.moments import LayerStatistics, Statistics
from forgetless.statistics.padding import TokenRows
from tests.families import FAMILIES, language_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")

FAMILY = pytest.mark.parametrize("family", FAMILIES)
Batch = dict[str, Tensor]


# ---- the slow reference: one unpadded example at a time, every input kept ------------------------


def examples(family: str, count: int = 5) -> list[Batch]:
    """Single examples of different lengths, without padding."""
    batch = FAMILIES[family].batch(count)
    kept = {}
    if "attention_mask" in batch:
        source = batch["attention_mask"].bool()
        kept = {"input_ids": source, "attention_mask": source, "labels": batch["labels"] != -100}
    rows = []
    for i in range(count):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        rows.append({n: v[:, kept[n][i]] if n in kept else v for n, v in row.items()})
    return rows


def reference(model: nn.Module, rows: list[Batch]) -> dict[str, tuple[Tensor, int]]:
    """Layer -> mean of x x^T over all rows of all inputs, and how many rows."""
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in target_layers(model).items():

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            x = args[0].detach().double()
            inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

        handles.append(layer.register_forward_pre_hook(keep))
    for row in rows:
        model(**row)
    for handle in handles:
        handle.remove()
    stacked = {name: torch.cat(parts) for name, parts in inputs.items()}
    return {name: (x.T @ x / len(x), len(x)) for name, x in stacked.items()}


def batched(rows: list[Batch], size: int, side: str = "right") -> list[Batch]:
    """The examples in padded batches."""
    fill = {"labels": -100}

    def stack(name: str, values: list[Tensor]) -> Tensor:
        if values[0].ndim != 2:
            return torch.cat(values)
        width = max(value.shape[1] for value in values)
        missing = [
            (width - v.shape[1], 0) if side == "left" else (0, width - v.shape[1]) for v in values
        ]
        return torch.cat(
            [
                nn.functional.pad(v, m, value=fill.get(name, 0))
                for v, m in zip(values, missing, strict=True)
            ]
        )

    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        {name: stack(name, [row[name] for row in group]) for name in group[0]} for group in groups
    ]


def error(
    found: Mapping[str, LayerStatistics], expected: Mapping[str, tuple[Tensor, int]]
) -> float:
    """The largest relative error of any layer; names and token counts must agree."""
    assert set(found) == set(expected)
    assert {name: found[name].tokens for name in found} == {n: t for n, (_, t) in expected.items()}
    return max(
        float((found[name].second_moment - moment).norm() / moment.norm())
        for name, (moment, _) in expected.items()
    )


# ---- exactness -----------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_and_padding_do_not_matter(family: str, side: str) -> None:
    model = FAMILIES[family].model(torch.float64)
    rows = examples(family)
    rows = [{n: v.double() if v.is_floating_point() else v for n, v in r.items()} for r in rows]
    expected = reference(model, rows)
    for size in (1, 2, 5):
        found = collect(model, batched(rows, size, side))
        assert error(found, expected) < 1e-12
    assert all(torch.equal(s.second_moment, s.second_moment.T) for s in found.values())


@FAMILY
def test_passes_do_not_matter(family: str) -> None:
    model = FAMILIES[family].model(torch.float64)
    batches = batched(examples(family), 2)
    whole = collect(model, batches)
    expected = {name: (layer.second_moment, layer.tokens) for name, layer in whole.items()}
    widest = max(8 * s.second_moment.numel() for s in whole.values())
    for budget in (widest, 2 * widest, f"{3 * widest / 1024:.3f}KiB", "1GiB"):
        in_passes = collect(model, iter(batches), memory_budget=budget)
        assert error(in_passes, expected) < 1e-14
        assert list(in_passes) == list(whole)
        assert in_passes.shared_inputs == whole.shared_inputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_in_float32_the_models_own_rounding_remains(family: str) -> None:
    model = FAMILIES[family].model()
    rows = examples(family)
    assert error(collect(model, batched(rows, 4, "left")), reference(model, rows)) < 3e-6


def test_layers_wider_than_a_panel_and_longer_than_a_chunk(seeded: int) -> None:
    model = nn.Sequential(nn.Linear(300, 7, dtype=torch.float64))
    x = torch.randn(5000, 300, dtype=torch.float64)
    found = collect(model, [{"input": x}])["0"]
    torch.testing.assert_close(found.second_moment, x.T @ x / 5000, rtol=1e-12, atol=1e-13)
    assert torch.equal(found.second_moment, found.second_moment.T)


def test_a_real_model_under_a_budget(shared_data: Path, seeded: int) -> None:
    folder = shared_data / "stories260K" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = [{"input_ids": torch.randint(3, 512, (1, length))} for length in (90, 17, 1, 60, 33)]
    rows = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    found = collect(model, batched(rows, 3, "left"), memory_budget="1MiB")
    assert error(found, reference(model, rows)) < 1e-12


# ---- shared inputs -------------------------------------------------------------------------------

SHARED: dict[str, dict[tuple[str, ...], int]] = {
    "llama": {
        ("q_proj", "k_proj", "v_proj"): 2,
        ("o_proj",): 2,
        ("gate_proj", "up_proj"): 2,
        ("down_proj",): 2,
    },
    "gpt2": {("c_attn",): 2, ("c_proj",): 4, ("c_fc",): 2},
    # The keys and values of all of T5's cross-attention see the encoder's output.
    "t5": {
        ("q", "k", "v"): 3,
        ("o",): 5,
        ("q",): 2,
        ("k", "v", "k", "v"): 1,
        ("wi",): 3,
        ("wo",): 3,
    },
    "bert": {("query", "key", "value"): 2, ("dense",): 7},
}


@pytest.mark.parametrize("family", SHARED)
def test_layers_with_the_same_input_share_a_matrix(family: str, tmp_path: Path) -> None:
    statistics = collect(FAMILIES[family].model(), [FAMILIES[family].batch()])
    endings: dict[tuple[str, ...], int] = {}
    for group in statistics.shared_inputs:
        key = tuple(name.rpartition(".")[2] for name in group)
        endings[key] = endings.get(key, 0) + 1
        first = statistics[group[0]].second_moment
        assert all(statistics[name].second_moment is first for name in group)
    assert endings == SHARED[family]
    stored = load_file(statistics.save(tmp_path))
    assert len(stored) == sum(SHARED[family].values())


class Changing(nn.Module):
    """Two layers on the same tensor, which is changed in place between them."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.first(x)
        if self.change:
            x.mul_(2)
        out: Tensor = y + self.second(x.view(-1, 3)).view_as(y)
        return out


def test_a_view_of_an_input_is_shared_and_a_changed_one_is_not(seeded: int) -> None:
    x = torch.randn(4, 5, 3)
    same = collect(Changing(False), [{"x": x}])
    assert same.shared_inputs == [("first", "second")]
    changed = collect(Changing(True), [{"x": x}])
    assert changed.shared_inputs == [("first",), ("second",)]
    torch.testing.assert_close(changed["second"].second_moment, 4 * changed["first"].second_moment)


def test_sharing_that_comes_and_goes_is_refused(seeded: int) -> None:
    model = Changing(False)

    def turned() -> Iterator[Batch]:
        yield {"x": torch.randn(4, 3)}
        model.change = True
        yield {"x": torch.randn(4, 3)}

    with pytest.raises(RuntimeError, match="'second' shared its input with 'first'"):
        collect(model, turned())


# ---- which rows count ----------------------------------------------------------------------------


class Wiring(nn.Module):
    """One layer on a rearranged (batch, tokens, 3) input."""

    def __init__(self, rearrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.rearrange = rearrange

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.layer(self.rearrange(x))
        return out


@pytest.mark.parametrize(
    ("rearrange", "tokens"),
    [
        (lambda x: x, 7),
        (lambda x: x.reshape(-1, 3), 7),
        (lambda x: x[:, 0], 2),
    ],
    ids=["tokens", "flattened", "pooled"],
)
def test_padding_is_left_out_of_flattened_inputs_too(
    rearrange: Callable[[Tensor], Tensor], tokens: int, seeded: int
) -> None:
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    x[1, 2:] = torch.nan  # what padding holds must not matter
    found = collect(Wiring(rearrange), [{"x": x, "attention_mask": mask}])["layer"]
    rows = x[mask.bool()] if tokens == 7 else x[:, 0]
    assert found.tokens == tokens
    torch.testing.assert_close(found.second_moment, (rows.T @ rows / tokens).double())


def test_rows_that_cannot_be_matched_to_padding_are_refused(seeded: int) -> None:
    model = Wiring(lambda x: x[:, 1:])
    x, mask = torch.randn(2, 5, 3), torch.ones(2, 5)
    assert collect(model, [{"x": x, "attention_mask": mask}])["layer"].tokens == 8
    mask[0, 4] = 0
    with pytest.raises(UserError, match=r"'layer' gets inputs of shape \(2, 4, 3\)"):
        collect(model, [{"x": x, "attention_mask": mask}])


def test_without_a_mask_every_token_counts() -> None:
    ids = language_batch()["input_ids"]
    statistics = collect(FAMILIES["llama"].model(), [{"input_ids": ids}])
    assert statistics.metadata["tokens"] == ids.numel()


def test_a_decoder_mask_wins_over_the_labels() -> None:
    batch = FAMILIES["t5"].batch()
    batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    statistics = collect(FAMILIES["t5"].model(), [batch])
    prefix = "decoder.block.1.layer."
    assert statistics[prefix + "0.SelfAttention.q"].tokens == batch["labels"].numel()
    assert statistics[prefix + "1.EncDecAttention.k"].tokens == batch["attention_mask"].sum()


# ---- unusual forwards ----------------------------------------------------------------------------


class Experts(nn.Module):
    """A block that is used twice, and experts chosen by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])])
        self.never = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(x).relu() + x
        x = self.twice(x)
        expert = int(x[0, 0] > 0)
        out: Tensor = self.blocks[0][expert](x)  # type: ignore[index]
        return out


def test_repeated_calls_and_experts_chosen_by_the_data(seeded: int) -> None:
    model = Experts()
    batches = [{"x": torch.randn(4, 3)} for _ in range(8)]
    expected = reference(model, batches)
    assert set(expected) == {"twice", "blocks.0.0", "blocks.0.1"}
    with pytest.warns(UserWarning, match="no input reached 1 of the target layers, 'never'"):
        found = collect(model, batches)
    assert error(found, expected) < 1e-6
    with pytest.warns(UserWarning, match="no input reached"):
        in_passes = collect(model, batches, memory_budget=8 * 9)
    assert error(in_passes, expected) < 1e-6


def test_inference_mode_around_it_does_not_matter() -> None:
    model, batches = FAMILIES["llama"].model(), [language_batch()]
    expected = collect(model, batches)
    with torch.inference_mode():
        found = collect(model, batches)
    assert all(torch.equal(found[n].second_moment, expected[n].second_moment) for n in expected)
    assert found.shared_inputs == expected.shared_inputs


# ---- the forward: only as far as needed, and nothing left behind ---------------------------------


def calls(module: nn.Module) -> list[int]:
    """A list that grows by one element a call of the module."""
    made: list[int] = []
    module.register_forward_hook(lambda *_: made.append(1))
    return made


def test_forwards_stop_at_the_last_needed_layer() -> None:
    model = FAMILIES["llama"].model()
    batches = batched(examples("llama"), 2)
    mlp = model.model.layers[1].mlp
    head, up, down = calls(model.lm_head), calls(mlp.up_proj), calls(mlp.down_proj)
    collect(model, batches)
    assert (len(head), len(up), len(down)) == (1, 3, 1)  # the first batch teaches the order
    collect(
        model, batches, [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")]
    )
    assert (len(head), len(up), len(down)) == (2, 4, 2)


def test_a_matrix_is_made_once_whatever_the_number_of_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[int, ...]] = []
    zeros = torch.zeros

    def counted(*size: int, **more: Any) -> Tensor:
        if more.get("dtype") == torch.float64:
            made.append(size)
        return zeros(*size, **more)

    monkeypatch.setattr(torch, "zeros", counted)
    found = collect(FAMILIES["llama"].model(), batched(examples("llama"), 1))
    assert len(made) == len({layer.second_moment.data_ptr() for layer in found.values()})


def test_a_budget_takes_as_many_layers_a_pass_as_fit() -> None:
    model = FAMILIES["llama"].model()
    batches = batched(examples("llama"), 2)
    embeddings = calls(model.model.embed_tokens)
    # Three inputs of 32 a block and one of 48: 3 * 8 * 32^2 = 24576, 8 * 48^2 = 18432 bytes.
    for budget, passes in ((18432, 6), (24576, 4), (43008, 2), (86016, 1)):
        embeddings.clear()
        collect(model, batches, memory_budget=budget)
        assert len(embeddings) == 1 + 3 * passes


def test_passes_go_on_from_the_hidden_states_of_the_one_before() -> None:
    model = FAMILIES["llama"].model()
    batches = batched(examples("llama"), 2)
    first, second = (calls(block.mlp.down_proj) for block in model.model.layers)
    collect(model, batches, memory_budget=43008)  # a pass a block
    assert (len(first), len(second)) == (1 + 3, 1 + 3)
    assert not any("forward" in vars(module) for module in model.modules())


class Sidelong(nn.Module):
    """Blocks of which the third also reads what the first has left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.blocks[0].register_forward_hook(self._leave)
        self.left = torch.zeros(6)

    def _leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.left = args[0].mean(0)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x + self.left if index == 2 else x)
        return x


def test_a_model_whose_blocks_share_more_than_states_runs_the_whole_way(seeded: int) -> None:
    model = Sidelong()
    batches = [{"x": torch.randn(9, 6)} for _ in range(3)]
    expected = reference(model, batches)
    in_passes = collect(model, batches, memory_budget=8 * 36)
    assert error(in_passes, expected) < 1e-6


def test_finished_passes_wait_in_a_folder_that_goes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    statistics = collect(FAMILIES["llama"].model(), [language_batch()], memory_budget="20KiB")
    name = "model.layers.1.mlp.down_proj"
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 8
    moment = statistics[name].second_moment
    expected = moment.clone()
    del statistics
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(moment, expected)  # what was read stays


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = FAMILIES["llama"].model().train()
    model.model.layers[0].eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    batches: list[Batch] = [language_batch()]
    if fails:
        batches.append({"input_ids": torch.full((1, 3), 10_000)})
        with pytest.raises(IndexError):
            collect(model, batches)
    else:
        collect(model, batches)
    assert [module.training for module in model.modules()] == training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.use_cache
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_of_a_peft_model_the_base_is_measured() -> None:
    batches = [language_batch()]
    plain = collect(FAMILIES["llama"].model(), batches)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(FAMILIES["llama"].model(), config).train()
    output = model(**batches[0]).logits
    found = collect(model, batches)
    assert list(found) == list(plain)
    assert all(torch.equal(found[n].second_moment, plain[n].second_moment) for n in plain)
    assert found.shared_inputs == plain.shared_inputs
    assert model.training
    assert torch.equal(model(**batches[0]).logits, output)


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_with_adapters_on_the_trained_model_is_measured(budget: str | None) -> None:
    batches = [language_batch()]
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(FAMILIES["llama"].model(), config).train()
    found = collect(model, batches, memory_budget=budget, adapters_on=True)
    merged = collect(model.merge_and_unload(), batches)
    assert list(found) == list(merged)
    for name in merged:
        torch.testing.assert_close(
            found[name].second_moment, merged[name].second_moment, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_summed_in_float64(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"].model(dtype)
    rows = examples("llama")
    found = collect(model, batched(rows, 1))
    assert error(found, reference(model, rows)) < 1e-14
    assert found.metadata["dtype"] == str(dtype).removeprefix("torch.")
    assert all(layer.second_moment.dtype == torch.float64 for layer in found.values())


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_nan_and_infinity_name_the_first_layer(value: float, budget: str | None) -> None:
    model = FAMILIES["llama"].model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 4] = value
    with pytest.raises(
        UserError, match=r"layer 'model\.layers\.1\.mlp\.gate_proj' hold NaN.*batch 0"
    ):
        collect(model, [language_batch()], memory_budget=budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (100, r"at least 18432 bytes \(0.0 MiB\).*'model.layers.0.mlp.down_proj' with 48 inputs"),
        (-1, "at least 18432 bytes"),
        ("17KiB", "got 17408 bytes"),
        ("2 GiBi", "such as '2GiB'"),
        ("much", "got 'much'"),
        ("5ib", "got '5ib'"),
    ],
)
def test_budgets_that_cannot_be(budget: int | str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collect(FAMILIES["llama"].model(), [language_batch()], memory_budget=budget)


def test_batches_that_cannot_be() -> None:
    model = FAMILIES["llama"].model()
    ids = language_batch()["input_ids"]
    with pytest.raises(UserError, match="no batches"):
        collect(model, [])
    with pytest.raises(UserError, match="no batches"):
        collect(model, iter([]), memory_budget="1MiB")
    with pytest.raises(TypeError, match=r"mapping of tensors.*got Tensor"):
        collect(model, [ids])  # type: ignore[list-item]
    with pytest.raises(UserError, match="are all padding"):
        collect(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    with pytest.raises(
        UserError, match=r"attention_mask must be \(batch, tokens\).*got \(3, 1, 1, 11\)"
    ):
        collect(model, [{"input_ids": ids, "attention_mask": torch.ones(3, 1, 1, 11)}])
    with pytest.raises(UserError, match="meta device"):
        collect(nn.Sequential(nn.Linear(2, 2, device="meta")), [{"input": torch.zeros(1, 2)}])


@pytest.mark.filterwarnings("default:.*fewer tokens than they have inputs")
def test_too_few_tokens_warn() -> None:
    model = FAMILIES["llama"].model()
    few = {"input_ids": torch.arange(3, 43)[None]}
    with pytest.warns(UserWarning, match=r"2 of 14 layers.*down_proj': 40 tokens, 48 inputs"):
        collect(model, [few])


# ---- keeping and adding --------------------------------------------------------------------------


def equal(a: Statistics, b: Statistics) -> bool:
    return (
        list(a) == list(b)
        and a.shared_inputs == b.shared_inputs
        and a.metadata == b.metadata
        and all(torch.equal(a[n].second_moment, b[n].second_moment) for n in a)
        and all(a[n].tokens == b[n].tokens for n in a)
    )


@pytest.mark.parametrize("budget", [None, "20KiB"])
def test_save_and_load_lose_nothing(budget: str | None, tmp_path: Path) -> None:
    statistics = collect(FAMILIES["llama"].model(), [language_batch()], memory_budget=budget)
    assert set(statistics.metadata) == {"dtype", "tokens", "torch", "transformers"}
    file = statistics.save(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "statistics.safetensors"
    assert equal(Statistics.load(file), statistics)
    assert equal(Statistics.load(file.parent), statistics)
    loaded = Statistics.load(file)
    other = loaded.save(tmp_path / "other.safetensors")
    assert loaded.save(file) == file  # over the file that it is read from
    assert equal(Statistics.load(file), Statistics.load(other))
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [
        "other.safetensors",
        "statistics.safetensors",
    ]


def test_changing_a_loaded_matrix_does_not_change_the_file(tmp_path: Path) -> None:
    statistics = Statistics({"a": LayerStatistics(torch.eye(2).double(), 3)})
    loaded = Statistics.load(statistics.save(tmp_path))
    loaded["a"].second_moment.zero_()
    assert torch.equal(loaded["a"].second_moment, torch.eye(2).double())


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no statistics at .*forgetless stats"):
        Statistics.load(tmp_path)
    save_file({"a": torch.eye(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not hold statistics"):
        Statistics.load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        Statistics.load(tmp_path / "b.safetensors")


SAVED = [
    Statistics({name: LayerStatistics(torch.eye(2).double(), 3) for name in ("a", "b")}),
    Gradients({name: torch.eye(2) for name in ("a", "b")}, {"tokens": 3}),
]


@pytest.mark.parametrize("saved", SAVED, ids=lambda saved: type(saved).__name__)
def test_a_wrong_bit_anywhere_in_a_file_is_told_with_its_name(
    saved: Statistics | Gradients, tmp_path: Path
) -> None:
    content = saved.save(tmp_path / "whole").read_bytes()
    for place, byte in enumerate(content):
        file = tmp_path / f"{place}.safetensors"
        file.write_bytes(content[:place] + bytes([byte ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(UserError, match=file.name):
            type(saved).load(file)
        file.unlink()


@FAMILY
def test_a_sum_is_the_statistics_of_both_texts(family: str) -> None:
    model = FAMILIES[family].model()
    a, b = batched(examples(family), 2)[:2]
    both = collect(model, [a, b])
    added = collect(model, [a]) + collect(model, [b], memory_budget="1MiB")
    assert error(added, {n: (s.second_moment, s.tokens) for n, s in both.items()}) < 1e-14
    assert added.shared_inputs == both.shared_inputs
    assert added.metadata == both.metadata


def test_sums_of_different_layers_name_them() -> None:
    def statistics(**sizes: int) -> Statistics:
        return Statistics({n: LayerStatistics(torch.eye(s).double(), 4) for n, s in sizes.items()})

    with pytest.raises(ValueError, match=r"in one of the two only: b, c$"):
        statistics(a=2, b=2) + statistics(a=2, c=2)
    with pytest.raises(ValueError, match="layer 'a' has 2 inputs in one and 3 in the other"):
        statistics(a=2) + statistics(a=3)
    with pytest.raises(TypeError):
        statistics(a=2) + 1  # type: ignore[operator]


def test_a_sum_lists_what_differs() -> None:
    def statistics(dtype: str) -> Statistics:
        return Statistics({"a": LayerStatistics(torch.eye(2).double(), 4)}, {"dtype": dtype})

    added = statistics("float32") + statistics("bfloat16")
    assert added.metadata == {"dtype": "bfloat16, float32", "tokens": 8}


def test_tail_energy() -> None:
    layer = LayerStatistics(torch.diag(torch.tensor([4.0, 1.0, 2.0, 3.0])).double(), 10)
    assert layer.tail_energy(1) == pytest.approx(0.1)
    assert layer.tail_energy(2) == pytest.approx(0.3)
    assert layer.tail_energy(4) == pytest.approx(1.0)
    assert LayerStatistics(torch.zeros(3, 3).double(), 1).tail_energy(2) == 0.0
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"rank must be in 1\.\.4.*got {rank}"):
            layer.tail_energy(rank)


def test_an_adapted_output_head_is_read_at_every_token() -> None:
    model, batch = FAMILIES["llama"].model(), language_batch()
    settings = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=False)
    plain = collect(model, [batch], target_modules=["lm_head"])
    adapted = get_peft_model(model, settings)
    found = collect(adapted, [batch], target_modules=["lm_head"])
    assert torch.equal(found["lm_head"].second_moment, plain["lm_head"].second_moment)
    assert found["lm_head"].tokens == int(batch["attention_mask"].sum())


def test_a_layer_between_the_last_block_and_the_head_is_read_at_every_token() -> None:
    torch.manual_seed(0)
    kwargs = {"num_hidden_layers": 1, "num_attention_heads": 2, "is_decoder": True}
    model = BertLMHeadModel(
        BertConfig(vocab_size=100, hidden_size=16, intermediate_size=24, **kwargs)
    ).eval()
    rows = examples("llama")
    found = collect(model, rows)["cls.predictions.transform.dense"]
    moment, count = reference(model, rows)["cls.predictions.transform.dense"]
    assert found.tokens == count
    torch.testing.assert_close(found.second_moment, moment)
    padded = collect(model, [language_batch(5)])["cls.predictions.transform.dense"]
    torch.testing.assert_close(padded.second_moment, moment, atol=1e-6, rtol=1e-5)


def test_inputs_with_one_head_between_row_and_token_are_matched_to_the_mask() -> None:
    """Such as the compressed keys and values of DeepSeek's attention."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            first_k_dense_replace=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            q_lora_rank=4,
            kv_lora_rank=4,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            pad_token_id=0,
        )
    ).eval()
    found = collect(model, [language_batch(5)])["model.layers.0.self_attn.kv_b_proj"]
    moment, count = reference(model, examples("llama"))["model.layers.0.self_attn.kv_b_proj"]
    assert found.tokens == count
    torch.testing.assert_close(found.second_moment, moment, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [None, 24 * 24 * 8], ids=["one pass", "passes"])
@pytest.mark.parametrize("kinds", [["p2c", "c2p"], ["c2p"]], ids="-".join)
def test_a_table_of_places_that_a_layer_reads_counts_once_a_sequence(
    kinds: list[str], budget: int | None
) -> None:
    """Keys of DeBERTa read its relative places too, queries may, and values do not."""
    torch.manual_seed(0)
    model = DebertaV2Model(
        DebertaV2Config(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=kinds,
            share_att_key=True,
        )
    ).eval()
    rows = examples("bert")
    wanted = reference(model, [{k: v for k, v in row.items() if k != "labels"} for row in rows])
    found = collect(model, [FAMILIES["bert"].batch(5)], memory_budget=budget)
    assert set(found) == set(wanted)
    for name, (moment, count) in wanted.items():
        assert found[name].tokens == count, name
        torch.testing.assert_close(found[name].second_moment, moment, atol=1e-6, rtol=1e-5)


def test_statistics_are_a_mapping() -> None:
    statistics = collect(FAMILIES["gpt2"].model(), [language_batch()])
    assert "transformer.h.0.attn.c_attn" in statistics
    assert "lm_head" not in statistics
    assert len(statistics) == len(list(statistics)) == 8
    with pytest.raises(KeyError):
        statistics["lm_head"]
    assert repr(statistics) == "<Statistics of 8 layers, 8 matrices, 27 tokens>"


def test_a_batch_of_one_token_a_row_keeps_the_tokens_alone() -> None:
    """Its inputs have the shape of pooled ones, whose rows all count."""
    mask = torch.tensor([[True], [False], [True]])
    x = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(TokenRows(mask).of("layer", x), x[[0, 2]])
    pooled = TokenRows(torch.tensor([[True, False]] * 3)).of("layer", x)
    assert torch.equal(pooled, x)
