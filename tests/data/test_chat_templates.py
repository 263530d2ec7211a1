"""Chat templates of many families: exactly the assistant's tokens are learned."""

from __future__ import annotations

import copy
import json
import shutil
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl.chat_template_utils
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forgetless.core.errors import UserError
from forgetless.data.chat import TODAY, Chat, opened
from forgetless.data.encoding import encode
from forgetless.data.examples import from_rows, load_examples
from forgetless.data.packing import IGNORED
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_tokenizer
from forgetless.recipes.checking import check
from forgetless.recipes.recipe import Recipe

pytest_plugins = ["tests.tiny_fixtures"]

TEMPLATES = Path(trl.chat_template_utils.__file__).parent / "chat_templates"

# The forms of families that TRL has no template of, written from their published formats.
ROLES_TAKE_TURNS = (
    "{% if messages[0].role == 'system' %}"
    "{% set first, turns = messages[0].content, messages[1:] %}"
    "{% else %}{% set first, turns = none, messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{% endfor %}"
)
MISTRAL = (
    ROLES_TAKE_TURNS + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "[INST] {% if loop.first and first %}{{ first }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_LATE = MISTRAL.replace("loop.first", "loop.last")  # as of its version 3
LLAMA_2 = (
    ROLES_TAKE_TURNS + "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and first %}<<SYS>>\n{{ first }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TULU = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template and what it makes of an assistant's text.

    Attributes:
        template: Jinja, or the name of one of TRL's files.
        special: tokens of its vocabulary; the last one is the tokenizer's end of sequence.
        answer: what is learned of the text ``{}``.
        trims: what the template does to the text.
        system, tool, free: whether it takes a system turn, a tool's, and roles in any order.
        one_row: whether a conversation stays one row.
    """

    template: str
    special: tuple[str, ...]
    answer: str
    trims: Callable[[str], str] = str
    system: bool = True
    tool: bool = False
    free: bool = True
    one_row: bool = True

    @property
    def source(self) -> str:
        """The template's text."""
        file = TEMPLATES / f"{self.template}.jinja"
        return self.template if "{" in self.template else file.read_text(encoding="utf-8")


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
THOUGHTS = "<think>\n\n</think>\n\n"
FAMILIES = {
    "qwen2_5": Family("qwen2_5", CHATML, "{}<|im_end|>", tool=True),
    # Its answers have thoughts after a question only.
    "qwen3": Family(
        "qwen3",
        CHATML,
        THOUGHTS + "{}<|im_end|>",
        trims=lambda text: text.lstrip("\n"),
        free=False,
        one_row=False,
    ),
    "llama3": Family("llama3", LLAMA_3, "{}<|eot_id|>", trims=str.strip),
    "llama3_2": Family("llama3_2", LLAMA_3, "{}<|eot_id|>", trims=str.strip),
    "gemma": Family(
        "gemma",
        ("<start_of_turn>", "<end_of_turn>", "<eos>"),
        "{}<end_of_turn>",
        trims=str.strip,
        system=False,
        free=False,
    ),
    "gemma3": Family(
        "gemma3",
        ("<start_of_turn>", "<end_of_turn>", "<eos>"),
        "{}<end_of_turn>",
        trims=str.strip,
        free=False,
    ),
    "phi3": Family(
        "phi3",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "{}<|end|>",
    ),
    "deepseek_r1_distill": Family("deepseek_r1_distill", DEEPSEEK, "{}<｜end▁of▁sentence｜>"),
    "mistral": Family(
        MISTRAL, ("[INST]", "[/INST]", "</s>"), " {}</s>", trims=str.strip, free=False
    ),
    "llama2": Family(LLAMA_2, ("</s>",), " {} </s>", trims=str.strip, free=False),
    "zephyr": Family(ZEPHYR, ("</s>",), "{}</s>"),
    "tulu": Family(TULU, ("<|end_of_text|>",), "{}<|end_of_text|>"),
}

ASK, ANSWER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}
MORE = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Ciao, 1 2 3!"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = [{"role": "assistant", "content": "look(x)"}, {"role": "tool", "content": "x is 3"}]


def says(text: str) -> list[dict[str, str]]:
    return [ASK, {"role": "assistant", "content": text}]


CONVERSATIONS = {
    "one turn": [ASK, ANSWER],
    "two turns": [ASK, ANSWER, *MORE],
    "system": [SYSTEM, ASK, ANSWER, *MORE],
    "tool": [SYSTEM, ASK, *TOOL, ANSWER, *MORE],
    "starts": [ANSWER, *MORE],
    "twice": [ASK, ANSWER, ANSWER],
    "unanswered": [ASK, ANSWER, ASK],
    "unicode": [*says("Grüße, 👩‍👩‍👧 naïve e\u0301 日本語 – ½"), *MORE],
    "template's own words": [
        *says("Say <|im_end|>\n<|im_start|>user\n[/INST] </s> <|eot_id|> <end_of_turn>\nand so"),
        *MORE,
    ],
    "spaces": [*says("\n\n    def f():\n        return 1\n\n"), *MORE],
    "leading space": [*says(" indeed"), *MORE],
    "long": [{"role": "user", "content": "word " * 40}, *says("answer " * 40)[1:], *MORE],
}


@cache
def vocabulary(merges: bool) -> str:
    """A byte-level BPE, as JSON; its merges join words, spaces and line ends."""
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.NFC()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    lines = [f"assistant\n\n\n\n    Hi. {number} user\n\nHello? answer " for number in range(40)]
    words.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=400 if merges else 258,
            max_token_length=4,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<pad>", "<s>"],
            show_progress=False,
        ),
    )
    return words.to_str()


