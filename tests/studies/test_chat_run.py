"""A base with a chat template: prompts with answers are trained, measured and kept as a chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetless.cli.recipes import _say_check
from forgetless.data.modality import training_batches
from forgetless.data.texts import batches
from forgetless.models.load import load_model, load_tokenizer
from forgetless.recipes.checking import check
from forgetless.recipes.identity import run_id
from forgetless.recipes.recipe import Recipe
from forgetless.studies.folder import RunFolder
from forgetless.studies.run import run
from forgetless.studies.stages import Stages
from forgetless.tasks import make_task
from forgetless.training.forgetting import from_settings
from tests.tiny import recipe_of

pytest_plugins = ["tests.tiny_fixtures"]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def world(
    tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A chat model, and the same rows as prompts with answers and as conversations."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_base, folder / "base")
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    pairs = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(12)]
    turns = [
        [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["completion"]},
        ]
        for pair in pairs
    ]
    for name, rows in (("pairs", pairs), ("talks", [{"messages": each} for each in turns])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = [{"question": pair["prompt"], "answer": pair["completion"]} for pair in pairs]
    (folder / "asked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    return {
        "base": folder / "base",
        "plain": tiny_base,
        "files": tiny_files,
        **{name: folder / f"{name}.jsonl" for name in ("pairs", "talks", "asked")},
    }


def recipe(world: dict[str, Path], data: str = "pairs", **changes: Any) -> Recipe:
    given = {"data.train": str(world[data]), "tasks": {}, "training.steps": 2, **changes}
    base = changes.pop("base", world["base"])
    return Recipe.parse(recipe_of(base, world["files"])).override({**given, "base": str(base)})


def test_pairs_train_as_the_conversations_they_are(world: dict[str, Path], tmp_path: Path) -> None:
    def rows(asked: Recipe) -> str:
        return Stages(
            RunFolder(tmp_path / run_id(asked)), asked, lambda event: None
        ).rows.fingerprint

    assert check(recipe(world)) == []
    assert rows(recipe(world)) == rows(recipe(world, "talks"))
    off = recipe(world, **{"data.chat_template": "off"})
    assert rows(off) == rows(recipe(world, base=world["plain"])) != rows(recipe(world))
    system = recipe(world, **{"data.system": "Count."})
    assert len({rows(asked) for asked in (recipe(world), off, system)}) == 3
    assert len({run_id(asked) for asked in (recipe(world), off, system)}) == 3


def test_a_system_prompt_that_nothing_can_say_is_told_before(world: dict[str, Path]) -> None:
    off = {"data.chat_template": "off", "data.system": "Count."}
    for asked in (recipe(world, **off), recipe(world, base=world["plain"], **{"data.system": "x"})):
        (problem,) = check(asked)
        assert "data.train: a system prompt needs a chat template" in problem


def test_what_is_kept_and_the_new_task_are_read_by_the_template_too(
    world: dict[str, Path],
) -> None:
    model, tokenizer = load_model(str(world["base"])), load_tokenizer(str(world["base"]))
    found = [batches(str(world[data]), model, tokenizer) for data in ("pairs", "talks")]
    found += [training_batches(str(world[data]), model, tokenizer) for data in ("pairs", "talks")]
    for pairs, talks in (found[:2], found[2:]):
        assert all(
            torch.equal(ours[name], theirs[name])
            for ours, theirs in zip(pairs, talks, strict=True)
            for name in ours
        )
    (off,) = training_batches(
        str(world["pairs"]), model, tokenizer, batch_size=12, chat_template="off"
    )
    assert off["input_ids"].shape[1] < max(b["input_ids"].shape[1] for b in found[2])


def test_tasks_ask_by_the_template_unless_it_is_off(world: dict[str, Path]) -> None:
    model, tokenizer = load_model(str(world["base"])), load_tokenizer(str(world["base"]))
    plain = load_tokenizer(str(world["plain"]))

    def score(data: str, words: Any = tokenizer, **settings: Any) -> float:
        task = make_task({"path": str(world[data]), **settings})
        return task.evaluate(model, words, reference=load_model(str(world["plain"]))).value

    for kind in ("perplexity", "kl"):
        with_template = score("pairs", kind=kind)
        if kind == "perplexity":
            assert with_template == score("talks", kind=kind)
            assert with_template != score("pairs", plain, kind=kind)
        off = score("pairs", kind=kind, chat_template="off")
        assert off == score("pairs", plain, kind=kind)
        named = [
            make_task({"kind": kind, "path": str(world["pairs"]), **more})
            for more in ({}, {"chat_template": "off"}, {"system": "Count."})
        ]
        assert len({task.fingerprint for task in named}) == 3
    with pytest.raises(ValueError, match="chat_template"):
        make_task({"kind": "generate", "path": str(world["asked"]), "chat_template": "on"})


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, ("<s>u:Question: 0+0=\nAnswer:</s>a:", True)),
        ({"prompt": "{question}", "system": "Count."}, ("<s>s:Count.</s>u:0+0=</s>a:", True)),
        ({"chat_template": "off"}, ("Question: 0+0=\nAnswer:", False)),
    ],
)
def test_a_question_is_what_the_user_says(
    settings: dict[str, Any],
    first: tuple[str, bool],
    world: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, bool]] = []

    def generate(model: Any, tokenizer: Any, prompts: list[str], **how: Any) -> list[str]:
        asked.extend((prompt, how["rendered"]) for prompt in prompts)
        return ["0"] * len(prompts)

    monkeypatch.setattr("forgetless.tasks.generation.generate", generate)
    task = make_task({"kind": "generate", "path": str(world["asked"]), **settings})
    model, tokenizer = load_model(str(world["base"])), load_tokenizer(str(world["base"]))
    scores = [item.score for item in task.evaluate(model, tokenizer).items]
    assert scores == [1.0, *[0.0] * 11]
    assert asked[0] == first


def test_the_check_says_which_it_is(
    world: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _say_check("x.yaml", recipe(world))
    assert "by the tokenizer's chat template" in capsys.readouterr().out
    _say_check("x.yaml", recipe(world, **{"data.chat_template": "off"}))
    assert "as they are, no chat template" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, [("auto", None), ("off", None), ("auto", "Add.")]),
        ({"data.system": "Count."}, [("auto", "Count."), ("off", None), ("auto", "Add.")]),
        ({"data.chat_template": "off"}, [("off", None), ("off", None), ("auto", "Add.")]),
    ],
)
def test_tasks_and_probes_ask_as_the_data_is_trained(
    data: dict[str, Any],
    expected: list[tuple[str, str | None]],
    world: dict[str, Path],
    tmp_path: Path,
) -> None:
    own = [{}, {"chat_template": "off"}, {"chat_template": "auto", "system": "Add."}]
    specs = [
        {"kind": "generate", "path": str(world["asked"]), "name": f"asked_{number}", **more}
        for number, more in enumerate(own)
    ]
    changes: dict[str, Any] = {
        "tasks.learning": specs,
        "probes.learning": [str(world["pairs"]), *specs[1:]],
    }
    asked = recipe(world, **changes, **data)
    assert check(asked) == []
    stages = Stages(RunFolder(tmp_path / "run"), asked, lambda event: None)
    callback = from_settings(asked.probes, asked.data.said)
    assert callback is not None
    for found in ([task for task, _ in stages.tasks], list(callback.probes.learning.values())):
        assert [(task.chat_template, task.system) for task in found] == expected  # type: ignore[attr-defined]
    (held, *_) = callback.probes.learning.values()
    examples = held.examples  # type: ignore[attr-defined]
    assert (examples.chat_template, examples.system) == expected[0]


def test_the_log_and_the_card_say_by_which_template(world: dict[str, Path], tmp_path: Path) -> None:
    def said(name: str, **changes: Any) -> tuple[list[str], str]:
        told: list[str] = []
        done = run(
            recipe(world, **changes),
            tmp_path / name,
            evaluate=False,
            listen=lambda event: told.append(f"{event.stage}: {event.message}"),
        )
        return told, (done.folder / "adapter" / "README.md").read_text()

    told, card = said("on", **{"data.system": "Count."})
    words = "by the tokenizer's chat template, after a system prompt"
    assert told[0] == f"data: {words}"
    assert f"| prompts and answers | {words} |" in card
    told, card = said("off", **{"data.chat_template": "off"})
    assert "| prompts and answers | as they are, no chat template |" in card
    told, card = said("plain", base=world["plain"])
    assert not any(line.startswith("data") for line in told)
    assert "prompts and answers" not in card


def test_a_chat_run_ends_as_one_on_conversations(world: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = [
        load_file(
            Path(run(recipe(world, data), tmp_path / data).folder)
            / "adapter/adapter_model.safetensors"
        )
        for data in ("pairs", "talks")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
