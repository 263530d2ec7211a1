"""LoRA-Null with A frozen: the factors of `lora_null_v1`, of which only B is trained.

The update is then (B - B0) A for the whole of training, so with N, D of `lora_null_v1` and λ the
eigenvalues of N, its effect on the kept activations X (tokens, in) stays bounded:

    ‖X ΔWᵀ‖ <= scaling · ‖B - B0‖₂ · √(D_1 / scaling) · √(tokens · Σλ).

Nothing bounds it in v1, where A can turn towards the kept activations.
"""

from __future__ import annotations

from forgetless.core.method import Method
from forgetless.methods.lora_null_v1 import lora_null_v1

METHOD = Method(
    name="lora_null_v2",
    summary="lora_null_v1 with A frozen, so that the update never leaves those directions",
    paper="Tang et al. 2025, LoRA-Null: Low-Rank Adaptation via Null Space for Large Language "
    "Models, arXiv:2503.02659",
    trains=("B",),
    factors=lora_null_v1,
    copies_weight=False,
)
