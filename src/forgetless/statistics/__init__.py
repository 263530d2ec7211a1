"""Second moments of layer inputs: what the base's activations look like on the text to keep.

For every target layer, with x (in,) the layer's input at one token::

    second_moment = mean over tokens that are not padding of x x^T        (in, in), float64

This is not centred; CorDA's code calls it a covariance. Everything is summed in float64: in lower
precision the smallest eigenvalues, which are all that LoRA-Null uses, are rounding errors.
"""

from forgetless.statistics.collection import collect
from forgetless.statistics.moments import LayerStatistics, Statistics

__all__ = ["LayerStatistics", "Statistics", "collect"]
