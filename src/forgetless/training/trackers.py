"""Where a training is reported besides its own log: TensorBoard, Trackio, Weights & Biases, MLflow.

transformers' own integrations do the reporting. Here they learn that a run bears its folder's name
in a project that bears the name of the folder above, and that a resumed run goes on.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from forgetless.training import checkpoints
from forgetless.training.settings import TrainingSettings

STATE_KEY = "forgetless_mlflow_run"
"""Under which a checkpoint has the name that MLflow gave the run, for it takes none."""


def tracker_problems(settings: TrainingSettings) -> Iterator[str]:
    """What is to be installed for the trackers."""
    for name in settings.report_to:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            yield (
                f"training.report_to: {name!r} is not installed; pip install {name}, or leave it "
                "out: the run's log.jsonl has the same numbers"
            )


class Trackers(TrainerCallback):
    """Names a run to the trackers.

    Args:
        names: of the packages.
        folder: of the run.
        checkpoint: from which the training goes on, if it does.
    """

    def __init__(self, names: Sequence[str], folder: Path, checkpoint: Path | None) -> None:
        self.names = list(names)
        self.folder = folder.resolve()
        self.run, self.project = self.folder.name, self.folder.parent.name
        self._mlflow_run: str | None = None
        if checkpoint is not None:
            self._mlflow_run = checkpoints.callback_state(checkpoint, STATE_KEY)

    @contextmanager
    def named(self) -> Iterator[None]:
        """What the integrations read in the environment; what the user has set there stays."""
        known: dict[str, dict[str, str | None]] = {
            "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(self.folder / "tensorboard")},
            "wandb": {
                "WANDB_PROJECT": self.project,
                "WANDB_RUN_ID": self.run,
                "WANDB_RESUME": "allow",
            },
            "mlflow": {"MLFLOW_EXPERIMENT_NAME": self.project, "MLFLOW_RUN_ID": self._mlflow_run},
        }
        wanted = {key: v for name in self.names for key, v in known.get(name, {}).items()}
        added = {key: v for key, v in wanted.items() if v and key not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for key in added:
                os.environ.pop(key, None)  # MLflow takes away what it has read
            if "wandb" in self.names and "wandb" in sys.modules:
                sys.modules["wandb"].finish()  # or the next training would go on with this run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "mlflow" in self.names and state.is_world_process_zero:
            run = sys.modules["mlflow"].active_run()
            state.stateful_callbacks[STATE_KEY] = run.info.run_id
