"""Fine-tune with low-rank adapters, keep what the model knew, and measure both.

The names below are loaded when first used, so that ``import forgetless`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgetless.adapters import ExportReport, attach, export, load, save
    from forgetless.core import Decomposition, Factors, Method, decompose
    from forgetless.evaluation import Scores, evaluate
    from forgetless.methods import METHODS
    from forgetless.recipe import Recipe
    from forgetless.reports import report
    from forgetless.runs import Run, run
    from forgetless.scores.comparison import Comparison, compare
    from forgetless.statistics import Statistics, collect
    from forgetless.studies import Study, study
    from forgetless.training import ForgettingCallback

__version__ = "0.1.0"

_HOME = {
    "METHODS": "methods",
    "Comparison": "scores.comparison",
    "Decomposition": "core",
    "ExportReport": "adapters",
    "Factors": "core",
    "ForgettingCallback": "training",
    "Method": "core",
    "Recipe": "recipe",
    "Run": "runs",
    "Scores": "evaluation",
    "Statistics": "statistics",
    "Study": "studies",
    "attach": "adapters",
    "collect": "statistics",
    "compare": "scores.comparison",
    "decompose": "core",
    "evaluate": "evaluation",
    "export": "adapters",
    "load": "adapters",
    "report": "reports",
    "run": "runs",
    "save": "adapters",
    "study": "studies",
}

__all__ = [
    "METHODS",
    "Comparison",
    "Decomposition",
    "ExportReport",
    "Factors",
    "ForgettingCallback",
    "Method",
    "Recipe",
    "Run",
    "Scores",
    "Statistics",
    "Study",
    "attach",
    "collect",
    "compare",
    "decompose",
    "evaluate",
    "export",
    "load",
    "report",
    "run",
    "save",
    "study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'forgetless' has no attribute {name!r}")
    value = getattr(import_module(f"forgetless.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
