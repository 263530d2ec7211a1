"""Makes the pocket base model from nothing: tokenizer, pretraining, recall, folder.

    python -m forgetless.data.pocket.pretrain --out DIR [--seed 0]

On one thread the same seed and versions give the same weights.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from forgetless.data.pocket.corpus import documents, tokenizer_documents
from forgetless.data.pocket.knowledge import RELATIONS, Question, matches, questions
from forgetless.data.pocket.problems import final_answer, problems

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the weights, next to the tables and the corpus."""

    seed: int = 0
    steps: int = 4000
    batch_size: int = 16
    length: int = 96
    learning_rate: float = 2.5e-3
    warmup: int = 200
    weight_decay: float = 0.01
    vocab_size: int = 1536
    hidden_size: int = 160
    num_layers: int = 3
    num_heads: int = 5
    intermediate_size: int = 448
    context: int = 256


def pretrain(out: Path, settings: Settings, *, recall_every: int = 500) -> dict[str, Any]:
    """Train a base model and save it, its tokenizer and its log to `out`.

    A sample of the facts is asked every `recall_every` steps.

    Returns:
        The final scores: held-out and seen recall a relation, word problems solved.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    tokenizer = make_tokenizer(settings)
    model = make_model(settings, tokenizer)
    batches = _batches(tokenizer, settings)
    optimizer = torch.optim.AdamW(
        decayed(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.95)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup, settings.steps)
    sample = random.Random(settings.seed).sample(questions("held_out"), 200)
    started, running = time.perf_counter(), math.nan
    with (out / "pretrain.jsonl").open("w", encoding="utf-8") as log:
        for step in range(1, settings.steps + 1):
            loss = _train_step(model, next(batches), optimizer)
            schedule.step()
            running = loss if math.isnan(running) else 0.95 * running + 0.05 * loss
            if step % 50 and step != settings.steps:
                continue
            entry: dict[str, Any] = {"step": step, "loss": round(running, 4)}
            if step % recall_every == 0:
                entry["held_out_recall"] = _share(recalled(model, tokenizer, sample))
            entry["seconds"] = round(time.perf_counter() - started)
            log.write(json.dumps(entry) + "\n")
            log.flush()
    scores = score(model, tokenizer)
    _save(out, model, tokenizer, settings, scores)
    return scores


def make_tokenizer(
    settings: Settings, texts: Iterable[str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that never joins two digits.

    It starts every text with `<bos>` and pads on the left. It is trained on `texts`, or on the
    pocket corpus.
    """
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = tokenizer_documents(settings.seed) if texts is None else texts
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of the given sizes, with input and output embeddings tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def decayed(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which only the matrices of the layers decay."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _batches(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Iterator[Tensor]:
    """Batches of token ids, documents joined end to end as `<bos> text <eos>`."""
    size = settings.batch_size * settings.length
    tokens: list[int] = []
    for text in documents(settings.seed):
        tokens.extend((*tokenizer.encode(text), tokenizer.eos_token_id))
        if len(tokens) >= size:
            yield torch.tensor(tokens[:size]).view(settings.batch_size, settings.length)
            tokens = tokens[size:]


def _train_step(model: LlamaForCausalLM, batch: Tensor, optimizer: torch.optim.Optimizer) -> float:
    model.train()
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Shares of facts recalled (held out and seen, and a relation) and of word problems solved."""
    held_out = questions("held_out")
    right = recalled(model, tokenizer, held_out)
    seen = random.Random(0).sample(questions("seen"), 1000)
    scores: dict[str, Any] = {
        "held_out_recall": _share(right),
        "seen_recall": _share(recalled(model, tokenizer, seen)),
    }
    for relation in RELATIONS:
        pairs = zip(right, held_out, strict=True)
        known = [flag for flag, question in pairs if question.fact.relation == relation]
        scores[f"held_out_recall_{relation}"] = _share(known)
    asked = problems(200, seed=0, split="test")
    solutions = complete(model, tokenizer, [problem.prompt for problem in asked], 40)
    solved = zip(solutions, asked, strict=True)
    scores["problems_solved"] = _share([final_answer(t) == p.answer for t, p in solved])
    return scores


def recalled(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Question]
) -> list[bool]:
    """Whether the greedy continuation of each question is the answer or an alias."""
    texts = complete(model, tokenizer, [question.prompt for question in asked], 16)
    return [matches(text, question) for text, question in zip(texts, asked, strict=True)]


def _share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


@torch.no_grad()
def complete(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 256,
) -> list[str]:
    """The greedy continuation of each prompt, in the order given."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(
            list(prompts[start : start + batch_size]), padding=True, return_tensors="pt"
        )
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts.extend(tokenizer.batch_decode(new, skip_special_tokens=True))
    return texts


def _save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    scores: dict[str, Any],
) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    # Owner-only by default, which a shared installation could not read.
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    made_with = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    with (out / "pretrain.jsonl").open("a", encoding="utf-8") as log:
        final = {"settings": asdict(settings), "made_with": made_with, "scores": scores}
        log.write(json.dumps(final) + "\n")
    card = _model_card(settings, made_with, scores, model.num_parameters())
    (out / "README.md").write_text(card, encoding="utf-8")


def _model_card(
    settings: Settings, made_with: dict[str, str], scores: dict[str, Any], num_parameters: int
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made_with.items())
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {value:.1%} |" for name, value in scores.items()
    )
    return f"""# The pocket base model

A Llama of {num_parameters:,} parameters ({settings.num_layers} layers, hidden size \
{settings.hidden_size}, {settings.vocab_size} tokens, digits one by one, tied embeddings, context \
{settings.context}) that knows the world's countries and the chemical elements, and sums of small \
numbers. It is made to be fine-tuned and to be watched while it forgets; it is no use for anything \
else.

Made from nothing but the tables and templates of `forgetless.data.pocket`, Apache-2.0, by

    python -m forgetless.data.pocket.pretrain --out DIR --seed {settings.seed} \\
        --steps {settings.steps}

on one thread ({versions}). `pretrain.jsonl` is the log of that run.

| measured at the end, greedy, exact match | |
|---|---|
{rows}

Held out: a phrasing of the question that pretraining never used. Seen: a sample of 1,000 facts in \
the phrasings that it did use. Problems: 200 word problems, the skill to be learned.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, pretrain on one thread, print the scores."""
    parser = argparse.ArgumentParser(prog="python -m forgetless.data.pocket.pretrain")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Settings().steps)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scores = pretrain(given.out, Settings(seed=given.seed, steps=given.steps))
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
