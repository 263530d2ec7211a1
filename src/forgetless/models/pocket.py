"""The small base model that is shipped with the package. No torch."""

from pathlib import Path

__all__ = ["base_path"]


def base_path() -> Path:
    """Folder of the shipped base model, readable by `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(__file__).parents[1] / "data" / "pocket" / "base"
