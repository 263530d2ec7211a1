"""A base model from nothing: tokenizer, Llama, pre-training that a second call goes on with."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, Tokens, sample
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from forgetless.core.errors import UserError
from forgetless.core.files import new_folder, read_json, read_jsonl, remove, write_json, write_jsonl
from forgetless.data.pocket.pretrain import Settings, decayed, make_model, make_tokenizer

CHECKPOINT_SECONDS = 60.0
LOG_EVERY = 50
_TOKENIZER_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class Plan:
    """What decides the base, next to the corpus.

    Attributes:
        sizes: of the model, of a batch and of the rates; `steps` counts where `minutes` is None.
        minutes: of pre-training, over which the rate falls; what it comes to depends on the GPU.
        fact_share: of the rows of a batch that hold facts.
    """

    sizes: Settings
    minutes: float | None
    fact_share: float

    def done(self, step: int, seconds: float) -> float:
        """Share of the pre-training that is behind, 0 to 1."""
        if self.minutes is None:
            return min(1.0, step / self.sizes.steps)
        return min(1.0, seconds / (60 * self.minutes))

    def rate(self, step: int, done: float) -> float:
        """Learning rate: linear warm-up over steps, then a cosine down to a tenth."""
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        return self.sizes.learning_rate * min(1.0, (step + 1) / self.sizes.warmup) * cosine


def make_base(
    folder: Path,
    corpus: Corpus,
    plan: Plan,
    *,
    device: torch.device,
    compile_model: bool,
    say: Callable[[str], None],
) -> Path:
    """The base's folder, made where it is not there yet; a second call goes on.

    Args:
        folder: takes `base`, and what is needed on the way.
        corpus: the text.
        plan: what to make of it.
        device: where; on anything but a CPU it computes in bfloat16.
        compile_model: use torch.compile.
        say: called with lines for the user.

    Raises:
        UserError: the folder holds a base of another plan or corpus.
    """
    wanted = json.loads(json.dumps({**asdict(plan), "corpus": corpus.fingerprint}))
    made = read_json(folder / "plan.json")
    if made not in ({}, wanted):
        changed = ", ".join(sorted(key for key in wanted if made.get(key) != wanted[key]))
        raise UserError(f"{folder} holds a base made with other settings ({changed}); give another")
    write_json(folder / "plan.json", wanted)
    base = folder / "base"
    if not base.exists():
        tokenizer, tokens = _tokens(folder, corpus, plan.sizes, say)
        training = _Pretraining(folder, plan, tokenizer, device, compile_model, say)
        training.run(tokens)
        with new_folder(base) as new:
            training.model.save_pretrained(new)
            tokenizer.save_pretrained(new)
        remove(folder / "unfinished")
    return base


def _tokens(
    folder: Path, corpus: Corpus, sizes: Settings, say: Callable[[str], None]
) -> tuple[PreTrainedTokenizerFast, Tokens]:
    """Tokenizer and tokens, from the folder where they are there."""
    if not (folder / "tokens.safetensors").exists():
        started = time.perf_counter()
        tokenizer = make_tokenizer(sizes, sample(corpus, _TOKENIZER_CHARACTERS))
        with new_folder(folder / "tokenizer") as new:
            tokenizer.save_pretrained(new)
        Tokens.of(corpus, tokenizer).save(folder / "tokens.safetensors")
        say(f"tokenizer and tokens: {time.perf_counter() - started:.0f} s")
    found = Tokens.load(folder / "tokens.safetensors")
    say(f"{len(found.text):,} tokens of text, {len(found.facts):,} of facts")
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), found


class _Pretraining:
    """The model, its optimiser and how far they are."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        compile_model: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.plan, self.device, self.say = folder, plan, device, say
        self.checkpoint = folder / "unfinished"
        torch.manual_seed(plan.sizes.seed)
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            self.model = LlamaForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
        else:
            self.model = make_model(plan.sizes, tokenizer)
        self.model.to(device).train()
        self.optimizer = torch.optim.AdamW(
            decayed(self.model, plan.sizes.weight_decay),
            lr=plan.sizes.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        if self.checkpoint.exists():
            self._resume()
        self.forward: Any = torch.compile(self.model) if compile_model else self.model

    def run(self, tokens: Tokens) -> None:
        """Train to the end of the plan, with a checkpoint a minute."""
        sizes, began = self.plan.sizes, (self.step, self.seconds)
        earlier = [row for row in read_jsonl(self._log) if row["step"] <= self.step]
        write_jsonl(self._log, earlier)
        started = saved = time.perf_counter()
        loss = None
        self.say(f"pre-training {self.model.num_parameters():,} weights from step {self.step}")
        while (done := self.plan.done(self.step, self.seconds)) < 1:
            batch = tokens.batch(
                sizes.batch_size, sizes.length, self.plan.fact_share, sizes.seed, self.step
            )
            loss = self._train(self._on_device(batch), done)
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self._write(float(loss))
            now = time.perf_counter()
            self.seconds = began[1] + now - started
            if now - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.perf_counter()
        if loss is not None and self.step % LOG_EVERY:
            self._write(float(loss))
        self._tell_speed(self.step - began[0], self.seconds - began[1])

    def _on_device(self, batch: Any) -> torch.Tensor:
        """Token ids where the model is; a GPU gets them while it still computes."""
        rows = torch.from_numpy(batch)
        if self.device.type == "cuda":  # a copy from other memory would wait for all before it
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def _train(self, batch: torch.Tensor, done: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step, done)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            loss: torch.Tensor = self.forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _tell_speed(self, steps: int, seconds: float) -> None:
        sizes = self.plan.sizes
        a_second = steps * sizes.batch_size * sizes.length / max(seconds, 1e-9)
        flops = 6 * self.model.num_parameters() * a_second
        self.say(
            f"{self.step} steps; measured {a_second:,.0f} tokens/s, {flops / 1e12:.1f} TFLOP/s by "
            "6 x weights x tokens"
        )

    # ------------------------------------------------------------------------ what is written

    @property
    def _log(self) -> Path:
        return self.folder / "pretraining.jsonl"

    def _write(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step}; lower --learning-rate")
        row = {"step": self.step, "loss": round(loss, 4), "seconds": round(self.seconds, 1)}
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        self.say(f"step {self.step}, loss {loss:.3f}, {self.seconds:.0f} s")

    def _save(self) -> None:
        """Weights, the optimiser's moments and how far they are."""
        moments = {
            f"{i}.{name}": value.cpu()
            for i, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        with new_folder(self.checkpoint) as new:
            self.model.save_pretrained(new)
            save_file(moments, new / "optimizer.safetensors")
            write_json(new / "state.json", {"step": self.step, "seconds": self.seconds})

    def _resume(self) -> None:
        state = read_json(self.checkpoint / "state.json")
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(self.checkpoint / "optimizer.safetensors").items():
            number, _, name = key.partition(".")
            moments.setdefault(int(number), {})[name] = value
        groups: Mapping[str, Any] = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups["param_groups"]})
