"""Which bases may run the Python code that lies beside their weights. No torch."""

_trusted: set[str] = set()


def trust(base: str) -> None:
    """Let the Python code that lies beside a base's weights run in this process.

    Without this it never does, and nobody is asked.
    """
    _trusted.add(base)


def is_trusted(base: str) -> bool:
    """Whether `trust` was told of this base, by this name."""
    return base in _trusted
