"""Packed sequences do not see each other."""

from __future__ import annotations

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from forgetless.core.errors import UserError
from forgetless.data.batches import Padding, TokenRows, positions
from forgetless.data.packing import IGNORED, TokenRow, packed, wrapped
from tests.families import FAMILIES, VOCAB

CAUSAL = ("llama", "qwen2", "gpt2")
SEVERAL = TokenRows(
    datasets.Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]], "lengths": [[1, 1]]})
)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 5, 2)]


def batch_of(rows: list[TokenRow]) -> dict[str, Tensor]:
    return Padding()(
        [
            {
                "input_ids": torch.tensor(row.input_ids),
                "labels": torch.tensor(row.labels),
                "lengths": row.lengths,
            }
            for row in rows
        ]
    )


def losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """The loss of every learned token, sorted."""
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1]  # as Trainer does
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return sorted(each[labels != IGNORED].tolist())


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_sequences_have_the_losses_of_unpacked_ones(family: str) -> None:
    model = FAMILIES[family].model().eval()
    alone = [TokenRow(tokens, tokens, [len(tokens)]) for tokens in sequences()]
    together = packed(alone, 12)
    assert len(together) < len(alone)
    assert any(len(row.lengths) > 1 for row in together)
    apart = [loss for row in alone for loss in losses(model, batch_of([row]))]
    assert losses(model, batch_of(together)) == pytest.approx(sorted(apart), abs=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_these_models_keep_packed_sequences_apart(family: str) -> None:
    SEVERAL.require_fitting(FAMILIES[family].model())


def test_models_whose_masks_ignore_the_position_ids_are_refused() -> None:
    """OPT takes position ids and makes no mask of them."""
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    with pytest.raises(UserError, match="would see each other in OPTForCausalLM"):
        SEVERAL.require_fitting(opt)


def test_documents_fill_rows_and_keep_their_borders() -> None:
    rows = wrapped([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 4)
    assert rows == [
        TokenRow([1, 2, 3, 4], [IGNORED, 2, 3, IGNORED], [3, 1]),
        TokenRow([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8], [1, 3]),
    ]


def test_positions_begin_again_with_every_sequence_and_the_padding() -> None:
    assert positions([[2, 3], [4]], 6).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]


def test_rows_of_one_sequence_have_a_mask() -> None:
    batch = batch_of([TokenRow([1, 2], [1, 2], [2]), TokenRow([3], [3], [1])])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert "position_ids" not in batch
