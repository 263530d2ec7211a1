"""Training of an adapter or of a whole model on `transformers.Trainer`, resumable at any moment."""

from forgetless.training.checkpoints import remove_checkpoints
from forgetless.training.forgetting import ForgettingCallback
from forgetless.training.loop import TrainingResult, train

__all__ = ["ForgettingCallback", "TrainingResult", "remove_checkpoints", "train"]
