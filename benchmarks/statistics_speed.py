"""Time and memory of collecting second moments, against a bare forward and PEFT's CorDA.

    python benchmarks/statistics_speed.py [--hidden 256 512 1024] [--layers 8] [--device cuda]

Llama models with random weights, a vocabulary of 32000 and all seven linear layers of every block,
on the same tokens, a text a batch since PEFT's hook takes no more. `forward` is the model as it is
called, `body` the same without the output head, and `in a tenth` ours under a budget of a tenth of
all matrices. `peft sums` is the collecting part of `preprocess_corda`, `peft` the whole of it,
inverses and SVDs included (run once). `eva over ours` is PEFT's EVA, which reads until its
principal components have settled, over `collect` and `attach` of ours (run once). A float64 product
takes twice the time of a float32 one, so of a float32 body alone the ratio tends to 1.9 as the
model grows.

The second table is memory: the matrices of Llama-2-7B, computed, and what the peak of a process
grows by while it collects, measured, each in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution, preprocess_corda
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless import attach
from forgetless.statistics.collection import collect
from forgetless.statistics.passes import matrix_bytes
from timing import interleaved, medians, ratio, report, timed

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 32000
BARS = {"over forward": 1.6, "peft over ours": 1.5, "share of all matrices": 0.1}
"""Column -> what it may be at most (the first and the last), or must be at least."""

GIB = 2**30
Batches = list[dict[str, Tensor]]


def llama(hidden: int, layers: int, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of that width; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def texts(count: int, length: int, device: str) -> Batches:
    """Random tokens, a text a batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator).to(device)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]


@torch.no_grad()
def forward(model: LlamaForCausalLM, batches: Batches, **options: Any) -> None:
    """All batches through the model."""
    for batch in batches:
        model(**batch, use_cache=False, **options)


def corda_config() -> LoraConfig:
    """PEFT's CorDA of all linear layers."""
    return LoraConfig(
        r=16,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm", prune_temporary_fields=False),
    )


def peft_sums(model: LlamaForCausalLM, batches: Batches) -> None:
    """PEFT's sums for every layer."""
    run = partial(forward, model, batches)
    calib_cov_distribution(model, corda_config(), run, None, None)


def forget_sums(model: LlamaForCausalLM) -> None:
    """Take off the model what PEFT left on it."""
    for module in model.modules():
        for name in ("covariance_matrix", "sample_count", "eigens", "rank", "corda_method"):
            vars(module).pop(name, None)


def compare(hidden: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the first table."""
    dtype = getattr(torch, options.dtype)
    model = llama(hidden, options.layers, options.device, dtype)
    batches = texts(options.texts, options.length, options.device)
    inner = 11 * hidden // 4
    tenth = max(all_matrices(hidden, inner, options.layers) // 10, matrix_bytes((inner, inner)))
    times = interleaved(
        {
            "forward": partial(forward, model, batches),
            "body": partial(forward, model, batches, logits_to_keep=1),
            "ours": partial(collect, model, batches),
            "in a tenth": partial(collect, model, batches, memory_budget=tenth),
            "peft sums": partial(peft_sums, model, batches),
        },
        options.repeats,
        prepare={"peft sums": partial(forget_sums, model)},
        device=options.device,
    )
    row = {
        "hidden": hidden,
        "tokens": options.texts * options.length,
        **medians(times),
        "over forward": ratio(times, "ours", "forward"),
        "over body": ratio(times, "ours", "body"),
        "tenth over forward": ratio(times, "in a tenth", "forward"),
        "peft sums over ours": ratio(times, "peft sums", "ours"),
        "peft over ours": None,
        "eva over ours": None,
    }
    forget_sums(model)
    if not options.no_peft:
        run = partial(forward, model, batches)
        whole = timed(lambda: preprocess_corda(model, corda_config(), run), options.device)
        row["peft over ours"] = whole / medians(times)["ours"]
        forget_sums(model)
        theirs = timed(lambda: peft_eva(model, batches), options.device)
        row["eva over ours"] = theirs / timed(lambda: our_eva(model, batches), options.device)
    return row


def peft_eva(model: LlamaForCausalLM, batches: Batches) -> None:
    """An adapter with PEFT's EVA on a copy of the model."""
    config = LoraConfig(
        r=16, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig()
    )
    adapted = get_peft_model(copy.deepcopy(model), config)
    initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)


