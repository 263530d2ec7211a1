"""Statistics of large models: interrupted, in many processes, of several texts, without sinks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from forgetless.adapters.attachment import attach
from forgetless.core.errors import UserError
from forgetless.statistics import checkpoint
from forgetless.statistics.collection import collect
from forgetless.statistics.gradients import Gradients, collect_gradients
from forgetless.statistics.moments import LayerStatistics, OnDisk, Statistics
from forgetless.statistics.stack import Leg, Stack, legs
from tests.families import FAMILIES, language_batch, token_batch
from tests.statistics.test_collection import Batch, batched, calls, error, examples

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than they have inputs")


def model_and_batches() -> tuple[nn.Module, list[Batch]]:
    return FAMILIES["llama"].model(torch.float64), batched(examples("llama", 7), 2)


def as_expected(statistics: Statistics) -> dict[str, tuple[Tensor, int]]:
    return {name: (s.second_moment, s.tokens) for name, s in statistics.items()}


# ---- interrupted collections ---------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """What Ctrl-C raises."""


class Interrupted:
    """Batches that end in Ctrl-C in front of the one with this number, counted over all passes."""

    def __init__(self, batches: list[Batch], stop: int) -> None:
        self.batches, self.stop = batches, stop

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if self.stop == 0:
                raise Stopped
            self.stop -= 1
            yield batch


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are written after every batch."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)


@pytest.mark.parametrize("budget", [None, 43008])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])
def test_an_interrupted_collection_goes_on_to_the_same_result(
    budget: int | None, stop: int, tmp_path: Path, eager: None
) -> None:
    model, batches = model_and_batches()
    whole = collect(model, batches, memory_budget=budget)
    if budget is None and stop > 5:
        stop -= 5
    with pytest.raises(Stopped):
        collect(
            model, Interrupted(batches, stop), memory_budget=budget, checkpoint=tmp_path / "kept"
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    forwards = calls(model.model.embed_tokens)  # type: ignore[union-attr,arg-type]
    found = collect(model, batches, memory_budget=budget, checkpoint=tmp_path / "kept")
    passes = 1 if budget is None else 2
    assert len(forwards) == 1 + passes * len(batches) - (stop - 1)
    assert error(found, as_expected(whole)) < 1e-14
    assert found.metadata == whole.metadata
    assert found.shared_inputs == whole.shared_inputs


def test_a_finished_collection_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    first = collect(model, batches, checkpoint=tmp_path)
    forwards = calls(model.model.embed_tokens)  # type: ignore[union-attr,arg-type]
    again = collect(model, batches, checkpoint=tmp_path)
    assert len(forwards) == 1  # the first batch teaches the order
    assert error(again, as_expected(first)) == 0


def test_with_another_budget_it_goes_on_too(tmp_path: Path, eager: None) -> None:
    model, batches = model_and_batches()
    whole = collect(model, batches)
    with pytest.raises(Stopped):
        collect(model, Interrupted(batches, 7), memory_budget=43008, checkpoint=tmp_path)
    found = collect(model, batches, memory_budget=24576, checkpoint=tmp_path)
    assert error(found, as_expected(whole)) < 1e-14


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, eager: None) -> None:
    model, batches = model_and_batches()
    with pytest.raises(Stopped):
        collect(model, Interrupted(batches, 3), checkpoint=tmp_path)
    other = FAMILIES["llama"].model(torch.float64, seed=1)
    for asked, options in (
        (other, {}),
        (model, {"target_modules": ["q_proj"]}),
        (model, {"skip_first": 1}),
    ):
        with pytest.raises(UserError, match="progress of another collection"):
            collect(asked, batches, checkpoint=tmp_path, **options)
    for others in (batches[::-1], batches[:1]):
        with pytest.raises(UserError, match="progress of a collection on other batches"):
            collect(model, others, checkpoint=tmp_path)


def test_a_checkpoint_holds_nothing_that_is_not_used(tmp_path: Path, eager: None) -> None:
    model, batches = model_and_batches()
    collect(model, batches, memory_budget=43008, checkpoint=tmp_path)
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "progress.json").read_text())
    files = {entry["file"] for entry in record["finished"].values()}
    assert {path.name for path in folder.iterdir()} == files | {"progress.json"}
    assert record["sums"] is None


# ---- many processes ------------------------------------------------------------------------------


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    join: Any = distributed.init_process_group
    join("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, batches = model_and_batches()
    for name, budget in (("whole", None), ("passes", 43008)):
        collect(model, batches, memory_budget=budget).save(f"{folder}/{name}-{rank}")
    one = collect(model, batches[:1], memory_budget=43008, checkpoint=f"{folder}/kept")
    one.save(f"{folder}/one-{rank}")
    learned = [batch | {"labels": batch["input_ids"]} for batch in batches]
    collect_gradients(model, learned).save(f"{folder}/gradients-{rank}")
    broken = [*batches[:1], {"input_ids": torch.full((1, 3), 10_000)}]
    try:
        collect(model, broken)
    except (IndexError, UserError) as problem:
        Path(folder, f"error-{rank}").write_text(f"{type(problem).__name__}: {problem}")
    distributed.destroy_process_group()


def test_two_processes_get_what_one_gets(tmp_path: Path) -> None:
    # Forked, so that the two need not import everything again.
    start: Any = vars(torch.multiprocessing)["start_processes"]
    start(_process, (str(tmp_path),), nprocs=2, start_method="fork")
    model, batches = model_and_batches()
    whole, one = collect(model, batches), collect(model, batches[:1])
    learned = [batch | {"labels": batch["input_ids"]} for batch in batches]
    gradients = collect_gradients(model, learned)
    for rank in range(2):
        for name, expected in (("whole", whole), ("passes", whole), ("one", one)):
            found = Statistics.load(tmp_path / f"{name}-{rank}")
            assert error(found, as_expected(expected)) < 1e-13
            assert found.shared_inputs == expected.shared_inputs
        theirs = gradients.load(tmp_path / f"gradients-{rank}")
        assert all(torch.allclose(theirs[n], gradients[n], rtol=1e-10) for n in gradients)
        assert theirs.metadata["tokens"] == gradients.metadata["tokens"]
    assert (tmp_path / "error-1").read_text().startswith("IndexError")
    assert "UserError: another process failed" in (tmp_path / "error-0").read_text()


def test_batches_that_are_divided_already_are_refused() -> None:
    rows = [language_batch()]
    sampler: Any = DistributedSampler(rows, num_replicas=2, rank=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="already divided between the processes"):
        collect(FAMILIES["llama"].model(), DataLoader(rows, sampler=sampler))  # type: ignore[arg-type]


class FullyShardedDataParallel(nn.Module):
    """A wrapper of the name of FSDP's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DistributedDataParallel(FullyShardedDataParallel):
    """A wrapper of the name of DDP's."""


