"""Text to keep, from the base itself, the pocket world or a file, as batches of tokens."""

from __future__ import annotations

import json
import string
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from forgetless.core.errors import UserError
from forgetless.data.texts import SELF_DRAWN, batches, fingerprint, self_text
from forgetless.models.load import load_model, load_tokenizer
from tests.families import FAMILIES, VOCAB
from tests.tiny import tokenizer as characters

PAD, BOS, EOS = 0, 1, 2


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words w3 .. w95 are tokens 3 .. 95; other words are token 95."""
    words = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=f"w{VOCAB - 1}"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def sequences(made: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """The rows of all batches without padding, which must be on the right."""
    rows = []
    for batch in made:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert mask[:length].all()
            assert (ids[length:] == PAD).all()
            rows.append(ids[:length].tolist())
    return rows


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return FAMILIES["llama"].model()


# ---- files ---------------------------------------------------------------------------------------


def test_raw_text_is_cut_into_windows(tmp_path: Path, model: PreTrainedModel) -> None:
    source = tmp_path / "a.txt"
    source.write_text(words(*range(3, 13)))
    made = batches(str(source), model, make_tokenizer(), max_length=4, batch_size=2)
    assert sequences(made) == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, EOS]]
    assert [batch["input_ids"].shape for batch in made] == [(2, 4), (1, 3)]
    assert made[0]["input_ids"].dtype == torch.int64


def test_texts_of_a_file_are_joined_and_closed(tmp_path: Path, model: PreTrainedModel) -> None:
    source = write_rows(tmp_path / "a.jsonl", *({"text": words(i, i)} for i in range(3, 9)))
    (row,) = sequences(batches(source, model, make_tokenizer(), max_length=100))
    pairs = [row[start : start + 3] for start in range(0, len(row), 3)]
    assert sorted(pairs) == [[i, i, EOS] for i in range(3, 9)]


@pytest.mark.parametrize("name", ["prompt", "question", "instruction"])
def test_prompts_without_answers_are_text(
    name: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    source = write_rows(tmp_path / "a.jsonl", {name: words(3, 4), "id": 7})
    assert sequences(batches(source, model, make_tokenizer())) == [[3, 4, EOS]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w3 w4 ", "completion": "w5"},
        {"prompt": "w3 w4 ", "response": "w5"},
        {"question": "w3 w4", "answer": "w5"},
        {"question": "w3 w4", "answer": ["w5", "w6"]},
        {"instruction": "w3", "input": "w4", "output": "w5"},
    ],
)
def test_prompts_with_answers_are_one_sequence(
    row: dict[str, object], tmp_path: Path, model: PreTrainedModel
) -> None:
    source = write_rows(tmp_path / "a.jsonl", row, row)
    assert sequences(batches(source, model, make_tokenizer())) == [[3, 4, 5]] * 2
    assert sequences(batches(source, model, make_tokenizer(), max_length=2)) == [[3, 4]] * 2


def test_conversations_follow_the_chat_template(tmp_path: Path, model: PreTrainedModel) -> None:
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    source = write_rows(tmp_path / "a.jsonl", {"messages": turns})
    tokenizer = make_tokenizer()
    unknown = VOCAB - 1
    # The plain form: "User: w3 \n Assistant: w4<eos>"
    assert sequences(batches(source, model, tokenizer)) == [[unknown, 3, unknown, 4, EOS]]
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
    assert sequences(batches(source, model, tokenizer)) == [[9, 3, 9, 4]]


def test_a_larger_source_is_sampled(tmp_path: Path, model: PreTrainedModel) -> None:
    rows = [{"prompt": words(3 + i % 9, 12 + i // 9) + " ", "completion": "w90"} for i in range(60)]
    source = write_rows(tmp_path / "a.jsonl", *rows)

    def drawn(seed: int) -> list[list[int]]:
        return sequences(batches(source, model, make_tokenizer(), samples=20, seed=seed))

    assert len({tuple(row) for row in drawn(0)}) == 20
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_windows_of_a_long_text_are_spread_over_it(tmp_path: Path, model: PreTrainedModel) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(words(*[i] * 1000) for i in range(3, 83)))
    rows = sequences(batches(str(source), model, make_tokenizer(), samples=30, max_length=20))
    assert len(rows) == 30
    assert {len(row) for row in rows} == {20}
    assert len({row[0] for row in rows}) > 4
    assert max(row[0] for row in rows) - min(row[0] for row in rows) > 40


def test_windows_fit_the_models_positions(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(words(*[5] * 300))
    rows = sequences(batches(str(source), FAMILIES["gpt2"].model(), make_tokenizer()))
    assert [len(row) for row in rows] == [128, 128, 45]


def test_the_pocket_worlds_knowledge(model: PreTrainedModel) -> None:
    made = batches("pocket:knowledge", model, make_tokenizer(), samples=5, max_length=16)
    assert [len(row) for row in sequences(made)] == [16] * 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("{}", "keys"),
        ("nonsense", "JSON"),
        ('{"text": "  "}', "empty"),
        ('{"question": "w3", "answer": []}', "answer"),
        ('{"prompt": 3}', "must be text"),
    ],
)
def test_bad_files_are_refused(
    content: str, message: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    for ask in (lambda s: batches(s, model, make_tokenizer()), fingerprint):
        with pytest.raises(UserError, match=message):
            ask(str(tmp_path / "a.jsonl"))


def test_settings_that_cannot_be(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for name in ("samples", "max_length", "batch_size"):
        with pytest.raises(UserError, match=f"{name} must be 1 or more, got 0"):
            batches("self", model, tokenizer, **{name: 0})
    with pytest.raises(UserError, match="unknown calibration source 'pocket:knowlege'; did you"):
        batches("pocket:knowlege", model, tokenizer)
    with pytest.raises(FileNotFoundError, match="missing"):
        batches(str(tmp_path / "missing.txt"), model, tokenizer)
    with pytest.raises(UserError, match="causal language models, got T5ForConditional"):
        batches("self", FAMILIES["t5"].model(), tokenizer)
    model_of_another = FAMILIES["llama"].model()
    model_of_another.resize_token_embeddings(50)
    (tmp_path / "a.txt").write_text(words(60))
    with pytest.raises(UserError, match=r"token 60, but the model knows 50 tokens"):
        batches(str(tmp_path / "a.txt"), model_of_another, tokenizer)


# ---- text from the base itself -------------------------------------------------------------------


def test_self_text_is_seeded_and_leaves_the_random_state(model: PreTrainedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = self_text(model, make_tokenizer(), 40, 12, 0)
    assert torch.equal(torch.rand(3), expected)
    assert len(first) == 40
    assert all(row[0] == BOS and 1 < len(row) <= 12 for row in first)
    assert first == self_text(model, make_tokenizer(), 40, 12, 0)
    assert first != self_text(model, make_tokenizer(), 40, 12, 1)
    assert self_text(model, make_tokenizer(), 2, 1, 0) == [[BOS]] * 2


def test_no_sequence_depends_on_those_that_are_written_with_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = self_text(model, make_tokenizer(), 40, 12, 0)
    assert self_text(model, make_tokenizer(), 15, 12, 0, start=25) == whole[25:]
    monkeypatch.setattr("forgetless.data.texts.sampled_together", lambda *_: 7)
    assert self_text(model, make_tokenizer(), 40, 12, 0) == whole


def test_text_is_the_same_where_keys_and_values_have_no_room_of_their_own(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = self_text(model, make_tokenizer(), 8, 100, 0)
    assert max(map(len, expected)) > 72
    monkeypatch.setattr("forgetless.models.cache.can_be_joined", lambda _: False)
    assert self_text(model, make_tokenizer(), 8, 100, 0) == expected


def test_self_text_ends_with_the_end_of_text(model: PreTrainedModel) -> None:
    rows = self_text(model, make_tokenizer(), 200, 40, 0)
    assert any(row[-1] == EOS and len(row) < 40 for row in rows)
    assert all(EOS not in row[1:-1] for row in rows)


def test_self_text_follows_the_whole_distribution(model: PreTrainedModel) -> None:
    """The second token's frequencies are the model's probabilities, whatever its own settings."""
    usual = model.generation_config
    model.generation_config = GenerationConfig(top_k=2, temperature=0.1, repetition_penalty=3.0)
    rows = self_text(model, make_tokenizer(), 4000, 2, 0)
    assert model.generation_config.top_k == 2
    model.generation_config = usual
    counts = torch.bincount(torch.tensor([row[1] for row in rows]), minlength=VOCAB).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[BOS]])).logits[0, -1]
    expected = logits.double().softmax(-1) * len(rows)
    chi_squared = float(((counts - expected) ** 2 / expected.clamp(min=1)).sum())
    assert chi_squared < VOCAB + 4 * (2 * VOCAB) ** 0.5


def test_without_a_beginning_of_text_the_first_token_is_any_usual_one() -> None:
    model = FAMILIES["llama"].model()
    model.config.bos_token_id = None
    rows = self_text(model, make_tokenizer(bos=False), 300, 2, 0)
    firsts = {row[0] for row in rows}
    assert len(firsts) > 60
    assert firsts <= set(range(VOCAB)) - {PAD, EOS}


def test_of_a_peft_model_the_base_speaks(model: PreTrainedModel) -> None:
    expected = self_text(model, make_tokenizer(), 8, 10, 0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(FAMILIES["llama"].model(), config).train()
    assert self_text(wrapped, make_tokenizer(), 8, 10, 0) == expected
    assert wrapped.training


def test_a_broken_base_is_named() -> None:
    model = FAMILIES["llama"].model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="gives NaN or infinity"):
        batches("self", model, make_tokenizer(), samples=2, max_length=4)


def test_a_real_base_tells_its_stories(shared_data: Path) -> None:
    folder = str(shared_data / "stories260K" / "hf")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    made = batches("self", model, tokenizer, samples=6, max_length=48)
    text = [tokenizer.decode(ids, skip_special_tokens=True) for b in made for ids in b["input_ids"]]
    assert len(text) == 6
    usual = model(
        **{n: v.to(model.device) for n, v in made[0].items()},
        labels=made[0]["input_ids"].to(model.device),
    )
    assert usual.loss < 2.5  # a model that is surprised by its own text has not written it


# ---- fingerprints --------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", {"text": "w3"})
    b = write_rows(tmp_path / "b.json", {"text": "w3"})
    c = write_rows(tmp_path / "c.jsonl", {"text": "w4"})
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    assert fingerprint("self") == SELF_DRAWN
    assert fingerprint("pocket:knowledge") != fingerprint("pocket:problems")


def test_a_fingerprint_needs_no_torch() -> None:
    code = (
        "import sys; from forgetless.data.texts import fingerprint; "
        "fingerprint('pocket:knowledge'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------- scripts without blanks

THAI = "ภาษาไทยเขียนติดกันโดยไม่เว้นวรรคระหว่างคำและมีสระกับวรรณยุกต์ซ้อนอยู่บนพยัญชนะ"
WITHOUT_BLANKS = {
    "chinese": "人工智能是计算机科学的一个分支，它企图了解智能的实质。" * 400,
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 300,
    "thai": THAI * 150,
    "minified": "function(a,b){return a.map(c=>c*b).filter(d=>d>0)};".replace(" ", "") * 250,
    "letters": "acgt" * 3000,
}


def parts_of(text: str, max_length: int = 64) -> list[str]:
    from forgetless.data.texts import _sections

    found = list(_sections(text, max_length))
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    parts = [part for part, _ in found]
    assert "".join(parts) == text
    return parts


@pytest.mark.parametrize("name", WITHOUT_BLANKS)
def test_a_text_without_blanks_is_cut_too(name: str) -> None:
    parts = parts_of(WITHOUT_BLANKS[name])
    assert len(parts) > 50
    assert max(map(len, parts[:-1])) <= 2 * 64 + 4
    assert len(parts[-1]) <= 8 * 64
    assert not any(unicodedata.category(part[0]).startswith("M") for part in parts)


def test_a_text_with_blanks_ends_its_parts_at_them_as_ever() -> None:
    text = "The quick brown fox jumps over the lazy dog and 狐は犬を飛び越える again.\n" * 200
    parts = parts_of(text)
    assert all(part[-1].isspace() for part in parts)
    assert all(8 * 64 < len(part) <= 8 * 64 + 40 for part in parts[:-1])


def test_one_long_word_in_a_text_with_blanks_is_cut() -> None:
    prose = "a few words and then " * 60
    blob = "A9x" * 3000
    parts = parts_of(prose + blob + " " + prose)
    assert max(map(len, parts)) <= 2 * 8 * 64
    assert sum(part.isalnum() for part in parts) > 20


def test_windows_of_such_a_text_are_spread_over_it(tmp_path: Path, model: PreTrainedModel) -> None:
    path = tmp_path / "letters.txt"
    # The letter tells the place: token 4 + n stands in the n-th ninetieth of the text.
    path.write_text("".join(string.printable[i * 90 // 9000] for i in range(9000)))
    made = batches(str(path), model, characters(), samples=12, max_length=16)
    places = sorted(ids[0] - 4 for ids in sequences(made))
    assert len(places) == 12
    assert places[0] < 30
    assert places[-1] > 60


@pytest.mark.parametrize("source", ["self", "text", "pairs"])
def test_how_many_are_read_together_changes_no_sequence(
    source: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    path = tmp_path / "kept.jsonl"
    rows: list[object] = [{"text": words(*range(3, 4 + i))} for i in range(20)]
    if source == "pairs":
        rows = [{"prompt": words(5, 6 + i), "completion": words(7, *[8] * i)} for i in range(20)]
    name = "self" if source == "self" else write_rows(path, *rows)
    found = [
        sorted(
            sequences(
                batches(name, model, make_tokenizer(), samples=9, max_length=12, batch_size=size)
            )
        )
        for size in (1, 4, 9)
    ]
    assert found[0] == found[1] == found[2]
