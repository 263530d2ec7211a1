"""The bounds of pyproject.toml are those that the tests ran with."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
NOT_IN_THE_OLDEST = {"deepspeed", "quantised", "ray", "docs", "dev"}


def asked() -> Iterator[Requirement]:
    """What the package and its optional parts ask for, but those that have no test there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield from map(Requirement, project["dependencies"])
    for part, requirements in project["optional-dependencies"].items():
        if part not in NOT_IN_THE_OLDEST:
            yield from map(Requirement, requirements)


def pinned(file: str) -> dict[str, Version]:
    """The release of each package in a file of constraints."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(release) for name, release in pairs}


def test_the_oldest_releases_are_the_lower_bounds() -> None:
    oldest = pinned("constraints-oldest.txt")
    assert oldest.pop("torch") == pinned("constraints.txt")["torch"]
    lower = {
        canonicalize_name(each.name): Version(bound.version)
        for each in asked()
        for bound in each.specifier
        if bound.operator == ">=" and each.name not in ("torch", "forgetless")
    }
    assert lower == oldest


def test_the_oldest_releases_ask_for_none_that_is_newer() -> None:
    """Of those that are as old here; what the others ask for is not known without them."""
    oldest = pinned("constraints-oldest.txt")
    for name, release in oldest.items():
        if Version(version(name)) == release:
            for each in map(Requirement, requires(name) or ()):
                pin = oldest.get(canonicalize_name(each.name))
                if pin and (each.marker is None or each.marker.evaluate({"extra": ""})):
                    assert pin in each.specifier, f"{name} {release} asks for {each}"


def test_the_usual_releases_are_within_the_bounds() -> None:
    usual = pinned("constraints.txt")
    for each in asked():
        if each.name != "forgetless":
            assert usual[canonicalize_name(each.name)] in each.specifier, each
