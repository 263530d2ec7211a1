"""What a recipe says of the tasks."""

from __future__ import annotations
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from forgetless.errors import RecipeError
from forgetless.reading import friendly, load_yaml, with_overrides
from forgetless.core.settings import Count, Name, Section



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
