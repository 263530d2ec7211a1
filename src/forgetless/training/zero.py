"""DeepSpeed's ZeRO, stages 1 and 2: processes share the optimiser's work, every one has the model.

The weights are whole in every process, as under DDP. Each process keeps the optimiser's state of
its part of them (stage 1) and the sum of its part of the gradients (stage 2), moves that part, and
gives it to the others. DeepSpeed does this; loss, precision, schedule and checkpoints stay those of
`Trainer`, to which the engine looks like DDP. So the files are those of one process: the parts of
the optimiser's state are put together before they are written, and nothing of DeepSpeed's is read.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from copy import deepcopy
from importlib import import_module
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from forgetless.core.errors import UserError
from forgetless.training.devices import refuse_packed

_LARGEST_BUCKET = 500_000_000
"""Gradients that DeepSpeed sends at once, by its own default; it takes the room at the start."""


class Zero:
    """Has an accelerator train by a DeepSpeed engine.

    Args:
        accelerator: of a trainer that has not prepared its model yet.
        model: to be trained, whole.
        optimizer: for it. From here on its `state_dict` gives and takes the state of whole weights,
            and must be called in every process; the first one gets the state.
        stage: 1 or 2.
        max_grad_norm: to which gradients are clipped.

    Raises:
        UserError: weights that DeepSpeed would not train as one process does.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        stage: int,
        max_grad_norm: float,
    ) -> None:
        refuse_packed(model, f"ZeRO-{stage}")
        for name, weight in model.named_parameters():
            if weight.requires_grad and weight.dtype != torch.float32:
                raise UserError(
                    f"{name!r} is trained in {str(weight.dtype).removeprefix('torch.')}, of which "
                    "DeepSpeed keeps a second, larger copy that no checkpoint here has; load the "
                    "model with dtype 'float32' (training in precision 'bf16' is as fast), or "
                    "train under DDP"
                )
        self.optimizer = optimizer
        self.groups: list[list[nn.Parameter]] = [g["params"] for g in optimizer.param_groups]
        self.engine: Any = None
        self._own = {weight: set(vars(weight)) for weights in self.groups for weight in weights}
        trained = sum(weight.numel() for weight in self._own)
        self._config = {
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": min(trained, _LARGEST_BUCKET),
            },
            "gradient_clipping": max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": 1,  # asked for, and read by its clocks alone
        }
        self._accelerator = accelerator
        self._prepare = accelerator.prepare_model
        accelerator.prepare_model = self._start
        accelerator.prepare_optimizer = lambda optimizer, **_: DeepSpeedOptimizerWrapper(optimizer)
        accelerator.backward = self._backward
        accelerator.no_sync = lambda *_, **__: nullcontext()
        accelerator.clip_grad_norm_ = lambda *_, **__: self.norm

    def _start(self, model: nn.Module, *_: Any, **__: Any) -> Any:
        """The engine around the model; from now on the optimiser has a part of the weights."""
        with redirect_stdout(sys.stderr):  # it prints what it has compiled
            deepspeed: Any = import_module("deepspeed")
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            self.engine, *_rest = deepspeed.initialize(
                model=self._prepare(model, evaluation_mode=True),
                optimizer=self.optimizer,
                config=self._config,
            )
        self.optimizer.register_state_dict_post_hook(self._give)
        self.optimizer.register_load_state_dict_pre_hook(self._take)
        return self.engine

    def _backward(self, loss: Tensor, **_: Any) -> None:
        """Add a batch's gradients; after the last of a step also clip them and move the weights.

        Trainer's own step comes later, and the wrapped optimizer does nothing in it.
        """
        is_last = self._accelerator.sync_gradients
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if is_last:
            self.engine.step()

    @property
    def norm(self) -> float:
        """Of the gradients of the last step, before clipping.

        DeepSpeed leaves a step out, and goes on, where it is no number.
        """
        return float(self.engine.get_global_grad_norm())

    def end(self) -> None:
        """Leave the model as it is without DeepSpeed."""
        if self.engine is None:
            return
        self.engine.destroy()
        for hook in (self.engine.module_forward_pre_hook, self.engine.module_forward_post_hook):
            hook.remove()
        for weight, own in self._own.items():
            weight.data = weight.data.clone()  # they are pieces of one tensor
            for added in set(vars(weight)) - own:
                delattr(weight, added)

    # ---- the optimiser's state -------------------------------------------------------------------

    def _give(self, _: Any, found: dict[str, Any]) -> dict[str, Any]:
        """The state of whole weights; empty but in the first process."""
        state: dict[int, dict[str, Any]] = {}
        groups, numbers = [], count()
        for weights, group in zip(self.groups, found["param_groups"], strict=True):
            (part,) = group["params"]
            entry = found["state"].get(part, {})
            mine = {next(numbers): weight for weight in weights}
            groups.append({**group, "params": list(mine)})
            for number, weight in mine.items():
                whole = {key: _whole(weight, value) for key, value in entry.items()}
                if whole and distributed.get_rank() == 0:
                    state[number] = whole
        return {**found, "state": state, "param_groups": groups}

    def _take(self, optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """The state of this process's part of the weights."""
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for number, (weights, group) in enumerate(
            zip(self.groups, given["param_groups"], strict=True)
        ):
            (part,) = optimizer.param_groups[number]["params"]
            groups.append({**group, "params": [number]})
            of = dict(zip(weights, group["params"], strict=True))
            found = [(w, given["state"][n]) for w, n in of.items() if n in given["state"]]
            if found:
                state[number] = {
                    key: _part(part, [(weight, entry[key]) for weight, entry in found])
                    for key in found[0][1]
                }
        return {**given, "state": state, "param_groups": groups}


def _whole(weight: nn.Parameter, value: Any) -> Any:
    """What all processes have of a weight's state, put together; its own copy of a number."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return deepcopy(value)  # or who loads it would count the steps of all weights in one tensor
    whole = torch.zeros(weight.numel(), dtype=value.dtype, device=value.device)
    for in_weight, in_part in _places(weight):
        whole[in_weight] = value[in_part]
    distributed.all_reduce(whole)
    return whole.view_as(weight).cpu()


def _part(part: Tensor, found: Iterable[tuple[nn.Parameter, Any]]) -> Any:
    """What a process has of the states of all weights of a group; the reverse of `_whole`."""
    piece: Tensor | None = None
    for weight, value in found:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if piece is None:
            piece = torch.zeros(part.shape, dtype=value.dtype, device=part.device)
        for in_weight, in_part in _places(weight):
            piece[in_part] = value.flatten()[in_weight].to(piece.device)
    return piece


def _places(weight: nn.Parameter) -> Iterator[tuple[slice, slice]]:
    """Where the piece of a weight that is moved here lies in it, and in this process's part."""
    mapping = getattr(weight, "_hp_mapping", None)
    if mapping is not None:
        for_weight, for_part = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield (
            slice(for_weight.start, for_weight.start + for_weight.numel),
            slice(for_part.start, for_part.start + for_part.numel),
        )
