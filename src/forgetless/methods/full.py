"""Full fine-tuning: no adapter; every weight is trained. The upper bound of what can be learned."""

from __future__ import annotations

from forgetless.core.method import Method

METHOD = Method(
    name="full",
    summary="every weight is trained, without an adapter",
    paper="—",
    trains=("W",),
    factors=None,
)
