"""Tasks of the lm-evaluation-harness, loaded and run on a model object. Imports lm_eval."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from forgetless.core.errors import UserError
from forgetless.models.load import evaluating
from forgetless.models.state import generators_kept
from forgetless.tasks.harness import local
from forgetless.tasks.harness.index import find
from forgetless.tasks.harness.layouts import STANDARD
from forgetless.tasks.harness.model import InMemory, check_finite

__all__ = ["Loaded", "Outcome", "harness_version", "load"]

# What lm-eval's own command line sets before it evaluates: random, numpy, torch and few-shot.
_SEEDS = (0, 1234, 1234, 1234)
_BOOTSTRAP = 1000
_SHOWN_ERROR = 200


@dataclass(frozen=True)
class Outcome:
    """What the harness found out.

    Attributes:
        numbers: of the task or group: "acc,none", "acc_stderr,none" and the like.
        samples: of each task, its logged samples.
        too_long: how many requests did not fit into the model and were cut on the left.
    """

    numbers: Mapping[str, float]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    too_long: int


class Loaded:
    """A task of the harness, or a group of tasks, with its data read.

    Attributes:
        name: the harness's name of it.
        tasks: the harness's task objects by name; one, or a group's.
        limit: documents of each task; None for all.
    """

    def __init__(self, name: str, found: Mapping[str, Any], limit: int | None) -> None:
        self.name, self.limit = name, limit
        self.tasks: dict[str, Any] = dict(found["tasks"])
        self._groups: dict[str, Any] = dict(found.get("groups", {}))

    @property
    def versions(self) -> dict[str, Any]:
        """The version of each task."""
        return {name: task.VERSION for name, task in self.tasks.items()}

    @property
    def shots(self) -> dict[str, int]:
        """The number of worked examples that each task has."""
        return {name: int(task.config.num_fewshot) for name, task in self.tasks.items()}

    @cached_property
    def metrics(self) -> dict[str, bool]:
        """Every metric key, "acc,none", that all tasks have, and whether higher is better."""
        keys: dict[str, bool] = {}
        for position, task in enumerate(self.tasks.values()):
            filters = [pipeline.name for pipeline in task._filters]
            own = {
                f"{metric},{name}": bool(higher)
                for name in filters
                for metric, higher in task.higher_is_better().items()
            }
            keys = own if position == 0 else {k: v for k, v in keys.items() if k in own}
        return keys

    def is_mean(self, key: str) -> bool:
        """Whether the metric is the plain mean of what it is for each document."""
        metric = key.partition(",")[0]
        functions = [task.aggregation().get(metric) for task in self.tasks.values()]
        return all(getattr(function, "__name__", "") == "mean" for function in functions)

    def content(self) -> list[Any]:
        """All that decides the scores but the model: documents, examples, settings, code."""
        with _quiet():
            return [[name, _content(task, self.limit)] for name, task in self.tasks.items()]

    def run(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int | None
    ) -> Outcome:
        """Score a model object; it and all random generators are left as they were."""
        with _quiet(), generators_kept(), _one_process(), evaluating(model):
            harness = InMemory(model, tokenizer, batch_size)
            check_finite(model, harness.device)
            _seed_everything()
            for task in self.tasks.values():
                task.set_fewshot_seed(seed=_SEEDS[3])
            found = evaluator.evaluate(
                lm=harness,
                task_dict={"tasks": self.tasks, "groups": self._groups, "group_map": {}},
                limit=self.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
            )
        results = found["results"].get(self.name, {})
        numbers = {k: float(v) for k, v in results.items() if "," in k and _is_number(v)}
        return Outcome(numbers, found["samples"], harness.too_long)


def load(
    name: str,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    max_new_tokens: int | None = None,
) -> Loaded:
    """Read a task or a group of the harness with its data.

    Args:
        name: the harness's name, or a YAML file of a task.
        num_fewshot: worked examples in each prompt; None for the task's own number.
        limit: documents of each task.
        data_dir: a folder of local files, for the tasks of `STANDARD`; None for the data set on
            the hub, or its copy in the local cache.
        max_new_tokens: of a generated answer; None for the task's own number.

    Raises:
        UserError: data that cannot be had; worked examples where there are none; a task that runs
            generated programs.
    """
    with _quiet(), generators_kept():
        try:
            found = _load(name, data_dir)
        except UserError:
            raise
        except Exception as problem:
            raise UserError(_why_not(name, problem, data_dir)) from problem
    for task in found["tasks"].values():
        if not isinstance(task, ConfigurableTask):
            raise UserError(
                f"task {name!r} is a Python class of lm-eval ({type(task).__name__}); only tasks "
                "that are YAML files can be scored here"
            )
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name!r} runs programs that the model writes, without a sandbox; use the "
                "kinds 'humaneval' and 'mbpp'"
            )
        _set_shots(task, num_fewshot)
        if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            _set_length(task, max_new_tokens)
    return Loaded(_own_name(name), found, limit)


def _own_name(name: str) -> str:
    if not name.endswith((".yaml", ".yml")):
        return name
    content = load_yaml(name, resolve_func=False)
    return str(content.get("task") or content.get("group"))


def _load(name: str, data_dir: str | Path | None) -> Any:
    """The harness's own task objects."""
    if data_dir is None:
        folders = [] if name.endswith((".yaml", ".yml")) else sorted(_folders(name))
        return TaskManager(include_path=folders, include_defaults=False).load([name])
    # The harness reads the files at once, so they are needed no longer than that.
    with tempfile.TemporaryDirectory(prefix="forgetless-") as place:
        local.write(name, data_dir, Path(place))
        folders = [*sorted(_folders(name)), Path(place)]
        found = TaskManager(include_path=folders, include_defaults=False).load([name])
        for task in found["tasks"].values():
            _hold_in_memory(task)
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


def _hold_in_memory(task: Any) -> None:
    """Replace data that are read from files as they are needed by copies in memory."""
    task.dataset = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows.to_list()) for split, rows in task.dataset.items()}
    )


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


def _set_length(task: Any, most: int) -> None:
    """The length of an answer, under the one of its names that lm-eval looks at first."""
    settings = {k: v for k, v in (task.config.generation_kwargs or {}).items() if k not in _LENGTHS}
    task.set_config(key="generation_kwargs", value=settings | {"max_gen_toks": most})


_LENGTHS = frozenset({"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"})


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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------------ nothing is changed


def _seed_everything() -> None:
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[2])


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
    """No progress bars and no notes; warnings about the scores are our own."""
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


def harness_version() -> str:
    """Of the installed lm-evaluation-harness."""
    return version("lm_eval")
