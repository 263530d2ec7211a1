"""Tasks of the lm-evaluation-harness, loaded and run on a model object. Imports lm_eval."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval.utils
import numpy as np
import torch
import transformers
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from forgetless.core.errors import UserError, unknown
from forgetless.models.hub import go_offline_if_unreachable
from forgetless.models.state import evaluating, generators_kept
from forgetless.tasks.asking import is_templated
from forgetless.tasks.base import TaskResult
from forgetless.tasks.harness import local
from forgetless.tasks.harness.index import find
from forgetless.tasks.harness.layouts import STANDARD
from forgetless.tasks.harness.model import InMemory
from forgetless.tasks.harness.results import primary, result
from forgetless.tasks.inference import require_causal, require_numbers

if TYPE_CHECKING:
    from forgetless.tasks.lm_eval import LMEval


# What lm-eval's own command line sets before it evaluates: random, numpy, torch and few-shot.
_SEEDS = (0, 1234, 1234, 1234)
_BOOTSTRAP = 1000
_SHOWN_ERROR = 200

# Templates come with data: the harness's own environment would let them reach any function.
_SANDBOXED = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_SANDBOXED.filters.update(lm_eval.utils.env.filters)
lm_eval.utils.env = _SANDBOXED


class Loaded:
    """A task of the harness, or a group of tasks, with its data read.

    Attributes:
        task: what was asked for.
        name: the harness's name of it.
        tasks: the harness's task objects by name; one, or a group's.
        metrics: every metric key, "acc,none", that all of these have; whether higher is better.
        metric: the key that counts.

    Raises:
        UserError: the task has no such metric, or its members have none in common.
    """

    def __init__(self, task: LMEval, found: Mapping[str, Any]) -> None:
        self.task = task
        self.name = task.task
        if task.task.endswith((".yaml", ".yml")):
            content = load_yaml(task.task, resolve_func=False)
            self.name = str(content.get("task") or content.get("group"))
        self.tasks: dict[str, Any] = dict(found["tasks"])
        self._groups: dict[str, Any] = dict(found.get("groups", {}))
        each = [
            {
                f"{metric},{pipeline.name}": bool(higher)
                for pipeline in member._filters
                for metric, higher in member.higher_is_better().items()
            }
            for member in self.tasks.values()
        ]
        self.metrics = {k: v for k, v in each[0].items() if all(k in keys for keys in each)}
        if task.metric is not None and task.metric not in self.metrics:
            raise unknown(f"metric of task {task.task!r}:", task.metric, self.metrics)
        self.metric = primary(self.metrics) if task.metric is None else task.metric

    def content(self) -> list[Any]:
        """All that decides the scores but the model: documents, examples, settings, code."""
        with _quiet():
            return [[name, _content(task, self.task.limit)] for name, task in self.tasks.items()]

    def run(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int | None
    ) -> TaskResult:
        """Score a model object; it and all random generators are left as they were.

        Raises:
            UserError: not a causal language model, logits that are nan, or answers longer than
                the model can read.
        """
        require_causal(model)
        by_template = is_templated(tokenizer, self.task.chat_template, self.task.system)
        with _quiet(), generators_kept(), _one_process(), evaluating(model):
            harness = InMemory(model, tokenizer, batch_size)
            # The harness would score a model whose logits are not numbers like any other.
            with torch.no_grad():
                require_numbers(model(torch.arange(4, device=harness.device)[None]).logits)
            random.seed(_SEEDS[0])
            np.random.seed(_SEEDS[1])
            torch.manual_seed(_SEEDS[2])
            for task in self.tasks.values():
                task.set_fewshot_seed(seed=_SEEDS[3])
            found = evaluator.evaluate(
                lm=harness,
                task_dict={"tasks": self.tasks, "groups": self._groups, "group_map": {}},
                limit=self.task.limit,
                system_instruction=self.task.system,
                apply_chat_template=by_template,
                fewshot_as_multiturn=by_template,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
            )
        numbers = {
            key: float(value)
            for key, value in found["results"].get(self.name, {}).items()
            if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if harness.too_long:
            warnings.warn(
                f"task {self.task.name!r}: {harness.too_long} requests are longer than the model "
                "can read and were cut on the left, as lm-eval does; worked examples or the "
                "question's beginning are missing in them",
                stacklevel=2,
            )
        return result(self, numbers, found["samples"], self._settings(harness.too_long))

    def _settings(self, requests_cut: int) -> dict[str, Any]:
        """What is asked and how; one value where all tasks of a group agree."""

        def one(value: Callable[[Any], Any]) -> Any:
            values = {name: value(task) for name, task in self.tasks.items()}
            different = list(dict.fromkeys(values.values()))
            return different[0] if len(different) == 1 else values

        def generation(task: Any) -> str | None:
            generates = task.OUTPUT_TYPE == "generate_until"
            return json.dumps(task.config.generation_kwargs, sort_keys=True) if generates else None

        task, by_template = self.task, self.task.said("off")
        return {
            "lm_eval": version("lm_eval"),
            "lm_eval_task": self.name,
            "version": one(lambda task: task.VERSION),
            "num_fewshot": one(lambda task: int(task.config.num_fewshot)),
            "limit": self.task.limit,
            "requests_cut": requests_cut,
            **({"chat_template": task.chat_template, "system": task.system} if by_template else {}),
            "generation": one(generation),
        }


def load(task: LMEval) -> Loaded:
    """Read a task or a group of the harness with its data.

    Raises:
        UserError: data that cannot be had; worked examples where there are none; a task that runs
            generated programs; a metric that it does not have.
    """
    name = task.task
    with _quiet(), generators_kept():
        try:
            found = _load(name, task.data_dir)
        except UserError:
            raise
        except Exception as problem:
            raise UserError(_why_not(name, problem, task.data_dir)) from problem
    for member in found["tasks"].values():
        if not isinstance(member, ConfigurableTask):
            raise UserError(
                f"task {name!r} is a Python class of lm-eval ({type(member).__name__}); only tasks "
                "that are YAML files can be scored here"
            )
        if getattr(member, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name!r} runs programs that the model writes, without a sandbox; use the "
                "kinds 'humaneval' and 'mbpp'"
            )
        _set_shots(member, task.num_fewshot)
        if task.max_new_tokens is not None and member.OUTPUT_TYPE == "generate_until":
            # Under the one of its names that lm-eval looks at first, and no other.
            given = member.config.generation_kwargs or {}
            settings = {key: value for key, value in given.items() if key not in _LENGTHS}
            settings["max_gen_toks"] = task.max_new_tokens
            member.set_config(key="generation_kwargs", value=settings)
    return Loaded(task, found)


_LENGTHS = frozenset({"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"})
"""What lm-eval calls the length of an answer."""


def _load(name: str, data_dir: str | Path | None) -> Any:
    """The harness's own task objects."""
    if data_dir is None:
        go_offline_if_unreachable()  # or each of the task's files would be tried for half a minute
        folders = [] if name.endswith((".yaml", ".yml")) else sorted(_folders(name))
        return TaskManager(include_path=folders, include_defaults=False).load([name])
    # The files are gone after this: what would be read from them later is held in memory.
    with tempfile.TemporaryDirectory(prefix="forgetless-") as place:
        local.write(name, data_dir, Path(place))
        folders = [*sorted(_folders(name)), Path(place)]
        found = TaskManager(include_path=folders, include_defaults=False).load([name])
        for task in found["tasks"].values():
            task.dataset = datasets.DatasetDict(
                {
                    split: datasets.Dataset.from_list(rows.to_list())
                    for split, rows in task.dataset.items()
                }
            )
    return found


