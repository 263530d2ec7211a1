"""What a model was loaded from, where that can still be read."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


def stored_config(model: Any) -> PretrainedConfig | None:
    """The config that lies where a model was loaded from; None where it is not on this machine."""
    config: Any = model.config
    try:
        content, _ = type(config).get_config_dict(
            config._name_or_path,
            revision=getattr(model, "hub_revision", None),
            local_files_only=True,
        )
    except OSError:
        return None
    found: PretrainedConfig = type(config).from_dict(content)
    return found
