"""Reading examples from files, and turning them into tokens and labels."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forgetless.core.errors import UserError
from forgetless.data.chat import PLAIN_CHAT_TEMPLATE
from forgetless.data.examples import Examples, from_rows, load_examples
from forgetless.data.packing import IGNORED
from forgetless.data.texts import read_examples
from forgetless.data.tokens import tokenize
from forgetless.tasks import make_task
from tests.tiny import tokenizer

PAIRS = [
    {"prompt": "One and one?", "completion": " Two."},
    {"prompt": "Größe von π?", "completion": " 3,14"},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


def byte_tokenizer(bos: bool = False, add_eos: bool = False) -> PreTrainedTokenizerBase:
    """One token a byte, so that token counts are text lengths."""
    special = ["<pad>", "<s>", "</s>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> " * bos + "$A" + " </s>" * add_eos,
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|end|>"],
    )


def examples(*rows: dict[str, Any]) -> Examples:
    return from_rows([(f"row {n}", row) for n, row in enumerate(rows, start=1)], "test")


def learned(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    """The text of the tokens that count in the loss."""
    text: str = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    return text


# ---- files ---------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    (path / "data.json").write_text(json.dumps(rows, indent=1))
    return path / "data.json"


def write_lines_named_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(path, rows).rename(path / "lines.json")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with (path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path / "data.csv"


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path / "data.parquet")
    return path / "data.parquet"


def write_folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path / "folder"))
    return path / "folder"


def write_split_folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    train = datasets.Dataset.from_list(rows)
    splits = datasets.DatasetDict({"test": train.select([0]), "train": train})
    splits.save_to_disk(str(path / "splits"))
    return path / "splits"


WRITERS = [
    write_jsonl,
    write_json,
    write_lines_named_json,
    write_csv,
    write_parquet,
    write_folder,
    write_split_folder,
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_file_type_gives_the_same_examples(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    loaded = load_examples(write(tmp_path, PAIRS))
    assert list(loaded) == PAIRS
    assert loaded.kind == "prompt_completion"
    assert loaded.fingerprint == examples(*PAIRS).fingerprint
    assert len(load_examples(write(tmp_path, PAIRS), limit=1)) == 1


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Chapter 1\n\nIt was.\n")
    assert list(load_examples(tmp_path / "book.txt")) == [{"text": "Chapter 1\n\nIt was.\n"}]


def test_the_fingerprint_is_of_the_content() -> None:
    assert examples(*PAIRS).fingerprint != examples(*reversed(PAIRS)).fingerprint
    assert examples(*PAIRS).fingerprint == examples(*[row | {"id": 7} for row in PAIRS]).fingerprint


def test_pocket_problems() -> None:
    train = load_examples("pocket:problems", limit=20)
    test = load_examples("pocket:problems:test", limit=20)
    assert train.kind == "prompt_completion"
    assert len(train) == len(test) == 20
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_gsm8k_is_read_in_a_moment(shared_data: Path) -> None:
    loaded = load_examples(shared_data / "gsm8k" / "train.jsonl")
    assert len(loaded) == 7473
    assert loaded.records[0]["completion"].endswith("#### 72")


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "p", "response": "c"}, "p", "c"),
        ({"question": "p", "answer": "c"}, "p\n", "c"),
        ({"query": "p", "response": "c", "type": "x"}, "p\n", "c"),
        ({"problem": "p", "solution": "c", "level": 3}, "p\n", "c"),
        ({"instruction": "p", "output": "c"}, "p\n", "c"),
        ({"instruction": "p", "input": "", "response": "c"}, "p\n", "c"),
        ({"instruction": "p", "input": "i", "output": "c", "text": "all"}, "p\n\ni\n", "c"),
    ],
)
def test_common_forms(row: dict[str, Any], prompt: str, completion: str) -> None:
    assert list(examples(row)) == [{"prompt": prompt, "completion": completion}]


def sharegpt(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(t["role"], t["role"]), "value": t["content"]} for t in turns]


def parts(turns: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each content as two parts."""
    return [
        {"role": t["role"], "content": [text_part(t["content"][:1]), text_part(t["content"][1:])]}
        for t in turns
    ]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": parts(CHAT)},
        {"messages": CHAT[1:], "system": "Be brief."},
        {"messages": CHAT, "system": "Be brief."},
        {"messages": [{**turn, "weight": 1, "name": "x"} for turn in CHAT]},
        {"conversations": sharegpt(CHAT)},
        {"conversations": sharegpt(CHAT), "system": ""},
        {"conversations": sharegpt(CHAT[1:]), "system": "Be brief."},
        {"conversations": CHAT, "id": 7},
        {"conversations": [{"from": t["role"], "value": t["content"]} for t in CHAT]},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"prompt": CHAT[1:2], "completion": parts(CHAT[2:]), "system": "Be brief."},
    ],
)
def test_common_forms_of_a_conversation(row: dict[str, Any], tmp_path: Path) -> None:
    assert examples(row).kind == "messages"
    assert list(examples(row)) == [{"messages": CHAT}]
    assert list(load_examples(write_parquet(tmp_path, [row]))) == [{"messages": CHAT}]


