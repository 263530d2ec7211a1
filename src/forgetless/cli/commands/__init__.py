"""What the verbs for single stages do: statistics, a start, scores, an export.

They take values and give results; the command line reads the words and prints.
"""

from forgetless.commands.exports import export
from forgetless.commands.folders import Trained
from forgetless.commands.measuring import Measurement, measure, write_scores
from forgetless.commands.starts import Start, collect_statistics, init

__all__ = [
    "Measurement",
    "Start",
    "Trained",
    "collect_statistics",
    "export",
    "init",
    "measure",
    "write_scores",
]
