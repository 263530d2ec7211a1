"""Texts as tokens: one beginning, one end, no blank that nobody wrote; answers read back whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from forgetless.data.encoding import encode
from forgetless.data.examples import from_rows
from forgetless.data.modality import training_batches
from forgetless.data.texts import batches
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model
from forgetless.tasks.generate import ExactMatch
from forgetless.tasks.generation import generate
from forgetless.tasks.inference import padding_of
from forgetless.tasks.kl import KL
from forgetless.tasks.perplexity import Perplexity

pytest_plugins = ["tests.tiny_fixtures"]

pytestmark = pytest.mark.filterwarnings("ignore:.* answers .* are empty and .* were cut off")

BOS, EOS = "<|begin|>", "<|end|>"
CORPUS = [
    "Tom said: yes. Once upon a time there was a red and blue house, and a dog",
    "a\nb c [INST]=/",
] * 4
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def made(kind: str, *, adds: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of GPT-2 ("bytes") or of Llama 2 ("blank": one before all).

    Args:
        kind: "bytes" or "blank".
        adds: "bos", "bos eos" or nothing: what it puts around a text by itself.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>") if kind == "blank" else models.BPE())
    special = ["<unk>", BOS, EOS]
    if kind == "blank":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=120, special_tokens=special, max_token_length=4, show_progress=False
        )
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    core.train_from_iterator(CORPUS, trainer)
    if adds:
        around = f"{BOS} $A" if adds == "bos" else f"{BOS} $A {EOS}"
        core.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(BOS, 1), (EOS, 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )


def tokens(rows: Any, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The ids of the first row, and those that are learned."""
    several = [rows] if isinstance(rows, dict) else rows
    examples = from_rows([(f"line {i}", row) for i, row in enumerate(several, start=1)], "x")
    row = tokenize(examples, tokenizer, max_length=400)[0]
    return row["input_ids"], [label for label in row["labels"] if label >= 0]


# ---------------------------------------------------------------------- a border inside a token

BORDERS = [
    ("Tom said: ", "yes"),
    ("Once upon a ti", "me there was"),
    ("a red and blue ", "house"),
    ("colour=re", "d and blue"),
    ("a dog", " and a house"),
    ("a\n", "b"),
    ("a\n", " b c"),
    ("Tom", "."),
]


@pytest.mark.parametrize("kind", ["bytes", "blank"])
@pytest.mark.parametrize(("prompt", "completion"), BORDERS)
def test_no_blank_appears_between_prompt_and_completion(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = made(kind, adds="bos")
    ids, learned = tokens({"prompt": prompt, "completion": completion}, tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
    assert ids[: len(ids) - len(learned)] == tokenizer(prompt)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == learned[-1]


@pytest.mark.parametrize("kind", ["bytes", "blank"])
@pytest.mark.parametrize("answer", ["yes.", " and a dog", "red\nand blue", "a house"])
def test_no_blank_appears_where_an_assistants_turn_begins(kind: str, answer: str) -> None:
    tokenizer = made(kind, adds="bos")
    tokenizer.chat_template = CHAT.replace(" [/INST]", " re")  # a turn that begins inside a word
    turns = [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": answer}]
    ids, learned = tokens({"messages": turns * 2}, tokenizer)
    whole = tokenizer(f"{BOS}{f'[INST] Tom re{answer}{EOS}' * 2}", add_special_tokens=False)
    assert tokenizer.decode(ids) == tokenizer.decode(whole["input_ids"])
    shown = tokenizer.decode(ids[: len(ids) - len(learned) // 2])
    assert shown.endswith("[INST] Tom re")


def test_a_tokenizer_that_changes_letters_still_gives_tokens() -> None:
    tokenizer = made("blank", adds="bos")
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), core.normalizer])
    ids, learned = tokens({"prompt": "TOM SAID: ", "completion": "YES"}, tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "tom said: yes"
    assert ids[-1] == tokenizer.eos_token_id == learned[-1]


# ---------------------------------------------------------------------- beginnings and ends

RENDERED = [
    {"text": f"{BOS}a red house{EOS}"},
    {"text": "a red house"},
    {"prompt": f"{BOS}a red", "completion": f" house{EOS}"},
    {"prompt": "a red", "completion": " house"},
    {"prompt": "a red", "completion": f" house{EOS}"},
]


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
@pytest.mark.parametrize("row", RENDERED)
def test_a_text_begins_and_ends_once(adds: str, row: dict[str, str]) -> None:
    tokenizer = made("bytes", adds=adds)
    ids, learned = tokens(row, tokenizer)
    begun = bool(adds) or BOS in next(iter(row.values()))
    assert ids.count(tokenizer.bos_token_id) == begun
    assert ids.count(tokenizer.eos_token_id) == 1 == learned.count(tokenizer.eos_token_id)
    assert (ids[0] == tokenizer.bos_token_id, ids[-1]) == (begun, tokenizer.eos_token_id)


@pytest.mark.parametrize("own", [True, False])
def test_a_turn_ends_once(own: bool) -> None:
    tokenizer = made("bytes", adds="bos")
    tokenizer.chat_template = CHAT if own else None
    user = {"role": "user", "content": "a dog"}
    plain, _ = tokens({"messages": [user, {"role": "assistant", "content": "yes"}]}, tokenizer)
    ended = {"role": "assistant", "content": f"yes{EOS}"}
    ids, learned = tokens({"messages": [user, ended]}, tokenizer)
    assert ids == plain
    assert learned.count(tokenizer.eos_token_id) == 1


def test_a_template_that_writes_the_beginning_gives_one_in_all_that_is_read(tmp_path: Path) -> None:
    """The tokenizer adds one by itself to every other text."""
    tokenizer, path = made("bytes", adds="bos"), tmp_path / "pairs.jsonl"
    tokenizer.chat_template = CHAT
    path.write_text(json.dumps({"prompt": "red or blue", "completion": "red"}) + "\n")
    model, seen = small(len(tokenizer)), []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((kwargs["input_ids"] == tokenizer.bos_token_id).sum(1).tolist())

    (learned,) = training_batches(str(path), model, tokenizer, batch_size=1)
    (kept,) = batches(str(path), model, tokenizer, samples=1, max_length=64)
    for batch in (learned, kept):
        assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 1
    model.register_forward_pre_hook(count, with_kwargs=True)
    asked = ExactMatch(path, question="prompt", answer="completion", max_new_tokens=2)
    for task in (Perplexity(path), KL(path), asked):
        task.evaluate(model, tokenizer, reference=model)
        assert seen[0] == [1], task.name
        seen.clear()


def small(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_what_is_measured_and_kept_begins_once_too(adds: str, tmp_path: Path) -> None:
    tokenizer = made("bytes", adds=adds)
    model = small(len(tokenizer))
    path = tmp_path / "rendered.jsonl"
    path.write_text(json.dumps({"text": f"{BOS}a red house{EOS}"}) + "\n")
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"text": "a red house"}) + "\n")
    (batch,) = batches(str(path), model, tokenizer, samples=2, max_length=64)
    (row,) = batch["input_ids"].tolist()
    assert (row.count(1), row.count(2)) == (1, 1)
    tokens = {
        name: Perplexity(file).evaluate(model, tokenizer).extra["tokens"]
        for name, file in (("rendered", path), ("plain", plain))
    }
    # The text's own end counts; its beginning is in both where the tokenizer adds one.
    assert tokens["rendered"] - tokens["plain"] == (1 if adds else 2)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "red", "answer": "x"}))
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int((kwargs["input_ids"] == 1).sum())),
        with_kwargs=True,
    )
    task = ExactMatch(asked, prompt=f"{BOS}a {{question}}", max_new_tokens=2)
    task.evaluate(model, tokenizer)
    assert seen[0] == 1


