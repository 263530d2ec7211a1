"""Tasks: right numbers whatever the batches, and a model that is left as it was."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from forgetless.core.errors import UserError
from forgetless.tasks import TASKS, Item, Task, TaskResult, make_task, make_tasks
from forgetless.tasks.generation import generate
from forgetless.tasks.kl import KL
from forgetless.tasks.likelihood import losses
from forgetless.tasks.perplexity import Perplexity
from forgetless.tasks.pocket_problems import PocketProblems
from forgetless.tasks.pocket_recall import PocketRecall
from tests.families import FAMILIES, VOCAB

pytestmark = pytest.mark.filterwarnings("ignore:.* answers .* are empty and .* were cut off")

CHARACTERS = "\n" + "".join(chr(i) for i in range(32, 127))[: VOCAB - 4]
SPECIAL = ["<pad>", "<bos>", "<eos>"]
PROMPTS = ["A", "What is it?", "12 + 3 =", "to be or not", "x", "a b c d e f g h i j k l"]
CAUSAL = ["llama", "qwen2", "gpt2"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as many as the tiny models have; a text begins with <bos>."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


class Table(nn.Module):
    """A language model whose next token depends on the last one alone: logits = table[token]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(is_encoder_decoder=False, vocab_size=len(table))

    def can_generate(self) -> bool:
        return True

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def chain(tokenizer: PreTrainedTokenizerFast, text: str) -> Table:
    """A model that goes from each character of `text` to the next, and from the last to <eos>."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = torch.zeros(VOCAB, VOCAB)
    for token, following in zip(ids, [*ids[1:], 2], strict=True):
        table[token, following] = 10.0
    return Table(table)


def adapted(family: str = "llama", *, moved: bool) -> PeftModel:
    model = FAMILIES[family].model()
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    if moved:
        torch.manual_seed(1)
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
    return peft.eval()


@contextmanager
def left_as_it_was(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Check that weights, modes, gradients' needs, generators and tokenizer do not change."""

    def state() -> tuple[Any, ...]:
        return (
            {name: weight.clone() for name, weight in model.state_dict().items()},
            [module.training for module in model.modules()],
            [(weight.requires_grad, weight.grad) for weight in model.parameters()],
            torch.get_rng_state().tolist(),
            (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token),
            torch.is_grad_enabled(),
        )

    weights, *before = state()
    yield
    weights_after, *after = state()
    assert after == before
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)


# ---------------------------------------------------------------------------------- generation


