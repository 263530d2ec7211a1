"""Adapters on an untouched base: the only package that knows PEFT's insides.

`layer` is the anchored layer, `attachment` puts a method's start on a model, `folders` writes and
reads adapters.
"""

from forgetless.adapters.anchored import plain_factors
from forgetless.adapters.attachment import attach
from forgetless.adapters.folders import ExportReport, down_projections, export, load, save
from forgetless.adapters.layer import adapted_layers, delta_weights

__all__ = [
    "ExportReport",
    "adapted_layers",
    "attach",
    "delta_weights",
    "down_projections",
    "export",
    "load",
    "plain_factors",
    "save",
]
