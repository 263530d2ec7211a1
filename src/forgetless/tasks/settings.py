"""What a recipe says of the tasks."""

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator

from forgetless.core.settings import Section


class TaskSettings(Section):
    """What training should raise and what it should not lower: names or mappings."""

    learning: list[Any] = []
    forgetting: list[Any] = []

    @field_validator("learning", "forgetting")
    @classmethod
    def _specs(cls, value: list[Any]) -> list[Any]:
        for position, spec in enumerate(value):
            if not (isinstance(spec, str) and spec) and not (isinstance(spec, Mapping) and spec):
                raise ValueError(
                    f"number {position + 1} must be a task's name or a mapping with 'kind', "
                    f"got {spec!r}"
                )
        return value