@pytest.mark.filterwarnings("ignore:.*'question' of 1 rows not read")
def test_calibration_reads_every_form_of_a_conversation(tmp_path: Path) -> None:
    usual = read_examples(write_jsonl(tmp_path, [{"messages": CHAT}])).fingerprint
    for row in (
        {"conversations": sharegpt(CHAT)},
        {"conversations": sharegpt(CHAT), "question": "?"},
        {"messages": parts(CHAT)},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
    ):
        assert read_examples(write_jsonl(tmp_path, [row])).fingerprint == usual


def test_records_become_a_dataset() -> None:
    assert examples(*PAIRS).dataset().to_list() == PAIRS


# ---- mistakes ------------------------------------------------------------------------------------

GOOD = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (GOOD + '{"question": ', r"line 2: no valid JSON .* column 14"),
        (GOOD + '{"question": "q",\n' + GOOD, r"line 2: no valid JSON .* column 18"),
        (GOOD + '{"question": "q\n', r"line 2: .* \(Unterminated string starting at column 14\)"),
        (GOOD + "[1]", "line 2: expected an object with keys, got list"),
        (
            '{"frage": "q", "text_": "a"}',
            "has the keys 'frage', 'text_'; expected one of: messages",
        ),
        (GOOD + '{"text": "t"}', "line 2: has the keys 'text', but .* question [+] answer"),
        (GOOD + '{"question": "q", "answer": NaN}', "line 2: 'answer' must be text, got float nan"),
        (GOOD + '{"question": "q", "answer": null}', r"line 2: 'answer' must .* nothing \(null\)"),
        ('{"question": "q", "answer": 18}', "line 1: 'answer' must be text, got int 18"),
        ('{"question": "q", "answer": ["a"]}', "line 1: 'answer' must be text, got list"),
        (GOOD + '{"question": " ", "answer": "a"}', "line 2: 'question' is empty"),
        (GOOD + '{"a": ' + "[" * 10**5, r"line 2: no valid JSON \(nested too deep\); every line"),
        (GOOD + '{"a": ' + "9" * 5000 + "}", r"line 2: no valid JSON \(.*4300 digits\); every"),
        ('{"instruction": "i", "input": 3, "output": "o"}', "'input' must be text, got int 3"),
        ('{"messages": []}', "'messages' must be a list of turns"),
        ('{"messages": "hello"}', "'messages' must be a list of turns, got str 'hello'"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "turn 1: .* system, user, assistant"),
        ('{"messages": [{"role": "assistant"}]}', "turn 1: 'content' must be text"),
        (
            '{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]}',
            "turn 1: 'tool_calls' are not read",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
        (
            '{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}',
            "line 1: no turn of the assistant",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}',
            "turn 1: 'weight' must be 1, or 0 for a turn that is not learned, got float 0.5",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
            "line 1, turn 1: 'content' has a part of type 'image_url'; only parts of type 'text'",
        ),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "turn 1: .* part of type 'str'"),
        ('{"messages": [{"role": "user", "content": []}]}', "turn 1: 'content' is empty"),
        ('{"conversations": "x"}', "'conversations' must be a list of turns, got str 'x'"),
        (
            '{"conversations": [{"from": "bot", "value": "x"}]}',
            "turn 1 of 'conversations': .* 'value' and a 'from' of .* assistant, tool, human, gpt",
        ),
        ('{"conversations": [{"from": "gpt", "value": 3}]}', "'value' must be text, got int 3"),
        (
            '{"conversations": [{"from": "system", "value": "x"}], "system": "y"}',
            "line 1: 'system' is not what the first turn says; leave one of them out",
        ),
        (
            '{"prompt": [{"role": "user", "content": "x"}], "completion": ["x"]}',
            "line 1, turn 1 of 'completion': must be an object .* got str 'x'",
        ),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}],'
            ' "completion": [{"role": "user", "content": "x"}]}',
            "line 1: no turn of the assistant",
        ),
        ('{"prompt": [{"role": "user"}], "completion": "x"}', "'prompt' must be text, got list"),
        ("\x00\udcff", "not UTF-8"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        load_examples(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "head", "bad", "message"),
    [
        (
            "data.jsonl",
            GOOD,
            '{"question": " ", "answer": "a"}\n',
            ": 1,000 bad rows: line 2: 'question' is empty; give it text or leave the row out; "
            "line 3: 'question' is empty; give it text or leave the row out; "
            "line 4: 'question' is empty; give it text or leave the row out; and 997 more",
        ),
        (
            "data.jsonl",
            GOOD,
            "[1]\n",
            ": 1,000 bad rows: line 2: expected an object with keys, got list [1]; "
            "line 3: expected an object with keys, got list [1]; "
            "line 4: expected an object with keys, got list [1]; and 997 more",
        ),
        (
            "data.jsonl",
            GOOD,
            "{\n",
            ": 1,000 bad rows: "
            + "; ".join(
                f"line {n}: no valid JSON (Expecting property name enclosed in double quotes at "
                "column 2); every line must be one JSON object"
                for n in (2, 3, 4)
            )
            + "; and 997 more",
        ),
        (
            "data.csv",
            "question,answer\n",
            "q,a,b\n",
            ": 1,000 bad rows: row 1: has more cells than the header; "
            "row 2: has more cells than the header; row 3: has more cells than the header; "
            "and 997 more",
        ),
    ],
)
def test_bad_rows_are_told_all_at_once(
    name: str, head: str, bad: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(head + bad * 1000)
    with pytest.raises(UserError) as error:
        load_examples(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}{message}"


def test_bad_rows_of_several_kinds_are_told_together() -> None:
    whole: dict[str, Any] = {"messages": CHAT}
    bad: list[dict[str, Any]] = [
        {"messages": CHAT[:2]},
        {"text": "t"},
        {"messages": [{"role": "user"}]},
    ]
    with pytest.raises(UserError) as error:
        examples(whole, bad[0], whole, bad[1], bad[2])
    assert str(error.value) == (
        "test: 3 bad rows: row 2: no turn of the assistant, so there is nothing to learn; "
        "row 4: has the keys 'text', but the first row has the form messages; all rows of a file "
        "need the same form; row 5, turn 1: 'content' must be text, got nothing (null)"
    )


def test_mistakes_beyond_the_limit_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(GOOD * 2 + "{\n" + '{"question": ""}')
    assert len(load_examples(tmp_path / "data.jsonl", limit=2)) == 2


def test_mistakes_in_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.jsonl; give a file of"):
        load_examples(tmp_path / "none.jsonl")
    (tmp_path / "data.docx").write_text("x")
    with pytest.raises(ValueError, match=r"unknown file type '\.docx'; give \.jsonl, \.json"):
        load_examples(tmp_path / "data.docx")
    with pytest.raises(ValueError, match="holds no data set"):
        load_examples(tmp_path)
    (tmp_path / "data.json").write_text('[\n{"text": "a"},\n{"text"}]')
    with pytest.raises(ValueError, match=r"line 3: no valid JSON .* column 8\); it must be one"):
        load_examples(tmp_path / "data.json")
    (tmp_path / "data.json").write_text('[\n{"text": "a"},\n')
    with pytest.raises(ValueError, match=r"line 2: no valid JSON .* column 15"):
        load_examples(tmp_path / "data.json")
    (tmp_path / "data.json").write_text('{\n  "data": [\n    {"text": "a"}\n  ]\n}')
    with pytest.raises(
        ValueError, match=r"data\.json holds one object, with the key 'data'; a lis"
    ):
        load_examples(tmp_path / "data.json")
    (tmp_path / "data.csv").write_text("question,answer\nq,a\nq\n")
    with pytest.raises(ValueError, match="row 2: 'answer' must be text"):
        load_examples(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("question,answer\nq,a,b\n")
    with pytest.raises(ValueError, match="row 1: has more cells than the header"):
        load_examples(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("question,answer,answer\nq,a,b\n")
    with pytest.raises(ValueError, match=r"data\.csv has two columns 'answer'; leave one of them"):
        load_examples(tmp_path / "data.csv")
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="no valid parquet"):
        load_examples(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="give 'pocket:problems', 'pocket:functions'"):
        load_examples("pocket:problems:dev")
    with pytest.raises(ValueError, match="limit must be 1 or more, got 0"):
        load_examples("pocket:problems", limit=0)


def test_a_folder_of_splits_needs_one_to_train_on(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict({"a": one, "b": one}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="has the splits a, b and none is called 'train'"):
        load_examples(tmp_path / "splits")
    assert len(load_examples(tmp_path / "splits" / "b")) == 2


# ---- prompts and completions ---------------------------------------------------------------------


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_only_the_completion_and_one_eos_are_learned(bos: bool, add_eos: bool) -> None:
    tokenizer = byte_tokenizer(bos, add_eos)
    rows = tokenize(examples(*PAIRS), tokenizer, max_length=64)
    for row, pair in zip(rows, PAIRS, strict=True):
        text = "<s>" * bos + pair["prompt"] + pair["completion"] + "</s>"
        assert tokenizer.decode(row["input_ids"]) == text
        assert learned(tokenizer, row) == pair["completion"] + "</s>"
        assert len(row["labels"]) == len(row["input_ids"])


def test_the_prompt_is_tokenised_as_it_will_be_at_generation() -> None:
    """Where the tokenizer would merge prompt and completion, the prompt's own tokens stay."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.BPE(vocab={"</s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")])
        ),
        eos_token="</s>",
    )
    rows = tokenize(
        examples({"prompt": "a", "completion": "b"}, {"prompt": "ab", "completion": "ab"}),
        tokenizer,
    )
    assert rows["input_ids"][:] == [[1, 2, 0], [3, 3, 0]]
    assert rows["labels"][:] == [[IGNORED, 2, 0], [IGNORED, 3, 0]]


def test_truncation_keeps_the_beginning_of_the_answer() -> None:
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "12345", "completion": "678"},
        {"prompt": "12345678", "completion": "9"},
        {"prompt": "1", "completion": "2"},
    ]
    with pytest.warns(UserWarning, match="1 of 3 examples do not fit max_length=7") as said:
        tokenized = tokenize(examples(*rows), tokenizer, max_length=7)
    left_out, cut_off = (str(warning.message) for warning in said)
    assert left_out.endswith("with their prompts alone and are left out: test, row 2")
    assert cut_off.endswith("; the ends of their answers are cut off and not learned")
    assert [learned(tokenizer, row) for row in tokenized] == ["67", "2</s>"]
    with (
        pytest.warns(UserWarning, match="3 of 3"),
        pytest.raises(ValueError, match=r"no example has a token to learn .*max_length=2"),
    ):
        tokenize(examples(*[row | {"prompt": "1234"} for row in rows]), tokenizer, max_length=2)


def test_nothing_is_said_when_nothing_is_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(examples(*PAIRS), byte_tokenizer(), max_length=64)


# ---- raw text ------------------------------------------------------------------------------------


def test_raw_text_is_packed_into_blocks_with_eos_between_documents() -> None:
    tokenizer = byte_tokenizer()
    rows = tokenize(examples({"text": "abcde"}, {"text": "fg"}), tokenizer, max_length=4)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcd", "e</s>fg"]
    assert rows["lengths"][:] == [[4], [2, 2]]  # the last block, a lone </s>, is dropped
    assert [learned(tokenizer, row) for row in rows] == ["bcd", "</s>g"]


def test_answers_are_packed_whole() -> None:
    tokenizer = byte_tokenizer()
    pairs = [{"prompt": "ab", "completion": "c" * n} for n in (1, 5, 2, 3)]
    rows = tokenize(examples(*pairs), tokenizer, max_length=10, pack=True)
    assert sorted(map(sorted, rows["lengths"])) == [[4, 6], [5], [8]]
    assert sorted(learned(tokenizer, row) for row in rows) == [
        "cc</s>",
        "ccc</s>c</s>",
        "ccccc</s>",
    ]


def test_unpacked_text_is_cut_but_not_joined() -> None:
    tokenizer = byte_tokenizer()
    documents = examples({"text": "abcde"}, {"text": "fg"})
    rows = tokenize(documents, tokenizer, max_length=4, pack=False)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcd", "e</s>", "fg</s>"]
    assert [row["labels"] for row in rows] == [[IGNORED, *r["input_ids"][1:]] for r in rows]


def test_a_length_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="max_length must be 2 or more, got 1"):
        tokenize(examples(*PAIRS), byte_tokenizer(), max_length=1)


# ---- conversations -------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
FORGETS_THOUGHTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}",
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def conversation(
    template: str | None, bos: bool = False, row: dict[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Whole text and learned text of every row that one conversation gives."""
    tokenizer = byte_tokenizer(bos)
    tokenizer.chat_template = template
    rows = tokenize(examples(row or {"messages": CHAT}), tokenizer)
    return [(tokenizer.decode(row["input_ids"]), learned(tokenizer, row)) for row in rows]


def test_only_the_assistants_turns_are_learned() -> None:
    [(text, answers)] = conversation(CHATML)
    assert text.startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\nHello<|end|>\n")
    assert answers == "Hi<|end|>Ciao<|end|>"


def test_a_template_that_rewrites_history_gives_a_row_a_turn() -> None:
    first, second = conversation(FORGETS_THOUGHTS)
    assert first[1] == "<think></think>Hi<|end|>"
    assert second[1] == "<think></think>Ciao<|end|>"
    assert "assistant\nHi<|end|>" in second[0]


def test_marks_of_the_template_are_taken() -> None:
    assert conversation(MARKED) == [
        (
            "[system]Be brief.[user]Hello[assistant]Hi</s>[user]Bye[assistant]Ciao</s>",
            "Hi</s>Ciao</s>",
        )
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED, None])
def test_of_a_prompts_turns_none_is_learned(template: str | None) -> None:
    """All of the conversation is shown; the labels are those of its last answer alone."""
    [(text, answers)] = conversation(template)
    prompted = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    first, last = answers[: answers.index("Ciao")].rstrip(" "), "Ciao"
    [(shown, learned_of_it)] = conversation(template, row=prompted)
    assert (shown, learned_of_it) == (text, answers.removeprefix(first))
    assert last in learned_of_it
    assert "Hi" not in learned_of_it
    weighed = {"messages": [CHAT[0], CHAT[1], {**CHAT[2], "weight": 0}, CHAT[3], CHAT[4]]}
    assert conversation(template, row=weighed) == [(shown, learned_of_it)]
    second = {"messages": [*CHAT[:4], {**CHAT[4], "weight": 0}]}
    assert conversation(template, row=second) == [(text, first)]


def test_a_prompts_answers_give_no_rows_where_the_template_rewrites_history() -> None:
    [(text, answers)] = conversation(
        FORGETS_THOUGHTS, row={"prompt": CHAT[:4], "completion": CHAT[4:]}
    )
    assert answers == "<think></think>Ciao<|end|>"
    assert "assistant\nHi<|end|>" in text


def test_marks_that_change_with_the_conversation_cannot_leave_a_turn_out() -> None:
    fickle = MARKED.replace("{{ m['content'] }}</s>", "{{ m['content'] }}{{ loop.length }}</s>")
    with pytest.raises(
        UserError, match=r"test, row 1, turn 3: .* its 'weight' of 0 cannot be kept"
    ):
        conversation(fickle, row={"prompt": CHAT[:4], "completion": CHAT[4:]})


@pytest.mark.parametrize("bos", [False, True])
def test_a_plain_template_stands_in_where_there_is_none(bos: bool) -> None:
    [(text, answers)] = conversation(None, bos)
    assert text == "<s>" * bos + (
        "Be brief.\n\nUser: Hello\nAssistant: Hi</s>\nUser: Bye\nAssistant: Ciao</s>\n"
    )
    assert answers == " Hi</s> Ciao</s>"
    assert conversation(PLAIN_CHAT_TEMPLATE)[0][1] == answers


def test_a_template_that_does_not_continue_its_own_generation_prompt() -> None:
    [(_, answers)] = conversation(CHATML.replace("<|start|>assistant\n", "<|go|>"))
    assert answers == "Hi<|end|>Ciao<|end|>"


def test_long_conversations_are_cut() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = MARKED
    with pytest.warns(UserWarning, match="the ends of their answers are cut off"):
        rows = tokenize(examples({"messages": CHAT}), tokenizer, max_length=42)
    assert learned(tokenizer, rows[0]) == "Hi</s>"


# ---------------------------------------------------------------- what other tools would read

USER, YES = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "BAD"}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_turn_is_left_out_in_the_words_of_every_tool(mark: dict[str, Any]) -> None:
    turns = [USER, {**BAD, **mark}, USER, {**YES, **dict.fromkeys(mark, True)}]
    loaded = from_rows([("line 1", {"messages": turns})], "x")
    assert [turn.get("weight") for turn in loaded.records[0]["messages"]] == [None, 0, None, None]
    with pytest.raises(UserError, match=f"turn 2: '{next(iter(mark))}' must be 1, or 0"):
        from_rows([("line 1", {"messages": [USER, {**BAD, next(iter(mark)): "no"}, YES]})], "x")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_beside_the_content_go_to_the_template(key: str) -> None:
    speaker = tokenizer()
    speaker.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{% if m.KEY %}({{ m.KEY }}) {% endif %}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ).replace("KEY", key)
    examples = from_rows([("line 1", {"messages": [USER, {**YES, key: "It is autumn."}]})], "x")
    row = tokenize(examples, speaker, max_length=200)[0]
    learned = speaker.decode([label for label in row["labels"] if label != IGNORED])
    assert learned == "(It is autumn.) Yes.</s>"
    speaker.chat_template = speaker.chat_template.replace(key, "unknown")
    with pytest.warns(UserWarning, match="leaves out parts of 1 of 1 conversations, such as thou"):
        tokenize(examples, speaker, max_length=200)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [USER, YES], "tools": [{"name": "weather"}]}, ["'tools' of 2 rows"]),
        ({"messages": [USER, YES], "functions": [1], "documents": ["a"]}, ["documents", "func"]),
        ({"messages": [USER, {**YES, "audio": "a.wav"}]}, ["'audio'"]),
        ({"conversations": [USER, {**YES, "images": ["a.png"]}]}, ["'images'"]),
        ({"instruction": "Say hi", "output": "hi", "system": "Be a pirate"}, ["'system'"]),
        ({"instruction": "Again", "output": "hi", "history": [["a", "b"]]}, ["'history'"]),
        ({"instruction": "What?", "context": "A red hat.", "response": "red"}, ["'context'"]),
        ({"context": "A red hat.", "question": "What?", "answer": "red"}, ["'context'"]),
        ({"prompt": "What?", "input": "A red hat.", "completion": "red"}, ["'input'"]),
        ({"prompt": [USER], "completion": [YES], "tools": [1]}, ["'tools'"]),
        ({"prompt": "a", "completion": "b", "rejected": "c"}, ["'rejected'"]),
        ({"prompt": "a", "completion": "b", "train": False}, ["'train'"]),
        ({"prompt": "a", "completion": "b", "label": False}, ["'label'"]),
        ({"question": "a", "answer": "b", "rationale": "c", "choices": ["b"]}, ["'choices'", "ra"]),
        ({"messages": [USER, {**YES, "mask": True}]}, ["'mask'"]),
        ({"messages": [USER, YES], "loss_mask": [0, 1]}, ["'loss_mask'"]),
        ({"query": "a", "response": "b", "knowledge": "A red hat."}, ["'knowledge'"]),
    ],
)
def test_what_other_tools_would_show_is_named(row: dict[str, Any], named: list[str]) -> None:
    with pytest.warns(UserWarning, match="not read") as caught:
        from_rows([("line 1", row), ("line 2", row)], "x.jsonl")
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("x.jsonl: ")
    assert all(part in message for part in named)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {**YES, "id": 7}], "tools": [], "system": "Be kind.", "id": 3},
        {"instruction": "Say hi", "input": "now", "output": "hi", "history": [], "system": ""},
        {"question": "What?", "answer": "red", "category": "qa", "context": None},
        {"text": "A red hat.", "context": "of a book"},
        {
            "prompt": "a",
            "completion": "b",
            "train": True,
            "id": 0,
            "data_source": "x",
            "__i_id__": 1,
        },
        {"instruction": "a", "output": "b", "text": "### a b", "category": "qa", "urls": ["x"]},
        # How pandas writes its index, and reads it again.
        {"": 0, "Unnamed: 0": 0, "__index_level_0__": 0, "prompt": "a", "completion": "b"},
    ],
)
def test_nothing_is_said_of_what_changes_nothing(row: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_rows([("line 1", row)], "x")


def test_function_calls_are_refused_under_both_names() -> None:
    for key in ("tool_calls", "function_call"):
        with pytest.raises(UserError, match=f"turn 2: '{key}' are not read"):
            from_rows([("line 1", {"messages": [USER, {**YES, key: {"name": "f"}}]})], "x")


# ---------------------------------------------------------------- half characters

HALF = "half \ud83d of it"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": "a", "completion": HALF}, "completion"),
        ({"text": HALF}, "text"),
        ({"messages": [USER, {"role": "assistant", "content": HALF}]}, "messages.2.content"),
        ({"question": "a", "answer": "b", "choices": ["b", HALF]}, "choices.2"),
        ({"question": "a", "answer": [HALF]}, "answer.1"),
        ({"question": "a", "answer": 0, "choices": {"text": ["b", HALF]}}, "choices.text.2"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_half_a_character_is_named_by_row_and_key_in_every_reader(
    row: dict[str, Any], key: str, ending: str, tmp_path: Path
) -> None:
    good = {name: row[name] if name != key.split(".")[0] else "fine" for name in row}
    rows = [good, row]
    path = tmp_path / f"data.{ending}"
    text = "\n".join(map(json.dumps, rows)) if ending == "jsonl" else json.dumps(rows)
    assert "\\ud83d" in text
    path.write_text(text)
    place = "line 2" if ending == "jsonl" else "row 2"
    message = f"{place}: '{key}' holds half a character".replace(".", r"\.")
    readers: list[Callable[[], object]] = [
        lambda: load_examples(path),
        lambda: read_examples(path),
        *(
            lambda kind=kind: make_task({"kind": kind, "path": str(path)})
            for kind in ("perplexity", "kl", "generate", "multiple_choice")
        ),
    ]
    for read in readers:
        with pytest.raises(UserError, match=message):
            read()


def test_whole_characters_in_escapes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a smile \\ud83d\\ude00 and \\\\ud83d"}\n')
    assert load_examples(path).records[0]["text"] == "a smile 😀 and \\ud83d"
