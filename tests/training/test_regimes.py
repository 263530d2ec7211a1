"""Every way of training continues after an interruption as if there had been none.

A regime is one row of `REGIMES`: data, adapter, training, penalties. Each is trained undisturbed,
and again with a stop between two checkpoints; every line of the log and every weight are the same
bit for bit, on one thread.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import export
from forgetless.data.batches import TokenRows
from forgetless.data.examples import Examples, from_rows, load_examples
from forgetless.data.mixture import Mixture
from forgetless.data.texts import batches
from forgetless.data.tokens import tokenize
from forgetless.models.load import load_model, load_tokenizer
from forgetless.statistics.collection import collect
from forgetless.statistics.moments import Statistics
from forgetless.training.loop import TrainingResult, train
from forgetless.training.settings import TrainingSettings

pytest_plugins = ["tests.tiny_fixtures"]

STEPS, CHECKPOINT, STOP = 5, 2, 3
"""How many, how often one is kept, and after which the process ends."""


@dataclass(frozen=True)
class Regime:
    """One way of training.

    Attributes:
        data: of `World`: ``chats``, ``prompts``, ``text``, ``replay``.
        adapter: arguments of `attach`; None for full fine-tuning.
        training: what differs from the settings of `World.train`.
        penalties: added to the loss; ``{adapter}`` stands for an earlier adapter's folder and
            ``{text}`` for a file of old knowledge.
        packs: whether rows hold several sequences.
    """

    data: str = "prompts"
    adapter: dict[str, Any] | None = field(default_factory=lambda: {"method": "pissa"})
    training: dict[str, Any] = field(default_factory=dict)
    penalties: tuple[dict[str, Any], ...] = ()
    packs: bool = False


NULL = {"method": "lora_null_v1"}
PLAIN = {"method": "lora"}
KL = {"kind": "kl", "weight": 0.5, "source": "{text}"}
EWC = {"kind": "ewc", "weight": 10.0, "source": "{text}"}
L2 = {"kind": "l2_start", "weight": 0.1}
REGIMES = {
    # what is learned from, and by what
    "chats": Regime("chats", NULL),
    "packed chats with dropout": Regime("chats", {**NULL, "dropout": 0.2}, packs=True),
    "packed prompts": Regime("prompts", NULL, packs=True),
    "raw text": Regime("text", PLAIN, packs=True),
    "raw text, all weights, attention dropout": Regime(
        "text", None, {"attention_dropout": 0.2}, packs=True
    ),
    "replay": Regime("replay", {"method": "lora_null_v2"}),
    "packed replay, all weights": Regime("replay", None, packs=True),
    # what holds the weights back
    "weight decay and dropout": Regime(
        adapter={"method": "pissa", "dropout": 0.2}, training={"weight_decay": 0.3}
    ),
    "kl": Regime(penalties=(KL,)),
    "kl and l2, all weights, lion": Regime(
        "replay", None, {"optimizer": "lion", "learning_rate": 1e-3}, penalties=(KL, L2)
    ),
    "ewc": Regime(penalties=(EWC,)),
    "ewc, all weights": Regime(adapter=None, penalties=(EWC,)),
    "orthogonality": Regime(
        adapter=PLAIN,
        penalties=({"kind": "orthogonality", "weight": 0.1, "adapters": ["{adapter}"]},),
    ),
    # kinds of adapters
    "dora": Regime(adapter={"method": "pissa", "use_dora": True}),
    "rslora on some layers, ranks by layer": Regime(
        adapter={
            "method": "pissa",
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3},
        }
    ),
    "lora+": Regime(adapter=PLAIN, training={"loraplus_ratio": 16.0}),
    # how a step is made
    "gradient accumulation": Regime(training={"gradient_accumulation": 2}),
    "gradient checkpointing": Regime(
        adapter={"method": "pissa", "dropout": 0.2}, training={"gradient_checkpointing": True}
    ),
    "bf16": Regime(training={"precision": "bf16"}),
    "bf16, all weights": Regime(adapter=None, training={"precision": "bf16"}),
    "sgd": Regime(training={"optimizer": "sgd", "learning_rate": 0.1}),
    "warm-up and cool-down over epochs": Regime(
        training={
            "schedule": "inverse_sqrt",
            "warmup_ratio": 0.2,
            "cooldown_ratio": 0.4,
            "steps": None,
            "epochs": 1.25,
            "batch_size": 6,
        }
    ),
}


class World:
    """A tiny base and what it is trained on."""

    def __init__(self, base: Path, files: Path, folder: Path) -> None:
        self.files = files
        self.tokenizer = load_tokenizer(str(base))
        self.earlier = folder / "earlier"
        self.start = partial(copy.deepcopy, load_model(str(base), dtype="float32"))
        self.parts = cache(self._parts)
        export(attach(self.start(), "pissa", rank=2, alpha=2), self.earlier)
        self.stats = self._statistics()

    def _statistics(self) -> Statistics:
        model = self.start()
        text = str(self.files / "old.txt")
        return collect(model, batches(text, model, self.tokenizer, samples=8, max_length=32))

    def model(self, regime: Regime) -> Any:
        """The model before its first step; the same at every call."""
        if regime.adapter is None:
            return self.start()
        return attach(
            self.start(), **{"rank": 2, "alpha": 2, "stats": self.stats, **regime.adapter}
        )

    def rows(self, regime: Regime) -> Mixture:
        """The training data."""
        parts = self.parts(regime.data, regime.packs)
        return Mixture(parts, [0.75, 0.25][: len(parts)], seed=3)

    def _parts(self, data: str, packs: bool) -> list[TokenRows]:
        """The tokens of each source."""
        makers: dict[str, Callable[[], list[Examples]]] = {
            "chats": lambda: [self._chats()],
            "prompts": lambda: [self._examples("train.jsonl")],
            "text": lambda: [self._texts()],
            "replay": lambda: [self._examples("train.jsonl"), self._examples("test.jsonl")],
        }
        return [
            TokenRows(tokenize(examples, self.tokenizer, max_length=128, pack=packs))
            for examples in makers[data]()
        ]

    def _examples(self, name: str) -> Examples:
        return load_examples(self.files / name)

    def _texts(self) -> Examples:
        lines = (self.files / "old.txt").read_text().splitlines()
        return from_rows([(f"line {n}", {"text": line}) for n, line in enumerate(lines)], "lines")

    def _chats(self) -> Examples:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": record["prompt"]},
                    {"role": "assistant", "content": record["completion"]},
                    {"role": "user", "content": "sure?"},
                    {"role": "assistant", "content": "yes"},
                ]
            }
            for record in self._examples("train.jsonl")
        ]
        return from_rows([(f"row {n}", row) for n, row in enumerate(rows)], "chats")

    def train(
        self,
        regime: Regime,
        model: Any,
        folder: Path,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainingResult:
        """Train, or continue the training that `folder` holds."""
        values = {
            "steps": STEPS,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "checkpoint_every": CHECKPOINT,
            "log_every": 1,
            **regime.training,
        }
        penalties = json.loads(
            json.dumps(regime.penalties)
            .replace("{text}", str(self.files / "old.txt"))
            .replace("{adapter}", str(self.earlier))
        )
        return train(
            model,
            self.tokenizer,
            self.rows(regime),
            TrainingSettings(**values),
            folder,
            seed=3,
            penalties=penalties,
            on_step=on_step,
        )


@pytest.fixture(scope="module")
def world(tiny_base: Path, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_base, tiny_files, tmp_path_factory.mktemp("world"))


def log(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def stop(done: int, steps: int) -> None:
    if done == STOP:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", REGIMES)
def test_an_interrupted_training_ends_like_an_undisturbed_one(
    name: str, world: World, tmp_path: Path
) -> None:
    regime = REGIMES[name]
    whole, halved, resumed = (world.model(regime) for _ in range(3))
    assert world.rows(regime).several == regime.packs
    world.train(regime, whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        world.train(regime, halved, tmp_path / "halved", on_step=stop)
    torch.manual_seed(99)  # what the new process happens to have drawn
    result = world.train(regime, resumed, tmp_path / "halved")

    assert result.resumed_from == CHECKPOINT
    assert log(tmp_path / "halved") == log(tmp_path / "whole")
    assert len(log(tmp_path / "whole")) == STEPS
    expected = weights(whole)
    assert all(torch.equal(w, expected[n]) for n, w in weights(resumed).items())
