"""The verb that looks at the machine: versions, devices, optional parts."""

import os
import platform
from importlib.metadata import PackageNotFoundError, metadata, requires, version

import typer
from packaging.requirements import Requirement

from forgetless.cli.options import AsJson
from forgetless.cli.tables import print_json, print_table, print_text

_FOR = {
    "train": "training and runs",
    "eval": "tasks of the lm-evaluation-harness",
    "search": "studies and searches on a database, by several machines",
    "ray": "studies and searches on a cluster",
    "report": "figures and parquet of a report",
    "quantised": "bases in 4 and 8 bit",
    "deepspeed": "ZeRO on several devices",
}
"""What the optional parts are for; the others are made of these, or for those who develop."""


def doctor(as_json: AsJson = False) -> None:
    """Look at what is installed and at the devices; exits 1 where something needed is missing."""
    from forgetless.core.errors import UserError
    from forgetless.tasks.sandbox import run_code

    needed = [Requirement(line) for line in requires("forgetless") or ()]
    extras = sorted(set(metadata("forgetless").get_all("Provides-Extra") or ()) & set(_FOR))
    parts = {"": [r for r in needed if _is_for(r, "")]}
    parts |= {x: [r for r in needed if _is_for(r, x) and not _is_for(r, "")] for x in extras}
    faults = {part: [fault for r in found if (fault := _fault(r))] for part, found in parts.items()}
    try:
        run_code("", seconds=2.0)
        sandbox = "ready"
    except UserError as problem:
        sandbox = str(problem)
    devices = _devices()
    found = {
        "forgetless": version("forgetless"),
        "python": platform.python_version(),
        "packages": {r.name: _installed(r) for r in parts[""]},
        "missing": faults[""],
        "optional": {part: faults[part] for part in extras},
        "devices": devices,
        "sandbox": sandbox,
    }
    if as_json:
        print_json(found)
    else:
        print_text(f"forgetless {found['forgetless']}, Python {found['python']}")
        rows = [[r.name, _installed(r) or "–", _fault(r) or "fits"] for r in parts[""]]
        print_table(["package", "version", ""], rows)
        rows = [
            [x, _FOR[x], "; ".join([*faults[x], f"pip install 'forgetless[{x}]'"])]
            if faults[x]
            else [x, _FOR[x], "ready"]
            for x in extras
        ]
        print_table(["optional part", "for", ""], rows)
        for device in devices:
            print_text(f"device: {device}")
        print_text(f"sandbox for programs that models write: {sandbox}")
    if faults[""]:
        raise typer.Exit(1)


def _is_for(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({"extra": extra})


def _installed(requirement: Requirement) -> str | None:
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return None


def _fault(requirement: Requirement) -> str | None:
    """What is wrong with a package that is asked for, or None."""
    found = _installed(requirement)
    if found is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} is {found}, wanted {requirement.specifier}"
    return None


def _devices() -> list[str]:
    """Accelerators with their memory, and the CPU."""
    import torch

    cpu = f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = [f"{card.name}, {card.total_memory / 2**30:.1f} GiB" for card in cards]
    if not found and (other := torch.accelerator.current_accelerator(check_available=True)):
        found = [str(other)]
    return [*found, cpu]
