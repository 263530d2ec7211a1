"""A PostgreSQL server of Debian's package, on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Server:
    """A server that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._databases = folder, 0
        self._process: subprocess.Popen[bytes] | None = None
        folder.chmod(0o755)
        if os.getuid() == 0:  # the server refuses to run as root
            owner = pwd.getpwnam("postgres")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        options = ["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8"]
        self._run("initdb", "-D", str(folder / "data"), *options).wait()

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        user = "postgres" if os.getuid() == 0 else None
        return subprocess.Popen(
            [str(BINARIES[-1] / program), *arguments],
            cwd=self._folder,
            user=user,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = ["-c", "listen_addresses=", "-c", "fsync=off"]
        place = ["-D", str(self._folder / "data"), "-k", str(self._folder)]
        self._process = self._run("postgres", *place, *settings)
        for _ in range(300):
            if self._run("pg_isready", "-h", str(self._folder), "-U", "postgres").wait() == 0:
                return
            time.sleep(0.1)
        raise AssertionError("the database did not start")

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"trials{self._databases}"
        made = self._run("createdb", "-h", str(self._folder), "-U", "postgres", name).wait()
        assert made == 0
        return f"postgresql://postgres@/{name}?host={self._folder}"

    def stop(self) -> None:
        """Stop it at once, as in a crash of the machine but for its files."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()


def why_not() -> str:
    """Why there is no such server; empty where there is one."""
    return "" if BINARIES else "needs PostgreSQL: apt-get install postgresql"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A PostgreSQL server, which is stopped at the end."""
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:  # a short path for its socket
        found = Server(Path(folder))
        found.start()
        yield found
        found.stop()
