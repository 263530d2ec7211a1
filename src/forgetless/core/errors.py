"""What a user did wrong, in words that say what to do next."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend; the command line shows it as one line and exits with 2."""


class RecipeError(UserError):
    """Every problem of one recipe or study, gathered.

    Attributes:
        problems: one sentence each, in the order in which they were found; never empty.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  - ".join([f"{source}: {count}", *self.problems]))


class OtherProcessError(UserError):
    """Another process of this launch failed, and says itself why."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest name that does.

    >>> str(unknown("method", "lora_nul", ["lora", "lora_null_v1"]))
    "unknown method 'lora_nul'; did you mean 'lora_null_v1'? Known: lora, lora_null_v1"
    """
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"unknown {kind} {given!r}{hint} Known: {', '.join(names) or 'none'}")


@contextmanager
def reading(file: str | Path, remedy: str = "") -> Iterator[None]:
    """Turn whatever is raised over the content of a file or folder into a line that names it.

    Libraries raise anything over a damaged file: of a parser's own kind, a TypeError, a bare
    Exception. The first is the cause, for ``--debug``.

    Args:
        file: what is read in the block.
        remedy: what to do about it.

    Raises:
        UserError: anything but what says itself what is wrong: a `UserError`, an OSError, and
            memory or an optional package that is missing.
    """
    try:
        yield
    except (UserError, OSError, MemoryError, ImportError):
        raise
    except Exception as problem:
        hint = f"; {remedy}" if remedy else ""
        raise UserError(f"{file} cannot be read: {first_line(problem)}{hint}") from problem


def first_line(problem: BaseException) -> str:
    """What an error of a library says, in one line without control characters."""
    lines = str(problem).strip().splitlines()
    said = lines[0][:300] if lines else ""
    if isinstance(problem, KeyError):
        said = f"{said} is missing"
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)
    return plain or type(problem).__name__


def first_few(problems: Sequence[str]) -> str:
    """The first three problems in one line, repeated ones once, and how many more there are."""
    distinct = list(dict.fromkeys(problems))
    more = f"; and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    return "; ".join(distinct[:3]) + more