def _folders(name: str) -> set[Path]:
    """The folders that hold a task, or a group with all its members."""
    entry = find(name)
    if entry is None:
        return set()
    folders = {entry.path.parent}
    if entry.is_group:
        members = load_yaml(entry.path, resolve_func=False).get("task") or []
        for member in [members] if isinstance(members, str) else members:
            named = member if isinstance(member, str) else member.get("task", member.get("group"))
            if isinstance(named, str) and named != name:
                folders |= _folders(named)
    return folders


def _set_shots(task: Any, given: int | None) -> None:
    """The number of worked examples as lm-eval's command line sets it."""
    own = task.config.num_fewshot
    if given is not None and own != 0:
        task.set_config(key="num_fewshot", value=given)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    shots = task.config.num_fewshot
    has_examples = task.has_training_docs() or task.fewshot_cfg.split or task.fewshot_cfg.samples
    if shots and not has_examples and task.config.dataset_path == "json":
        raise UserError(
            f"task {task.config.task!r} shows {shots} worked examples, which come from its "
            "training file, and there is none; add a file with 'train' in its name, or set "
            "num_fewshot: 0"
        )


def _why_not(name: str, problem: Exception, data_dir: str | Path | None) -> str:
    """What to do about data that cannot be had."""
    reason = " ".join(str(problem).split())[:_SHOWN_ERROR]
    if isinstance(problem, ImportError):
        return f"task {name!r} needs a package that is not installed: {reason}"
    unreachable = isinstance(problem, OSError)
    if data_dir is not None or name.endswith((".yaml", ".yml")) or not unreachable:
        return f"task {name!r} cannot be read: {type(problem).__name__}: {reason}"
    advice = "connect to the network once, or set HF_HOME to a cache that has it"
    if name in STANDARD:
        advice += (
            ", or give its files with --data-dir (data_dir: in a recipe), which are looked for "
            + local.looked_for(name, "that folder")
        )
    return (
        f"the data of task {name!r} are not in the local cache and cannot be downloaded; "
        f"{advice} ({type(problem).__name__}: {reason})"
    )