@cache
def speaker(
    family: Family, template: str | None = None, merges: bool = True
) -> PreTrainedTokenizerBase:
    """A tokenizer of a family: its special tokens, most of which have no name, and its template."""
    words = Tokenizer.from_str(vocabulary(merges))
    words.add_special_tokens(list(family.special))
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": family.special[-1]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    tokenizer.chat_template = template or family.source
    return tokenizer


def rows(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], max_length: int = 4000
) -> list[dict[str, list[int]]]:
    examples = from_rows([("line 7", {"messages": messages})], "chats.jsonl")
    return list(tokenize(examples, tokenizer, max_length=max_length))


def runs(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    groups = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in group]) for is_learned, group in groups if is_learned]


def learned_runs(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return runs(row["input_ids"], [label != IGNORED for label in row["labels"]], tokenizer)


def expected(family: Family, messages: list[dict[str, str]]) -> list[str]:
    texts = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    answers = [family.answer.replace("{}", family.trims(text)) for text in texts]
    return [unicodedata.normalize("NFC", answer) for answer in answers]


def is_taken(family: Family, name: str) -> bool:
    """Whether the template accepts a conversation of `CONVERSATIONS`."""
    if name == "tool":
        return family.tool
    return (family.system or name != "system") and (family.free or name not in ("starts", "twice"))


CASES = [
    pytest.param(family, conversation, id=f"{family}-{conversation}")
    for family in FAMILIES
    for conversation in CONVERSATIONS
    if is_taken(FAMILIES[family], conversation)
]


@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_exactly_what_the_assistant_says_is_learned(name: str, conversation: str) -> None:
    """Its text and the token that ends its turn, whole: nothing before it and nothing after."""
    family, messages = FAMILIES[name], CONVERSATIONS[conversation]
    tokenizer = speaker(family)
    found = rows(tokenizer, messages)
    answers = expected(family, messages)
    assert [run for row in found for run in learned_runs(row, tokenizer)] == answers
    assert all(
        label in (token, IGNORED)
        for row in found
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    if family.one_row:
        assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "conversation"),
    # DeepSeek's generation prompt opens thoughts, which finished answers lack.
    [
        case
        for case in CASES
        if case.values[0] != "deepseek_r1_distill" and case.values[1] != "starts"
    ],
)
def test_what_comes_before_an_answer_is_tokenised_as_at_generation(
    name: str, conversation: str
) -> None:
    family, messages = FAMILIES[name], CONVERSATIONS[conversation]
    tokenizer = speaker(family)
    first = next(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
    row = rows(tokenizer, messages)[0]
    prompt = Chat(tokenizer).render(messages[:first], opening=True)
    start = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    assert row["input_ids"][:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_with_its_answer_is_a_conversation(name: str, system: str | None) -> None:
    tokenizer = speaker(FAMILIES[name])
    pair = from_rows([("line 7", {"prompt": "Hello? ", "completion": " Hi."})], "pairs.jsonl")
    asked = replace(pair, system=system)
    if system and not FAMILIES[name].system:
        with pytest.raises(UserError, match=r"pairs\.jsonl, line 7: .*refuses"):
            tokenize(asked, tokenizer)
        return
    found = list(tokenize(asked, tokenizer))
    before = [] if system is None else [SYSTEM]
    assert found == rows(tokenizer, [*before, ASK, ANSWER])
    start = next(i for i, label in enumerate(found[0]["labels"]) if label != IGNORED)
    if name != "deepseek_r1_distill":  # whose generation prompt opens thoughts
        prompt = opened(tokenizer, "Hello? ", system)
        assert found[0]["input_ids"][:start] == encode(tokenizer, [prompt], rendered=True)[0]
    plain = list(tokenize(replace(pair, chat_template="off"), tokenizer))
    assert tokenizer.decode(plain[0]["input_ids"]).removeprefix("<s>").startswith("Hello?  Hi.")


def test_without_a_template_pairs_stay_and_no_system_prompt_is_said() -> None:
    tokenizer = speaker(FAMILIES["qwen2_5"])
    pair = from_rows([("line 7", {"prompt": "Hello?", "completion": " Hi."})], "pairs.jsonl")
    off = list(tokenize(replace(pair, chat_template="off"), tokenizer))
    with pytest.raises(UserError, match="a system prompt needs a chat template"):
        tokenize(replace(pair, chat_template="off", system="Be brief."), tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    assert list(tokenize(pair, tokenizer)) == off


MARKED = [name for name in FAMILIES if (TEMPLATES / f"{name}_training.jinja").is_file()]


def marks(name: str) -> str:
    """TRL's template of a family with {% generation %} marks."""
    return (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MARKED)
def test_the_marks_of_another_librarys_templates_say_the_same(name: str) -> None:
    """TRL's {% generation %} marks, but for the line ends around a turn and DeepSeek's header."""
    family = FAMILIES[name]
    for conversation in CONVERSATIONS:
        if not is_taken(family, conversation):
            continue
        messages = CONVERSATIONS[conversation]
        # Every byte a token: marks inside a merged token would include what stands before them.
        tokenizer = speaker(family, merges=False)
        ours = [run for row in rows(tokenizer, messages) for run in learned_runs(row, tokenizer)]
        theirs = tokenizer.apply_chat_template(
            messages,
            chat_template=marks(name),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        found = runs(theirs["input_ids"], [bool(m) for m in theirs["assistant_masks"]], tokenizer)
        # Phi-3's last mark includes what ends the text; answers in a row are one run.
        said = "".join(run.strip().removesuffix("\n<|endoftext|>") for run in found)
        said = said.replace("<｜Assistant｜>", "")
        assert "".join(said.split()) == "".join("".join(ours).split()), conversation


@pytest.mark.parametrize(
    ("name", "template"),
    [
        *((name, FAMILIES[name].source) for name in FAMILIES),
        *((name, marks(name)) for name in MARKED),
    ],
)
def test_of_a_prompt_and_completion_as_turns_exactly_the_completion_is_learned(
    name: str, template: str
) -> None:
    messages = CONVERSATIONS["two turns"]
    tokenizer = speaker(FAMILIES[name], template, merges=False)
    row = {"prompt": messages[:3], "completion": messages[3:]}
    [found] = tokenize(from_rows([("line 7", row)], "chats.jsonl"), tokenizer, max_length=4000)
    whole = rows(tokenizer, messages)[-1]
    assert found["input_ids"] == whole["input_ids"]
    assert learned_runs(found, tokenizer) == learned_runs(whole, tokenizer)[-1:]
    start = next(i for i, label in enumerate(found["labels"]) if label != IGNORED)
    assert found["labels"][start:] == whole["labels"][start:]
    assert "Hi." not in tokenizer.decode(found["input_ids"][start:])


def test_there_are_marks_of_the_usual_families() -> None:
    assert {"qwen2_5", "qwen3", "llama3", "gemma", "gemma3", "phi3"} <= set(MARKED)


@pytest.mark.filterwarnings("ignore:.*do not fit max_length=.* with their prompts alone")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_conversation_learns_the_beginning_of_what_fits(name: str) -> None:
    tokenizer, messages = speaker(FAMILIES[name]), CONVERSATIONS["two turns"]
    whole = rows(tokenizer, messages)[0]
    length = len(whole["input_ids"])
    last = max(i for i, label in enumerate(whole["labels"]) if label != IGNORED)
    with pytest.warns(UserWarning, match="the ends of their answers are cut off"):
        cut = rows(tokenizer, messages, max_length=last)[0]
    assert cut["input_ids"] == whole["input_ids"][:last]
    assert cut["labels"] == whole["labels"][:last]
    assert last < length


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "mistral"])
def test_packed_conversations_keep_their_labels(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = speaker(family)
    chats = [CONVERSATIONS[chat] for chat in ("one turn", "two turns", "unicode", "spaces")]
    examples = from_rows(
        [(f"line {n}", {"messages": chat}) for n, chat in enumerate(chats)], "chats.jsonl"
    )
    together = list(tokenize(examples, tokenizer, max_length=400, pack=True))
    assert any(len(row["lengths"]) > 1 for row in together)
    found = [run for row in together for run in learned_runs(row, tokenizer)]
    assert sorted(found) == sorted(answer for chat in chats for answer in expected(family, chat))


# ---- what a template refuses or leaves out -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("gemma", "system", "System role not supported"),
        ("mistral", "twice", "roles must take turns"),
        ("mistral", "starts", "roles must take turns"),
    ],
)
def test_a_refused_conversation_is_named_by_its_line(
    name: str, conversation: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "chats.jsonl"
    lines = [[ASK, ANSWER], CONVERSATIONS[conversation]]
    file.write_text("\n\n".join(json.dumps({"messages": line}) for line in lines))
    with pytest.raises(UserError, match=message) as error:
        tokenize(load_examples(file), speaker(FAMILIES[name]))
    assert str(error.value).startswith(f"{file}, line 3: the tokenizer's chat template refuses")
    marked = speaker(FAMILIES[name], FAMILIES[name].source + "{% generation %}{% endgeneration %}")
    with pytest.raises(UserError, match=f"line 3: .*{message}"):
        tokenize(load_examples(file), marked)


def test_refused_conversations_are_told_all_at_once() -> None:
    chats = [[ASK, ANSWER], *[CONVERSATIONS["system"]] * 5]
    places = [f"chats.jsonl, line {n}" for n in range(1, 7)]
    refused = (
        "the tokenizer's chat template refuses this conversation: System role not supported; "
        "change its turns, or give the tokenizer another template"
    )
    family = FAMILIES["gemma"]
    marked = family.source + "{% generation %}{% endgeneration %}"
    for chat in (Chat(speaker(family)), Chat(speaker(family, marked))):
        for look in (chat.tokens, chat.check):
            with pytest.raises(UserError) as error:
                look(chats, places)
            told = "".join(f"chats.jsonl, line {n}: {refused}; " for n in (2, 3, 4))
            assert str(error.value) == f"{told}and 2 more"


def test_a_refused_conversation_is_found_before_any_weight_is_loaded(
    tmp_path: Path, tiny_base: Path, tiny_recipe: dict[str, Any]
) -> None:
    base, file = tmp_path / "base", tmp_path / "chats.jsonl"
    shutil.copytree(tiny_base, base)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = FAMILIES["gemma"].source
    tokenizer.save_pretrained(base)
    for path in base.glob("*.safetensors"):
        path.write_bytes(b"no weights")
    lines = [[ASK, ANSWER], [ASK, ANSWER, *MORE], CONVERSATIONS["system"]]
    file.write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    found = check(
        Recipe.parse(
            tiny_recipe, {"base": str(base), "data.train": str(file), "data.max_length": 128}
        )
    )
    assert len(found) == 1
    assert found[0].startswith(f"data.train: {file}, line 3: the tokenizer's chat template refuses")


def test_a_template_that_wants_parts_instead_of_texts_is_refused() -> None:
    family = Family("idefics3", ("<end_of_utterance>",), "")
    with pytest.raises(UserError, match=r"chats.jsonl, line 7, turn 2: .* does not show what"):
        rows(speaker(family), [ASK, ANSWER])


def test_what_a_template_leaves_out_is_said() -> None:
    thoughts = says("<think>\nHm.\n</think>\n\nHi.")
    tokenizer = speaker(FAMILIES["deepseek_r1_distill"])
    with pytest.warns(UserWarning, match="leaves out parts of 1 of 1 conversations"):
        found = rows(tokenizer, thoughts)
    assert learned_runs(found[0], tokenizer) == ["\n\nHi.<｜end▁of▁sentence｜>"]
    late = speaker(FAMILIES["mistral"], MISTRAL_LATE)
    with pytest.warns(UserWarning, match="such as thoughts or a system prompt"):
        found = rows(late, CONVERSATIONS["system"])
    assert learned_runs(found[0], late) == expected(FAMILIES["mistral"], CONVERSATIONS["system"])


def test_thoughts_that_a_template_shows_are_learned() -> None:
    family = FAMILIES["qwen3"]
    tokenizer = speaker(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rows(tokenizer, [*says("<think>\nHm.\n</think>\n\nHi."), *MORE])
    assert [learned_runs(row, tokenizer) for row in found] == [
        ["<think>\nHm.\n</think>\n\nHi.<|im_end|>"],
        [THOUGHTS + "Ciao, 1 2 3!<|im_end|>"],
    ]
    assert "Hm." not in tokenizer.decode(found[1]["input_ids"])


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_a_template_is_always_told_the_same_day(name: str) -> None:
    family = Family(name, LLAMA_3, "")
    text: Any = Chat(speaker(family)).render([ASK])
    shown = TODAY.strftime("%d %b %Y" if name == "llama3_2" else "%Y-%m-%d")
    assert shown in text
