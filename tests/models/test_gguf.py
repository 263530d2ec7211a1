"""A base in one GGUF file: read as the model that it was made of, and unpacked once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.core.errors import UserError
from forgetless.models import gguf
from forgetless.models.hashes import base_hash
from forgetless.models.load import load_model, load_tokenizer, meta_model, resolve_base

writer_of = pytest.importorskip("gguf", reason="gguf is not installed")

LETTERS = [chr(code) for code in range(33, 127)]
TOKENS = ["<|bos|>", "<|eos|>", "Ġ", *LETTERS, "ab", "abc"]
MERGES = ["a b", "ab c"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=False,
)
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key as llama.cpp rotates them: neighbours, where ours are half apart."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write(file: Path, model: LlamaForCausalLM) -> None:
    config, weights = model.config, model.state_dict()
    out = writer_of.GGUFWriter(str(file), "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10_000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(TOKENS)
    out.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    out.add_token_merges(MERGES)
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    for block in range(config.num_hidden_layers):
        names |= {f"blk.{block}.{k}": f"model.layers.{block}.{v}" for k, v in _BLOCK.items()}
    for short, long in names.items():
        weight = weights[f"{long}.weight"]
        if short.endswith("attn_q"):
            weight = in_pairs(weight, config.num_attention_heads)
        if short.endswith("attn_k"):
            weight = in_pairs(weight, config.num_key_value_heads)
        out.add_tensor(f"{short}.weight", weight.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture
def file(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "tiny.gguf", model)
    return tmp_path / "tiny.gguf"


def test_it_is_the_model_that_the_file_was_made_of(model: LlamaForCausalLM, file: Path) -> None:
    found = load_model(str(file))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(found(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert found.dtype == torch.float32
    shapes = {name: weight.shape for name, weight in meta_model(str(file)).named_parameters()}
    assert shapes == {name: weight.shape for name, weight in model.named_parameters()}
    tokenizer = load_tokenizer(str(file))
    assert [TOKENS[i] for i in tokenizer("abc cab", add_special_tokens=False)["input_ids"]] == [
        "abc",
        "Ġ",
        "c",
        "ab",
    ]


def test_it_is_unpacked_once_and_known_by_its_content(
    model: LlamaForCausalLM, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, known = resolve_base(str(file)), base_hash(str(file))

    def fail(*_: Any) -> None:
        raise AssertionError("unpacked again")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_unpack", fail)
        assert resolve_base(str(file)) == folder
        file.touch()
        assert (resolve_base(str(file)), base_hash(str(file))) == (folder, known)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    write(file, model)
    assert resolve_base(str(file)) != folder
    assert base_hash(str(file)) != known


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"PK" + content[2:], "does not hold what a GGUF file does"),
        (lambda content: content[:2000], "cannot unpack base"),
        (lambda content: b"", "does not hold what a GGUF file does"),
        (lambda content: content.replace(b"llama", b"lhama"), "cannot unpack base"),
    ],
)
def test_a_file_that_cannot_be_unpacked_is_named(file: Path, damage: Any, said: str) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=said) as raised:
        load_model(str(file))
    assert str(file) in str(raised.value)
    left = Path(constants.HF_HOME) / "forgetless" / "gguf"
    assert [path for path in left.glob("*") if path.is_dir()] == []


def test_the_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'forgetless\[gguf\]'"):
        load_model(str(file))