def our_eva(model: LlamaForCausalLM, batches: Batches) -> None:
    """An adapter with our EVA on a copy of the model."""
    copied = copy.deepcopy(model)
    moments = collect(copied, batches, target_modules=TARGETS)
    attach(copied, "eva", rank=16, alpha=16, target_modules=TARGETS, task_stats=moments, rho=2)


# ---- memory --------------------------------------------------------------------------------------


def all_matrices(hidden: int, inner: int, layers: int) -> int:
    """Bytes of a float64 matrix for each of the seven layers of every block."""
    return layers * (6 * matrix_bytes((hidden, hidden)) + matrix_bytes((inner, inner)))


def grown(what: str, options: argparse.Namespace) -> int:
    """Bytes by which the peak of a new process grows while it does one thing."""
    values = {"what": what, "hidden": options.memory_hidden, "layers": options.memory_layers}
    command = [sys.executable, __file__, "--measure", json.dumps(values)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure(what: str, hidden: int, layers: int) -> None:
    """Print by how many bytes the peak of this process grows; the forward's own is left out."""
    torch.set_num_threads(1)
    model = llama(hidden, layers, "cpu", torch.float32)
    batches = texts(2, 128, "cpu")
    forward(model, batches, logits_to_keep=1)
    before = _peak()
    inner = 11 * hidden // 4
    doing: dict[str, Callable[[], object]] = {
        "ours, one pass": partial(collect, model, batches),
        "ours, budget": partial(
            collect, model, batches, memory_budget=matrix_bytes((inner, inner))
        ),
        "peft": partial(peft_sums, model, batches),
    }
    kept = doing[what]()  # what comes back is held, as its user would
    print(_peak() - before)
    del kept


def _peak() -> int:
    """Most bytes that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would begin with what the parent held when it forked
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both parts of the second table."""
    hidden, layers = options.memory_hidden, options.memory_layers
    seven = all_matrices(4096, 11008, 32)
    shared = 32 * (3 * matrix_bytes((4096, 4096)) + matrix_bytes((11008, 11008)))
    computed = {
        "all seven matrices of a block, float64": seven,
        "all seven, float32 (peft)": seven // 2,
        "ours, one pass (four a block)": shared,
        "ours, least budget": matrix_bytes((11008, 11008)),
    }
    rows = [_memory_row("Llama-2-7B, computed", name, n, seven) for name, n in computed.items()]
    held = all_matrices(hidden, 11 * hidden // 4, layers)
    model = f"hidden {hidden}, {layers} blocks, measured"
    for what in ("peft", "ours, one pass", "ours, budget"):
        rows.append(_memory_row(model, what, grown(what, options), held))
    return rows


def _memory_row(model: str, side: str, held: int, everything: int) -> dict[str, Any]:
    return {
        "model": model,
        "side": side,
        "GiB": held / GIB,
        "share of all matrices": held / everything,
    }


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description="Collecting statistics against a bare forward.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory-hidden", type=int, default=512)
    parser.add_argument("--memory-layers", type=int, default=16)
    parser.add_argument("--no-peft", action="store_true", help="leave out PEFT's slow SVDs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of fewer tokens than inputs
    if options.measure:
        measure(**json.loads(options.measure))
        return
    torch.set_num_threads(options.threads)
    settings = {
        "layers": options.layers,
        "dtype": options.dtype,
        "bars": ", ".join(f"{name} {bar:g}" for name, bar in BARS.items()),
    }
    rows = [compare(hidden, options) for hidden in options.hidden]
    report("statistics", "Statistics, seconds", settings, rows, options.device)
    report("statistics_memory", "Statistics, memory beyond the model", settings, memory(options))


if __name__ == "__main__":
    main()