@pytest.mark.parametrize("wrapper", [FullyShardedDataParallel, DistributedDataParallel])
@pytest.mark.parametrize("ask", [collect, collect_gradients])
def test_wrapped_and_sharded_models_are_refused(wrapper: Any, ask: Any) -> None:
    wrapped = wrapper(FAMILIES["llama"].model())
    with pytest.raises(UserError, match=rf"wrapped in {wrapper.__name__}; collect before"):
        ask(wrapped, [language_batch()])
    model = FAMILIES["llama"].model()
    model.lm_head.weight.ds_id = 3
    with pytest.raises(UserError, match=r"is sharded \(DeepSpeed ZeRO-3\); collect before"):
        ask(model, [language_batch()])


# ---- several texts -------------------------------------------------------------------------------


def test_a_mixture_gives_every_text_its_weight(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    long, short = collect(model, batches[:3]), collect(model, batches[3:], memory_budget="20KiB")
    mixed = Statistics.mixture([(long, 3), (short, 1)])
    expected = {n: (0.75 * long[n].second_moment + 0.25 * short[n].second_moment, 0) for n in long}
    for found in (mixed, Statistics.load(mixed.save(tmp_path))):
        assert list(found) == list(long)
        assert found.shared_inputs == long.shared_inputs
        assert all(found[n].tokens == long[n].tokens + short[n].tokens for n in long)
        assert (
            max(
                float((found[n].second_moment - moment).norm() / moment.norm())
                for n, (moment, _) in expected.items()
            )
            < 1e-15
        )
        assert found.metadata["weights"] == [0.75, 0.25]


def test_a_mixture_by_tokens_is_the_sum() -> None:
    model, batches = model_and_batches()
    a, b = collect(model, batches[:3]), collect(model, batches[3:])
    weights = [s.metadata["tokens"] for s in (a, b)]
    mixed = Statistics.mixture([(a, weights[0]), (b, weights[1])])
    assert error(mixed, as_expected(a + b)) < 1e-14


def test_layers_share_a_matrix_where_they_do_and_nowhere_else(tmp_path: Path) -> None:
    """A matrix that is made when it is asked for has the identity of one that is gone."""
    model, batches = model_and_batches()
    a, b = collect(model, batches[:3]), collect(model, batches[3:], memory_budget="20KiB")
    loaded = Statistics.load(b.save(tmp_path / "b"))
    mixed = Statistics.mixture([(a, 3), (b, 1)])
    apart = Statistics({n: LayerStatistics(a[n].second_moment.clone(), a[n].tokens) for n in a})
    assert apart.shared_inputs == [(name,) for name in a]
    for statistics in (a, b, loaded, mixed, a + b, a + apart, mixed + loaded):
        shared = apart.shared_inputs if statistics.shared_inputs[0][1:] == () else a.shared_inputs
        saved = Statistics.load(statistics.save(tmp_path / "again"))
        rebuilt = Statistics({name: statistics[name] for name in statistics})
        for again in (statistics, Statistics(statistics, {"of": "all"}), saved, rebuilt):
            assert all(torch.equal(again[n].second_moment, statistics[n].second_moment) for n in a)
            assert all(again[n].tokens == statistics[n].tokens for n in a)
            assert all(again.shape(n) == tuple(statistics[n].second_moment.shape) for n in a)
            assert again.shared_inputs == shared or again is rebuilt
    assert Statistics(mixed, {"of": "all"}).metadata == {"of": "all"}


def test_no_matrix_is_read_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    found = Statistics.load(collect(model, batches).save(tmp_path))
    gradients = Gradients.load(collect_gradients(model, batches[:1]).save(tmp_path))
    reads: list[str] = []
    read = OnDisk.__getitem__

    def counted(self: OnDisk, name: str) -> Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(OnDisk, "__getitem__", counted)
    mixed = Statistics.mixture([(found, 1), (found, 2)])
    assert mixed.shape("model.layers.0.mlp.up_proj") == (32, 32)
    with pytest.raises(UserError, match=r"the task_moment of layer .* the layer needs"):
        attach(wider_llama(), "eva", 2, task_stats=mixed)
    with pytest.raises(UserError, match=r"the gradient of layer .* the layer needs"):
        attach(wider_llama(), "lora_ga", 2, gradients=gradients)
    with pytest.raises(UserError, match=r"the second_moment of layer .* the layer needs"):
        attach(wider_llama(), "lora_null_v1", 2, stats=found)
    assert reads == []
    attach(model, "lora_null_v1", 2, stats=found)
    assert len(reads) == len(found.shared_inputs)


def wider_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def test_mixtures_that_cannot_be() -> None:
    model, batches = model_and_batches()
    found = collect(model, batches[:1])
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive weights"):
            Statistics.mixture([(found, 1), (found, weight)])
    with pytest.raises(ValueError, match="positive weights"):
        Statistics.mixture([])
    with pytest.raises(ValueError, match="same layers"):
        Statistics.mixture([(found, 1), (collect(model, batches[:1], ["q_proj"]), 1)])


# ---- attention sinks -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_tokens_can_be_left_out(family: str, side: str) -> None:
    model, rows = FAMILIES[family].model(torch.float64), examples(family)
    found = collect(model, batched(rows, 2, side), skip_first=2)
    inputs: dict[str, list[Tensor]] = {}
    names = ["k_proj", "c_fc", "key", "wi", "wo"]
    targets = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}
    for name, layer in targets.items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0, 2:].detach())
        )
    for row in rows:
        model(**row)
    for name, parts in inputs.items():
        x = torch.cat(parts)
        assert found[name].tokens == len(x)
        torch.testing.assert_close(found[name].second_moment, x.T @ x / len(x))
    assert found.metadata["skip_first"] == 2


