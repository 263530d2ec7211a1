"""What a recipe says of the training and of what is measured meanwhile."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from forgetless.core.settings import Count, Section, without_idle
from forgetless.training.optimizers import OPTIMIZERS

Beta = Annotated[float, Field(ge=0, lt=1)]


class PreferenceSettings(Section):
    """Learning from pairs of answers, of which one was chosen and the other rejected.

    ``loss`` ``dpo`` compares with the base, ``orpo`` with none; ``beta`` is how strongly DPO holds
    the model to the base, and the weight of ORPO's odds ratio. See `forgetless.data.losses`.
    """

    loss: Literal["dpo", "orpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1


class TrainingSettings(Section):
    """How to train, for so many ``steps``, ``epochs`` or ``tokens``.

    A new setting is one field here and its use: at its default it leaves every run its id, and with
    a ``title`` a model card names it where it is not at its default.

    ``batch_size`` counts the rows of all processes together, so that any number of them do the
    same training; a step has ``gradient_accumulation`` such batches.
    ``loraplus_ratio`` is LoRA+'s rate of B over that of A, which is the learning rate.
    A new head (``adapter.head: new``) has the rate ``head_learning_rate``, or where it is not given
    that of all else, and is trained alone for ``probe_steps`` before the first step (linear
    probing, then fine-tuning: Kumar et al. 2022, arXiv:2202.10054).
    ``attention_dropout`` drops attention weights while training. The schedules ``constant`` and
    ``inverse_sqrt`` end, over the last ``cooldown_ratio`` of the steps, in a straight line to 0.
    After the shares ``measure_at`` of the training, such as 0.25 and 0.5, the weights are kept and
    scored as points of the learning-forgetting curve; the schedule takes no notice of them.
    ``weight_decay`` is that of AdamW, on matrices alone: an adapter's move, and so the model, is
    pulled towards the base, but the weights that ``full`` trains are pulled towards 0 (the penalty
    ``l2_start`` pulls those to the base). ``betas`` and ``eps`` are the optimiser's own where they
    are not given. ``compile`` runs the training, and nothing else, through `torch.compile`: the
    losses are the same up to rounding, and a resumed training too. ``report_to`` names trackers,
    which get what the log gets.
    ``preference`` learns from pairs of answers, a row of the data each, instead of single ones.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    loraplus_ratio: Annotated[float, Field(gt=0, title="LoRA+ ratio")] = 1.0
    head_learning_rate: Annotated[float, Field(gt=0, title="rate of the head")] | None = None
    probe_steps: Annotated[int, Field(ge=0, title="steps of the head alone")] = 0
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens: Count | None = None
    measure_at: list[Annotated[float, Field(gt=0, lt=1)]] = []
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    cooldown_ratio: Annotated[float, Field(ge=0, le=1, title="cool-down")] = 0.0
    attention_dropout: Annotated[float, Field(ge=0, lt=1, title="attention dropout")] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # type: ignore[valid-type]
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] | None = None
    eps: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    preference: PreferenceSettings | None = None
    checkpoint_every: Count = 100
    log_every: Count = 10
    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        durations = {name: getattr(self, name) for name in ("steps", "epochs", "tokens")}
        given = [f"{name}={value:g}" for name, value in durations.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"give one of steps, epochs and tokens, got {got}")
        return self

    @model_validator(mode="after")
    def _cooldown_of_a_flat_schedule(self) -> Self:
        if self.cooldown_ratio and self.schedule in ("cosine", "linear"):
            raise ValueError(
                f"cooldown_ratio is for the schedules constant and inverse_sqrt; {self.schedule!r} "
                "falls to 0 anyway"
            )
        if self.warmup_ratio + self.cooldown_ratio > 1:
            raise ValueError(
                "warmup_ratio and cooldown_ratio together must be at most 1, got "
                f"{self.warmup_ratio:g} and {self.cooldown_ratio:g}"
            )
        return self


class ProbeSettings(Section):
    """What is measured while training, and how much of it may be forgotten; empty for nothing.

    See `forgetless.ForgettingCallback` for every value.
    """

    learning: list[Any] = []
    forgetting: list[Any] = []
    every: Count | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = None
    max_drop: Annotated[float, Field(gt=0)] | None = None
    on_exceed: Literal["stop", "rollback"] = "stop"


_DECIDING_NOTHING = frozenset({"checkpoint_every", "log_every", "report_to"})
"""What is written of a training; no weight depends on it."""

_IN_EVERY_ID = {
    "learning_rate", "steps", "epochs", "batch_size", "gradient_accumulation", "weight_decay",
    "warmup_ratio", "schedule", "max_grad_norm", "optimizer", "precision", "gradient_checkpointing",
}  # fmt: skip
"""The first settings that there were. Those that came later are left out at their defaults, so that
a run from before them keeps its id."""


def what_decides_a_training(settings: TrainingSettings) -> dict[str, Any]:
    """The settings without those that only record, and without later ones at their defaults."""
    values = settings.model_dump(mode="json", exclude=set(_DECIDING_NOTHING))
    fields = TrainingSettings.model_fields.items()
    return without_idle(values, {n: field.default for n, field in fields if n not in _IN_EVERY_ID})


def titled_settings(settings: TrainingSettings) -> dict[str, float]:
    """Those with a title that are not at their default, by title."""
    return {
        field.title: getattr(settings, name)
        for name, field in TrainingSettings.model_fields.items()
        if field.title and getattr(settings, name) != field.default
    }