# ------------------------------------------------------------------------------ what decides scores


def _content(task: Any, limit: int | None) -> dict[str, Any]:
    """A task's documents, worked examples, settings and code, JSON-ready."""
    config = {k: v for k, v in task.dump_config().items() if not k.startswith("dataset")}
    config["metadata"] = {"version": task.VERSION}
    config = {k: v for k, v in config.items() if k not in _NOT_ASKED}
    count = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
    examples = list(task.fewshot_docs() or []) if task.config.num_fewshot else []
    return {
        "config": _plain(config),
        "documents": _plain(list(islice(task.eval_docs, count))),
        "examples": _plain(examples),
        "code": sorted(_sources(task)),
    }


_NOT_ASKED = frozenset(
    {"task_alias", "tag", "training_split", "validation_split", "test_split", "process_docs"}
)
"""Settings that decide which documents there are, and these are looked at themselves."""


def _sources(task: Any) -> set[str]:
    """The text of every file that a function of the task comes from, but lm-eval's own core."""
    values = [*vars(task.config).values(), *(task._metric_fn_list or {}).values()]
    files = set()
    for value in values:
        if callable(value) and inspect.isfunction(value):
            file = inspect.getsourcefile(value)
            if file is not None and "lm_eval/api/" not in file:
                files.add(Path(file).read_text(encoding="utf-8"))
    return files


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_text, sort_keys=True))


def _text(value: Any) -> str:
    """What is no JSON value, as a text that is the same in every process."""
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
    return str(value)


@contextmanager
def _one_process() -> Iterator[None]:
    """Resamples are drawn here, the same ones, and not in a pool of forks.

    A fork that inherits a handler of SIGTERM can miss the SIGTERM by which a pool ends it, and is
    then waited for without end.
    """
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no notes but our own bar, which goes where standard error went before."""
    logger, bars = logging.getLogger("lm_eval"), datasets.utils.logging.is_progress_bar_enabled()
    level, verbosity = logger.level, transformers.logging.get_verbosity()
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
