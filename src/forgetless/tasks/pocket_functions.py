"""The second skill to learn: small Python functions, scored by running their tests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from forgetless.data.pocket.functions import functions
from forgetless.tasks.base import whole_number
from forgetless.tasks.code import CodeTask, Program, defined_names


@dataclass(frozen=True)
class PocketFunctions(CodeTask):
    """pass@1 on functions of the pocket world, each run with its tests in the sandbox.

    The functions are of the test split, whose sentences no training function has. The value is the
    mean over problems of the share of samples that pass; `extra` has pass@k.

    Attributes:
        name: of the task.
        limit: how many functions.
        seed: which functions, and of the draws.
        samples: programs a problem.
        k: report pass@k for these.
        temperature: 0 for the most probable program.
        top_p: draw from the most probable tokens of this share.
        max_new_tokens: length of a function.
        seconds: a function may take.

    Raises:
        UserError: settings out of range.
    """

    kind = "pocket_functions"
    summary = "small functions that pass their tests (pass@1)"
    stop = ("\nQ", "\ndef")

    name: str = "pocket_functions"
    limit: int = 200
    seed: int = 0
    samples: int = 1
    k: Sequence[int] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 72
    seconds: float = 3.0

    def problems(self) -> Iterable[str | None]:
        """Of every setting."""
        return [whole_number("limit", self.limit), *super().problems()]

    @cached_property
    def _programs(self) -> list[Program]:
        return [
            Program(
                id=f"test{self.seed}:{i}",
                prompt=made.prompt,
                expected=made.completion,
                before=made.head,
                test="\n".join(made.tests),
                names=defined_names(made.head + made.completion),
            )
            for i, made in enumerate(functions(self.limit, self.seed, "test"))
        ]

    def programs(self) -> Sequence[Program]:
        """The functions with their tests."""
        return self._programs


TASK = PocketFunctions
