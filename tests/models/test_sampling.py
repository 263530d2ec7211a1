"""A base writes in bfloat16 where that is faster, and is left as it was."""

from __future__ import annotations

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from forgetless.data.settings import CalibrationSettings
from forgetless.data.texts import self_text
from forgetless.models import sampling
from forgetless.models.load import load_model, load_tokenizer
from forgetless.models.sampling import as_writer
from forgetless.statistics.own_text import settled_text
from tests.families import FAMILIES


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with matrix instructions for bfloat16, with a base that is large."""
    monkeypatch.setattr(sampling, "_LEAST_PARAMETERS", 0)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


@pytest.fixture(scope="module")
def pocket() -> PreTrainedModel:
    return load_model("pocket")


def test_a_small_base_writes_itself(pocket: PreTrainedModel) -> None:
    with as_writer(pocket) as writer:
        assert writer is pocket


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_copy_has_rounded_weights_tied_as_they_were(family: str) -> None:
    model = FAMILIES[family].model()
    model.tie_weights()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with as_writer(model) as writer:
        assert isinstance(writer, PreTrainedModel)
        assert writer.dtype == torch.bfloat16
        assert [n for n, _ in writer.named_parameters()] == [n for n, _ in model.named_parameters()]
        for name, weight in writer.named_parameters():
            assert torch.equal(weight, before[name].bfloat16())
        for (_, own), (_, copied) in zip(
            model.named_buffers(), writer.named_buffers(), strict=True
        ):
            assert torch.equal(own, copied)
            assert own.dtype == copied.dtype
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("quick")
def test_what_is_no_float32_or_has_no_room_writes_itself(
    pocket: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = FAMILIES["llama"].model().double()
    with as_writer(double) as writer:
        assert writer is double
    full = type("Memory", (), {"available": 0})
    monkeypatch.setattr(psutil, "virtual_memory", full)
    with as_writer(pocket) as writer:
        assert writer is pocket


@pytest.mark.usefixtures("quick")
def test_what_the_copy_says_is_as_likely_to_the_base(pocket: PreTrainedModel) -> None:
    """To the base, texts of the two are equally likely, within the spread of either."""
    tokenizer = load_tokenizer("pocket")

    def losses(texts: list[list[int]]) -> torch.Tensor:
        rows = [torch.tensor([text]) for text in texts]
        with torch.no_grad():
            return torch.tensor([float(pocket(input_ids=row, labels=row).loss) for row in rows])

    rounded = losses(self_text(pocket, tokenizer, 200, 32, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        exact = losses(self_text(pocket, tokenizer, 200, 32, 1))
    error = float((rounded.var() + exact.var()).sqrt()) / 200**0.5
    assert abs(float(rounded.mean() - exact.mean())) < 4 * error


@pytest.mark.usefixtures("quick")
def test_what_a_copy_reads_while_it_writes_tells_how_much_is_enough(
    pocket: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CalibrationSettings(max_length=32)
    how = load_tokenizer("pocket"), ["down_proj"], settings
    rounded = settled_text(pocket, *how)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    exact = settled_text(pocket, *how)
    assert len(rounded) == pytest.approx(len(exact), rel=0.3)
