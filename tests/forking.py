"""The server behind `tests.quick_python`, as a program: it is forked for whoever connects.

It loads libraries alone. The package is imported in a fork, from wherever that finds it: the
working tree, a copy, or one with plugins beside it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import types
import warnings
from typing import Any

LIBRARIES = (
    *("torch", "transformers", "transformers.trainer", "transformers.models.auto.modeling_auto"),
    *("transformers.models.llama.modeling_llama", "peft", "accelerate", "datasets", "typer"),
    *("optuna.storages", "optuna.samplers", "scipy.stats", "pydantic.main", "rich.progress"),
    *("optuna.storages._rdb.storage", "optuna.storages._rdb.models", "alembic.command"),
    *("sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql.psycopg"),
)

PATH = [*sys.path]
"""Where a process finds modules behind those of its own PYTHONPATH."""


def serve(address: str) -> dict[str, Any]:
    """Fork for each who asks, as long as somebody is connected; in a fork, what was asked for."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{address}")
    listener.listen(64)
    if os.fork():
        os._exit(0)  # who started us need not wait for us, but for this
    gc.set_threshold(50_000, 10, 10)  # as in tests/conftest.py
    for name in LIBRARIES:
        importlib.import_module(name)
    importlib.import_module("sqlalchemy.orm").configure_mappers()
    gc.collect()
    gc.freeze()
    os.fsync = lambda fd: None  # as in tests/conftest.py
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    connected = [listener]
    while True:
        for source in select.select(connected, [], [])[0]:
            if source is listener:
                connected.append(listener.accept()[0])
                continue
            word, files, *_ = socket.recv_fds(source, 1, 3)
            connected.remove(source)
            if word and not os.fork():
                for other in connected:
                    other.close()
                return forked(source, files)
            source.close()
            for file in files:
                os.close(file)
            if connected == [listener]:
                os._exit(0)


def forked(source: socket.socket, files: list[int]) -> dict[str, Any]:
    """What is asked for, in a process that has the files of who asks, and ends with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked: dict[str, Any] = json.loads(source.makefile().readline())
    process = os.fork()
    for number, file in enumerate(files):
        if not process:
            os.dup2(file, number)
        os.close(file)
    if not process:
        source.close()
        return asked
    for number in range(3):
        os.close(number)
    end = os.pidfd_open(process)
    while end not in select.select((end, source.fileno()), (), ())[0]:
        signals = source.recv(1)  # nothing comes from who was killed
        os.kill(process, signals[0] if signals else signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    source.sendall(f"{code}\n".encode())
    os._exit(0)


def become(asked: dict[str, Any]) -> None:
    """Do what ``python WORDS`` does."""
    words: list[str] = asked["words"]
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    is_deaf = asked["is_deaf"]
    signal.signal(signal.SIGINT, signal.SIG_IGN if is_deaf else signal.default_int_handler)
    sys.executable = asked["python"]  # what it starts begins so too
    while words[0] in ("-W", "-u"):
        if words[0] == "-u":
            sys.stdout.reconfigure(write_through=True)
            words = words[1:]
        else:
            warnings.simplefilter(words[1])  # type: ignore[arg-type]
            words = words[2:]
    kind, what, *rest = words
    own = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = [os.getcwd() if kind == "-m" else "", *own, *PATH]
    sys.path_importer_cache.clear()
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    become(serve(sys.argv[1]))
