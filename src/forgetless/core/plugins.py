"""What others add to a table of ours: by an entry point, or named as ``module:name``."""

import glob
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from forgetless.core.errors import UserError


def offered(
    group: str, what: str, ours: Collection[str], fault_of: Callable[[str, Any], str]
) -> dict[str, Any]:
    """What other packages offer by their entry points; with a warning for each left out.

    `group` is such as ``forgetless.methods``, `what` one of them is called in messages, `ours` are
    names that are taken, and `fault_of` says what is wrong with an object; empty for nothing.
    """
    found: dict[str, Any] = {}
    for point in entry_points(group=group):
        try:
            offer = point.load()
        except Exception as problem:  # whatever another package does wrong, ours are there
            fault = f"{type(problem).__name__}: {problem}"
        else:
            fault = fault_of(point.name, offer)
        if not fault and point.name in {*ours, *found}:
            fault = f"there is a {what} of this name already"
        if fault:
            warnings.warn(
                f"the entry point {point.value!r} of the {what} {point.name!r} is left out: "
                + fault,
                stacklevel=2,
            )
        else:
            found[point.name] = offer
    return found


def is_named(name: str) -> bool:
    """Whether a name is one of ``module:name``."""
    return ":" in name


def named(name: str, what: str, fault_of: Callable[[Any], str]) -> Any:
    """The object that ``module:name`` says, of a module that can be imported.

    A recipe may be somebody else's, and so may the files beside it: a module of the working
    directory is imported only where PYTHONPATH names that directory, or where it is loaded already.
    Messages say `what` it has to be; `fault_of` says what is wrong with it, empty for nothing.

    Raises:
        UserError: there is none, its module fails or lies where code is not run unasked, or it is
            something else.
    """
    module, _, attribute = name.partition(":")
    if _is_beside_unasked(module.partition(".")[0]):
        raise UserError(
            f"{what} {name!r} would run code of the working directory, which is not done unasked; "
            "read it, and if you trust it set PYTHONPATH=. for this command"
        )
    try:
        found = getattr(import_module(module), attribute)
    except Exception as problem:  # it is the user's own code
        fault = f"{type(problem).__name__}: {problem}"
    else:
        fault = fault_of(found)
    if fault:
        raise UserError(
            f"{what} {name!r} cannot be used ({fault}); write module:name, of an installed package "
            "or of a folder that PYTHONPATH names"
        )
    return found


def _is_beside_unasked(package: str) -> bool:
    """Whether a package lies in the working directory, and PYTHONPATH does not name that."""
    here = Path.cwd()
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if package in sys.modules or any(Path(path).resolve() == here.resolve() for path in paths):
        return False
    return (here / package).is_dir() or any(here.glob(f"{glob.escape(package)}.*"))


def code_hash(name: str) -> str:
    """SHA-256 of the file of the module that a ``module:name`` is in."""
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(b"" if file is None else Path(file).read_bytes()).hexdigest()