def one_by_one(model: nn.Module, tokenizer: Any, prompt: str, steps: int) -> str:
    """Greedy decoding in its plainest form: no batch, no padding, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + steps:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0])


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_generation_is_greedy_decoding_whatever_the_batch(
    family: str, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = FAMILIES[family].model()
    expected = [one_by_one(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert found == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("family", CAUSAL)
def test_rows_that_end_early_leave_the_others_as_they_are(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = FAMILIES[family].model()
    plain = [one_by_one(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    ends = sorted({token for text in plain[:3] for token in tokenizer(text[2:4])["input_ids"][1:]})
    model.generation_config.eos_token_id = [2, *ends]
    expected = []
    for text in plain:
        ids = tokenizer(text)["input_ids"][1:]
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        expected.append(text[:stop])
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert 2 <= sum(a != b for a, b in zip(expected, plain, strict=True)) < len(PROMPTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcd", {"a": "bcd", "b": "cd", "d": ""}),
        ("abc\ndef", {"a": "bc", "c": "", "d": "ef"}),
        ("abcdefghijklm", {"a": "bcdefghi", "h": "ijklm", "l": "m"}),
    ],
)
def test_rows_end_at_the_end_of_text_a_newline_or_the_limit(
    text: str, expected: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    found = generate(chain(tokenizer, text), tokenizer, list(expected), max_new_tokens=8)
    assert found == list(expected.values())
    assert [each.is_cut for each in found] == [len(each) == 8 for each in found]


def test_the_models_own_ends_count_and_its_sampling_does_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = chain(tokenizer, "abcd")
    assert generate(model, tokenizer, ["a"], max_new_tokens=8) == ["bcd"]
    (end,) = tokenizer("d", add_special_tokens=False)["input_ids"]
    model.generation_config = GenerationConfig(eos_token_id=[2, end], do_sample=True)
    assert generate(model, tokenizer, ["a"], max_new_tokens=8) == ["bc"]


def test_generation_refuses_what_cannot_work(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"].model()
    with pytest.raises(
        UserError, match=r"121 tokens with up to 8 new ones does not fit into .* 128"
    ):
        generate(model, tokenizer, ["x" * 120], max_new_tokens=8)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"logits are nan.*diverged"):
        generate(model, tokenizer, ["x"], max_new_tokens=8)
    assert generate(model, tokenizer, [], max_new_tokens=8) == []


@pytest.mark.parametrize("family", ["t5", "bert", "vit"])
def test_models_that_do_not_continue_text_are_refused(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = FAMILIES[family].model()
    for score in (
        lambda: generate(model, tokenizer, ["x"], max_new_tokens=2),
        lambda: losses(model, [[1, 2]], max_length=8, stride=4),
    ):
        with pytest.raises(UserError, match=f"causal language model, got {type(model).__name__}"):
            score()


# ---------------------------------------------------------------------------------- losses


def loss_of(model: nn.Module, ids: list[int]) -> Tensor:
    """Loss of every token but the first, in float64, of one text at once."""
    if len(ids) < 2:
        return torch.zeros(0)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
    return nn.functional.cross_entropy(
        logits[:-1].double(), torch.tensor(ids[1:]), reduction="none"
    )


@pytest.mark.parametrize("family", CAUSAL)
def test_padding_and_batches_do_not_change_losses(family: str) -> None:
    model = FAMILIES[family].model()
    rows = [[5, 6, 7, 8, 9, 10, 11], [30, 31], list(range(3, 60)), [9, 9, 9]]
    expected = [float(loss_of(model, row).sum()) for row in rows]
    for batch_size in (1, 3, None):
        found = losses(model, rows, max_length=64, stride=32, batch_size=batch_size)
        assert [piece.sums["loss"] for piece in found] == pytest.approx(expected, rel=1e-5)
        assert [piece.sums["tokens"] for piece in found] == [6, 1, 56, 2]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    max_length=st.integers(2, 20),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_windows_count_every_token_once(
    lengths: list[int], max_length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, max_length - 1))
    generator = torch.Generator().manual_seed(0)
    model = Table(torch.randn(VOCAB, VOCAB, generator=generator))
    rows = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    found = losses(model, rows, max_length=max_length, stride=stride)
    for text, row in enumerate(rows):
        pieces = [piece for piece in found if piece.text == text]
        assert sum(piece.sums["tokens"] for piece in pieces) == max(len(row) - 1, 0)
        # The model looks at one token only, so windows cannot change the sum.
        total = float(loss_of(model, row).sum())
        assert sum(piece.sums["loss"] for piece in pieces) == pytest.approx(total, abs=1e-4)


def test_windows_give_context_as_a_plain_loop_does() -> None:
    model = FAMILIES["llama"].model()
    ids = [3 + (7 * i) % 90 for i in range(50)]
    max_length, stride, expected, done = 16, 5, 0.0, 1
    for start in range(0, len(ids), stride):
        end = min(start + max_length, len(ids))
        if end > done:
            expected += float(loss_of(model, ids[start:end])[done - start - 1 :].sum())
            done = end
    found = losses(model, [ids], max_length=max_length, stride=stride)
    assert sum(piece.sums["loss"] for piece in found) == pytest.approx(expected, rel=1e-5)
    assert sum(piece.sums["tokens"] for piece in found) == 49


def test_perplexity_of_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"].model()
    texts = ["a short one", "a much longer document, with more to say", "x"]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    result = Perplexity(path).evaluate(model, tokenizer)
    each = [loss_of(model, tokenizer(text)["input_ids"]) for text in texts]
    every = torch.cat(each)
    assert result.value == pytest.approx(float(every.mean()), rel=1e-5)
    assert result.extra["perplexity"] == pytest.approx(math.exp(float(every.mean())), rel=1e-4)
    assert result.extra["tokens"] == len(every) == sum(len(text) for text in texts)
    assert (result.metric, result.higher_is_better, result.n) == ("loss", False, 3)
    assert [item.prompt for item in result.items] == texts
    assert [item.weight for item in result.items] == [len(loss) for loss in each]
    assert [i.score for i in result.items] == pytest.approx([float(x.mean()) for x in each], 1e-5)


def test_perplexity_of_answers_counts_the_answers_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = FAMILIES["llama"].model()
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}))
    result = Perplexity(path).evaluate(model, tokenizer)
    expected = loss_of(model, [*tokenizer("1 + 1 = 2")["input_ids"], 2])[7:]
    assert result.value == pytest.approx(float(expected.mean()), rel=1e-5)
    assert result.extra["tokens"] == 3


def test_a_single_document_has_its_windows_as_items(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("It was a dark night, and the rain fell on the roofs of the town.\n" * 5)
    result = Perplexity(path, max_length=64).evaluate(FAMILIES["llama"].model(), tokenizer)
    assert result.n > 5
    assert result.stderr > 0
    assert result.items[1].id == "0:32"
    assert sum(item.weight for item in result.items) == len(path.read_text())


# ---------------------------------------------------------------------------------- every task


@pytest.fixture
def every_task(tmp_path: Path) -> list[Task]:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "some text"}\n{"text": "and some more of it"}\n')
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"{a}+1?", "choices": [a, a + 1, "no"], "answer": "B"} for a in range(5)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_tasks(
        [
            {"kind": "pocket_recall", "limit": 9, "max_new_tokens": 4},
            {"kind": "pocket_problems", "limit": 3, "max_new_tokens": 4},
            {"kind": "perplexity", "path": str(path)},
            {"kind": "kl", "path": str(path)},
            {"kind": "multiple_choice", "path": str(questions)},
            {"kind": "generate", "path": str(questions), "max_new_tokens": 4},
        ]
    )


TESTED_ELSEWHERE = {
    *("lm_eval", "humaneval", "mbpp", "diversity", "image_accuracy", "sentence_accuracy"),
    *("neighbours", "class_kl", "retrieval", "preference"),
    *("pocket_choice", "pocket_functions", "pocket_series"),
}
"""Kinds whose own test files check what is checked here of the others."""


def long_context(model: Any) -> Any:
    """The same model, said to have room for the pocket world's prompts."""
    model.config.max_position_embeddings = 1024
    return model


