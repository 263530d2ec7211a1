"""Fine-tune with low-rank adapters, keep what the model knew, and measure both.

The names below are loaded when first used, so that ``import forgetless`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgetless.adapters.attachment import attach
    from forgetless.adapters.dial import dial
    from forgetless.adapters.folders import ExportReport, export, load, save
    from forgetless.adapters.repair import repair
    from forgetless.adapters.spectra import Spectra, spectra
    from forgetless.core.continual import continual_metrics
    from forgetless.core.method import Decomposition, Factors, Method
    from forgetless.methods import METHODS, decompose
    from forgetless.recipes.recipe import Recipe
    from forgetless.reports import report
    from forgetless.scores.comparison import Comparison, compare
    from forgetless.statistics.collection import collect
    from forgetless.statistics.moments import Statistics
    from forgetless.studies.run import Run, run
    from forgetless.studies.search import Search, search
    from forgetless.studies.sequence import Sequence, sequence
    from forgetless.studies.study import Study, study
    from forgetless.tasks.evaluation import Scores, evaluate
    from forgetless.training.forgetting import ForgettingCallback

__version__ = "0.1.0"

_HOME = {
    "METHODS": "methods",
    "Comparison": "scores.comparison",
    "Decomposition": "core.method",
    "ExportReport": "adapters.folders",
    "Factors": "core.method",
    "ForgettingCallback": "training.forgetting",
    "Method": "core.method",
    "Recipe": "recipes.recipe",
    "Run": "studies.run",
    "Scores": "tasks.evaluation",
    "Search": "studies.search",
    "Sequence": "studies.sequence",
    "Spectra": "adapters.spectra",
    "Statistics": "statistics.moments",
    "Study": "studies.study",
    "attach": "adapters.attachment",
    "collect": "statistics.collection",
    "compare": "scores.comparison",
    "continual_metrics": "core.continual",
    "decompose": "methods",
    "dial": "adapters.dial",
    "evaluate": "tasks.evaluation",
    "export": "adapters.folders",
    "load": "adapters.folders",
    "repair": "adapters.repair",
    "report": "reports",
    "run": "studies.run",
    "save": "adapters.folders",
    "search": "studies.search",
    "sequence": "studies.sequence",
    "spectra": "adapters.spectra",
    "study": "studies.study",
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
    "Search",
    "Sequence",
    "Spectra",
    "Statistics",
    "Study",
    "attach",
    "collect",
    "compare",
    "continual_metrics",
    "decompose",
    "dial",
    "evaluate",
    "export",
    "load",
    "repair",
    "report",
    "run",
    "save",
    "search",
    "sequence",
    "spectra",
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
