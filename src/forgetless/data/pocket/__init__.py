"""The embedded world: real facts, a small base model that knows them, and new skills to learn.

Nothing here is downloaded, and importing this package imports no torch.
"""

from pathlib import Path

__all__ = ["base_path"]


def base_path() -> Path:
    """Folder of the shipped base model, readable by `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(__file__).parent / "base"