def test_every_kind_is_in_the_list_of_tests(every_task: list[Task]) -> None:
    assert {task.name for task in every_task} == set(TASKS) - TESTED_ELSEWHERE


def test_tasks_leave_the_model_as_it_was(
    every_task: list[Task], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = long_context(adapted(moved=True))
    model.train()
    model.base_model.model.model.layers[0].eval()
    frozen = next(weight for name, weight in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    for task in every_task:
        with left_as_it_was(model, tokenizer):
            task.evaluate(model, tokenizer)


def test_batch_size_does_not_change_scores(
    every_task: list[Task], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = long_context(adapted(moved=True))
    for task in every_task:
        one, many = (task.evaluate(model, tokenizer, batch_size=size) for size in (1, None))
        assert [item.answer for item in one.items] == [item.answer for item in many.items]
        assert one.value == pytest.approx(many.value, rel=1e-5)
        assert one.fingerprint == many.fingerprint == task.fingerprint


def test_results_and_items_survive_json(
    every_task: list[Task], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = long_context(adapted(moved=True))
    for task in every_task:
        result = task.evaluate(model, tokenizer)
        lines = [json.loads(json.dumps(item.to_json())) for item in result.items]
        text = json.dumps({**result.to_json(), "kind": "forgetting"}, allow_nan=False)
        again = TaskResult.from_json(json.loads(text), [Item.from_json(line) for line in lines])
        assert again.seconds == pytest.approx(result.seconds, abs=1e-3)
        assert again.items == result.items
        assert again.to_json() == result.to_json()


def test_weights_that_are_nan_are_an_error_and_not_a_score(
    every_task: list[Task], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = long_context(FAMILIES["llama"].model())
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    for task in every_task:
        with pytest.raises(UserError, match=r"nan.*diverged"):
            task.evaluate(model, tokenizer, reference=model)


# ---------------------------------------------------------------------------------- pocket


def test_recall_counts_facts_by_their_answers(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = PocketRecall(limit=40)
    asked = task._facts

    def answer(model: object, tokenizer: object, prompts: list[str], **_: object) -> list[str]:
        assert prompts == [question.prompt for question in asked]
        right = [f" {question.answer}. And more" for question in asked[:30]]
        return [*right, *[" Atlantis"] * 10]

    monkeypatch.setattr("forgetless.tasks.generation.generate", answer)
    result = task.evaluate(nn.Identity(), tokenizer)
    assert (result.value, result.n, result.metric) == (0.75, 40, "accuracy")
    assert result.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert result.items[-1].answer == "Atlantis"
    assert result.items[0].expected == asked[0].answer
    assert len({item.id for item in result.items}) == 40


def test_a_limit_takes_facts_of_every_kind() -> None:
    relations = {question.fact.relation for question in PocketRecall(limit=60)._facts}
    assert len(relations) == 7


def test_problems_count_by_their_final_number(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = PocketProblems(limit=4)
    right = [problem.answer for problem in task._problems]
    texts = [
        f" 1 + 1 = 2. The answer is {right[0]}.",
        f" The answer is {right[1]}0.",
        f" It is {right[2]}",
        "",
    ]
    monkeypatch.setattr("forgetless.tasks.generation.generate", lambda *_, **__: texts)
    result = task.evaluate(nn.Identity(), tokenizer)
    assert [item.score for item in result.items] == [1, 0, 0, 0]
    assert result.items[0].answer == texts[0].strip()


@pytest.fixture(scope="module")
def pocket() -> tuple[nn.Module, Any]:
    from forgetless.models.load import load_model, load_tokenizer

    return load_model("pocket"), load_tokenizer("pocket")


def test_the_pocket_base_knows_its_facts_and_no_problems(pocket: tuple[nn.Module, Any]) -> None:
    recall = PocketRecall(limit=200).evaluate(*pocket)
    assert recall.value >= 0.95
    assert PocketProblems(limit=50).evaluate(*pocket).value < 0.1
    one = PocketRecall(limit=40).evaluate(*pocket, batch_size=1)
    many = PocketRecall(limit=40).evaluate(*pocket)
    assert one.items == many.items


# ---------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pocket_recal", "unknown task 'pocket_recal'; did you mean 'pocket_recall'?"),
        ({"kind": "perplexty", "path": "x"}, "did you mean 'perplexity'"),
        ({"path": "x"}, "a task needs a 'kind', one of pocket_recall"),
        (7, "a task is a name or a mapping with 'kind', got 7"),
        ("kl", "task 'kl' needs a 'path'"),
        ({"kind": "kl", "path": "gone.jsonl"}, "task 'kl': no such file: gone.jsonl"),
        ({"kind": "kl", "path": "pocket:hold"}, "unknown pocket text 'pocket:hold'; did you mean"),
        ({"kind": "kl", "path": None}, "path must be a file"),
        ({"kind": "pocket_recall", "lmit": 3}, "unknown setting .*'lmit'; did you mean 'limit'"),
        (
            {"kind": "pocket_recall", "limit": 0},
            "limit must be a whole number of at least 1, got 0",
        ),
        ({"kind": "pocket_recall", "limit": True}, "limit must be a whole number"),
        ({"kind": "pocket_recall", "limit": "9"}, "got '9'"),
        ({"kind": "pocket_recall", "phrasing": "loud"}, "phrasing must be 'held_out' or 'seen'"),
        ({"kind": "pocket_problems", "limit": None}, "limit must be a whole number"),
        ({"kind": "pocket_recall", "name": "a/b"}, "it names files"),
        ({"kind": "kl", "path": "pocket:held", "max_length": 0}, "max_length must be"),
    ],
)
def test_a_wrong_spec_says_what_is_allowed(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(spec)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    spec = {"kind": "perplexity", "path": "gone", "max_length": 1, "stride": "x", "lenght": 3}
    with pytest.raises(UserError) as caught:
        make_task(spec)
    for part in ("'lenght'", "no such file: gone", "max_length must be", "stride must be"):
        assert part in str(caught.value)
    path = tmp_path / "a.txt"
    path.write_text("text")
    with pytest.raises(UserError, match="stride must be below max_length"):
        Perplexity(path, max_length=8, stride=8)
    with pytest.raises(UserError) as several:
        make_tasks(["pocket_recall", "pocket_recall", "nope", {"kind": "kl"}])
    for part in ("two tasks are named 'pocket_recall'", "unknown task 'nope'", "needs a 'path'"):
        assert part in str(several.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "line 2"),
        ("a.jsonl", "{text}", "no valid JSON"),
        ("a.jsonl", '{"words": "x"}', "has the keys 'words'"),
        ("a.exe", "x", "unknown file type"),
    ],
)
def test_a_bad_file_shows_before_any_model(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    for kind in ("perplexity", "kl"):
        with pytest.raises(UserError, match=message):
            make_task({"kind": kind, "path": str(tmp_path / name)})


def test_the_name_may_stand_for_the_kind_and_tasks_pass_through() -> None:
    task = make_task({"name": "pocket_recall", "limit": 5})
    assert task == PocketRecall(limit=5)
    assert make_task(task) is task
    assert make_tasks("pocket_recall") == [PocketRecall()]
    assert make_tasks(task) == [task]


def test_fingerprints_follow_content_and_settings(tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    here.write_text('{"text": "a"}\n{"text": "b"}\n')
    there.write_text('{"text":"a"}\n\n{"text":"b"}\n')
    same = KL(here).fingerprint
    assert KL(there, name="other").fingerprint == same
    prints = [
        same,
        KL(here, limit=1).fingerprint,
        KL(here, max_length=9).fingerprint,
        Perplexity(here).fingerprint,
        Perplexity(here, stride=9).fingerprint,
        PocketRecall().fingerprint,
        PocketRecall(phrasing="seen").fingerprint,
        PocketRecall(limit=5).fingerprint,
        PocketRecall(max_new_tokens=5).fingerprint,
        PocketProblems().fingerprint,
        PocketProblems(seed=1).fingerprint,
        PocketProblems(limit=5).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    here.write_text('{"text": "a"}\n{"text": "c"}\n')
    assert KL(here).fingerprint != same


@pytest.mark.parametrize("path", ["pocket:held", "pocket:knowledge", "pocket:problems:test"])
def test_texts_of_the_pocket_world(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = adapted(moved=True)
    result = KL(path, limit=5).evaluate(model, tokenizer)
    assert result.n == 5
    assert result.value > 0


def test_conversations_are_scored(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    model = adapted(moved=True)
    learned = Perplexity(path).evaluate(model, tokenizer).extra["tokens"]
    read = KL(path).evaluate(model, tokenizer).extra["tokens"]
    assert 5 <= learned < read


def test_kinds_describe_themselves() -> None:
    assert TASKS["kl"].required() == ["path"]
    assert TASKS["pocket_problems"].defaults()["limit"] == 200
    assert all(kind.summary for kind in TASKS.values())


def test_no_torch_until_a_task_is_evaluated() -> None:
    code = (
        "import sys; from forgetless.scores.comparison import compare; "
        "from forgetless.tasks import make_task; make_task('pocket_recall'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
