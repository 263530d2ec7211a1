"""The small base models that are shipped with the package. No torch."""

from pathlib import Path


def base_path() -> Path:
    """Folder of the shipped base model, readable by `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(__file__).parents[1] / "data" / "pocket" / "base"


def image_base_path() -> Path:
    """Folder of the shipped image classifier, readable by `AutoModelForImageClassification`."""
    return Path(__file__).parents[1] / "data" / "pocket" / "vision"


POCKETS = {"pocket": base_path, "pocket-vision": image_base_path}
"""Their names as bases -> their folders."""
