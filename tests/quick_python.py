"""A Python whose processes begin with torch, transformers and PEFT loaded, which takes seconds.

Tests that start processes get the path of a program, to use in the place of `sys.executable`, as
a fixture by ``pytest_plugins = ["tests.quick_python"]``. It asks `tests.forking` for a fork.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

SERVER = Path(__file__).with_name("forking.py")

PROGRAM = """#!{python} -IS
# Asks for a fork with our files, folder and environment, and ends as it ends.
import json, os, signal, socket, sys

words = sys.argv[1:]
while words[:1] in (["-W"], ["-u"]):
    words = words[2 if words[0] == "-W" else 1 :]
if words[:1] not in (["-c"], ["-m"]):  # what changes the interpreter itself
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"!"], [0, 1, 2])
is_deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
for number in (signal.SIGTERM, signal.SIGINT)[: 1 if is_deaf else 2]:
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
asked = dict(words=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ), is_deaf=is_deaf)
asked["python"] = {program!r}
server.sendall(json.dumps(asked).encode() + b"\\n")
for number in range(3):
    os.close(number)
code = int(server.makefile().readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of a Python that begins with the libraries loaded; that of all pytest workers."""
    if sys.platform != "linux":
        yield sys.executable
        return
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    program, known = folder / "python", folder / "python.address"
    server = socket.socket(socket.AF_UNIX)
    with FileLock(folder / "python.lock"):
        try:
            server.connect(f"\0{known.read_text()}")
        except OSError:  # we are the first, or all others have ended
            address = f"forgetless-{uuid.uuid4().hex}"
            start(address)
            server.connect(f"\0{address}")
            known.write_text(address)
            text = PROGRAM.format(
                python=sys.executable, address=f"\0{address}", program=str(program)
            )
            program.write_text(text)
            program.chmod(0o755)
    yield str(program)
    server.close()


def start(address: str) -> None:
    """Start a server, which ends when nobody is connected any more."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    nothing = subprocess.DEVNULL
    subprocess.run(
        [sys.executable, "-P", str(SERVER), address],  # tests/statistics is not Python's statistics
        env=environment,
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
        check=True,
    )
