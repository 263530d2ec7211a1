"""How far a classifier has moved from its base, by what the base's own head says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.core.errors import UserError
from forgetless.core.metrics import mean_stderr
from forgetless.tasks.accuracy import ClassTask, batch_by_batch, of_any_class
from forgetless.tasks.base import Item, TaskResult

if TYPE_CHECKING:
    from torch import Tensor

    from forgetless.tasks.base import Model


@dataclass(frozen=True)
class ClassKL(ClassTask):
    """Mean KL divergence of the own head's classes from what they were under the base.

        KL = 1 / N * sum_i sum_c p_base(c | x_i) * log( p_base(c | x_i) / p_model(c | x_i) )

    over N images or sentences, whose own classes do not matter. In nats per example, 0 or more,
    lower is better; exactly 0 for a model whose logits are the base's. `extra` has
    `top1_agreement`, the share of which both find the same class likeliest, with its standard
    error. An item's answer is the class that the model finds likeliest, its expected one that of
    the base.

    Attributes:
        path: as for image_accuracy or sentence_accuracy.
        name: of the task.
        limit: the first so many only.

    Raises:
        UserError: settings out of range, or no such file.
    """

    kind = "class_kl"
    summary = "distance to the base under its own head: KL(base || model) per image or sentence"
    needs_reference = True

    path: str | Path
    name: str = "class_kl"
    limit: int | None = None

    def content(self) -> Sequence[object]:
        """The examples without what lies beside them."""
        return (self.examples.fingerprint,)

    def require_known(self, reader: Any, labels: Sequence[Any]) -> None:
        """Raise that the base has no head of its own."""
        if not reader.under("own").classes:
            raise UserError(
                f"task {self.name!r} compares what the base's own head says, and this base is an "
                "encoder without one; neighbours or retrieval needs none"
            )

    def measure(
        self, model: Model, processor: Any, reference: Model | None, batch_size: int | None
    ) -> TaskResult:
        """The divergence of `model` from `reference`."""
        import torch
        from peft import PeftModel

        from forgetless.data.modality import modality_of
        from forgetless.models.state import adapter_off, evaluating
        from forgetless.tasks.inference import require_numbers
        from forgetless.tasks.journal import in_batches

        if reference is None and not isinstance(model, PeftModel):
            raise UserError(
                f"task {self.name!r} needs the base to compare with: pass reference=base, or a "
                "PeftModel"
            )
        reader = modality_of(model).reader(processor, model.config)
        self.require_known(reader, ())
        own = {number: name for name, number in reader.under("own").classes.items()}
        rows = of_any_class(model, self.examples, reader)
        parts, batch_of = batch_by_batch(model, rows, batch_size)

        def logits_of(one: Any, places: Sequence[int]) -> Tensor:
            logits: Tensor = one(**batch_of(places)[0]).logits[:, : len(own)].double().cpu()
            require_numbers(logits)
            return logits.log_softmax(-1)

        def answers(places: Sequence[int]) -> list[list[float]]:
            """The divergence, the base's likeliest class and the model's."""
            ours = logits_of(model, places)
            if reference is not None:
                base = logits_of(reference, places)
            else:
                with adapter_off(model):
                    base = logits_of(model, places)
            distance = (base.exp() * (base - ours)).sum(-1)
            columns = [distance, base.argmax(-1).double(), ours.argmax(-1).double()]
            return torch.stack(columns, dim=1).tolist()

        asked = [dict(record) for record in self.examples]
        with evaluating(model), evaluating(model if reference is None else reference):
            found = in_batches(self.kind, asked, parts, answers)
        items = [
            Item(
                id=str(number),
                prompt=self.shown(place, record),
                expected=own[int(before)],
                answer=own[int(now)],
                score=distance,
            )
            for number, (place, record, (distance, before, now)) in enumerate(
                zip(self.examples.places, self.examples, found, strict=True)
            )
        ]
        same = mean_stderr([float(before == now) for _, before, now in found])
        extra = {
            "examples": len(items),
            "top1_agreement": same.value,
            "top1_agreement_stderr": same.stderr,
        }
        return TaskResult.of_items(self, items, metric="kl", higher_is_better=False, extra=extra)


TASK = ClassKL