def test_encode_leaves_the_text_s_own_end(tmp_path: Path) -> None:
    for adds in ("", "bos", "bos eos"):
        tokenizer = made("bytes", adds=adds)
        assert encode(tokenizer, [f"a{EOS}"])[0][-1] == tokenizer.eos_token_id
        assert encode(tokenizer, ["a"])[0][-1] != tokenizer.eos_token_id


# ---------------------------------------------------------------------- answers read back


class Says(nn.Module):
    """A model that writes given tokens after any prompt, then the end of text."""

    def __init__(self, said: list[int], prompt: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.said, self.prompt, self.size = said, prompt, size
        self.config = SimpleNamespace(is_encoder_decoder=False, vocab_size=size)

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, mask in enumerate(attention_mask):
            place = int(mask.sum()) - self.prompt
            logits[row, -1, self.said[place] if place < len(self.said) else 2] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("kind", ["bytes", "blank"])
@pytest.mark.parametrize("answer", [" and a dog", "    red house", "yes.", "\n a dog", " "])
@pytest.mark.parametrize("prompt", ["Tom said:", "a red", "a dog\n"])
def test_an_answer_keeps_its_first_blanks(kind: str, prompt: str, answer: str) -> None:
    tokenizer = made(kind, adds="bos")
    asked = tokenizer(prompt)["input_ids"]
    ids, _ = tokens({"prompt": prompt, "completion": answer + "."}, tokenizer)
    said = ids[len(asked) : -1]
    model = Says(said, len(asked), len(tokenizer))
    written = generate(model, tokenizer, [prompt, prompt], max_new_tokens=30, stop="END")
    assert written == [answer + "."] * 2


# ---------------------------------------------------------------------- padding


def test_padding_outside_the_embeddings_is_never_looked_up(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgetless.models.load import load_tokenizer

    model, tokenizer = load_model(str(tiny_base)), load_tokenizer(str(tiny_base))
    usual = load_tokenizer(str(tiny_base))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.get_input_embeddings().num_embeddings
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "12" * i, "completion": "3" * i} for i in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = tmp_path / "asked.jsonl"
    questions = [{"question": "7" * i, "answer": "x"} for i in range(1, 6)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions))
    for batch in (
        *batches(str(path), model, tokenizer, samples=5, max_length=32),
        *training_batches(str(path), model, tokenizer, samples=5, max_length=32),
    ):
        assert int(batch["input_ids"].max()) < tokenizer.pad_token_id
        model(**batch)
    for task in (
        Perplexity(path),
        KL(path),
        ExactMatch(asked, max_new_tokens=4),
        ExactMatch(asked, max_new_tokens=4, stop="no such thing"),
    ):
        found = task.evaluate(model, tokenizer, reference=model)
        assert found.items == task.evaluate(model, usual, reference=model).items
    assert padding_of(model, tokenizer) == 0