def test_without_a_mask_the_first_tokens_are_left_out_too() -> None:
    ids = token_batch()["input_ids"]
    found = collect(FAMILIES["llama"].model(), [{"input_ids": ids}], skip_first=3)
    assert found.metadata["tokens"] == ids.shape[0] * (ids.shape[1] - 3)


def test_what_has_no_first_token_is_refused() -> None:
    with pytest.raises(UserError, match="skip_first leaves out the first tokens of texts"):
        collect(FAMILIES["vit"].model(), [FAMILIES["vit"].batch()], skip_first=1)
    with pytest.raises(UserError, match="skip_first must be 0 or more, got -1"):
        collect(FAMILIES["llama"].model(), [language_batch()], skip_first=-1)


# ---- mixtures of experts, and plans --------------------------------------------------------------


def test_fused_experts_are_left_out_and_refused_by_name() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = MixtralForCausalLM(config).eval()
    found = collect(model, [token_batch()], memory_budget="2KiB")
    assert {name.rpartition(".")[2] for name in found} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any("experts" in name for name in found)
    with pytest.raises(UserError, match="expert"):
        collect(model, [token_batch()], ["experts"])


def test_legs_meet_where_one_pass_ends_and_the_next_begins() -> None:
    stack = Stack([nn.Identity()] * 4, {"a": 0, "b": 0, "c": 1, "d": 3})
    assert legs(stack, [["a", "b"], ["c"], ["d"]]) == [Leg(0, 0), Leg(1, 1), Leg(2, None)]
    assert legs(stack, [["a"], ["b", "c"], ["d", "head"]]) == [Leg(), Leg(0, 1), Leg(2, None)]
    assert legs(stack, [["a", "c"], ["b"]]) == [Leg(), Leg()]  # back and forth
    assert legs(None, [["a"], ["b"]]) == [Leg(), Leg()]


def test_offloaded_weights_give_the_same() -> None:
    batches = [language_batch()]
    expected = collect(FAMILIES["llama"].model(), batches)
    gradients = collect_gradients(FAMILIES["llama"].model(), batches)
    offloaded = cpu_offload(FAMILIES["llama"].model(), execution_device=torch.device("cpu"))
    for budget in (None, 43008):
        found = collect(offloaded, batches, memory_budget=budget)
        assert error(found, as_expected(expected)) == 0
    found_gradients = collect_gradients(offloaded, batches)
    assert all(torch.equal(found_gradients[n], gradients[n]) for n in gradients)
