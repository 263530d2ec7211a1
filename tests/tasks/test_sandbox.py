"""The sandbox: harmless programs pass, hostile ones neither pass nor reach anything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forgetless.core.errors import UserError
from forgetless.tasks import CodeResult, run_code
from forgetless.tasks.sandbox import _idle, _Supervisor
from tests.hostile import HOSTILE

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
pytestmark = linux


@pytest.fixture(scope="module")
def listening() -> Iterator[socket.socket]:
    """A server on this machine that must not hear from anybody."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        yield server


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_and_reaches_nothing(
    name: str, tmp_path: Path, listening: socket.socket
) -> None:
    canary = tmp_path / "canary"
    canary.write_text("precious")
    program = HOSTILE[name].format(
        canary=canary, folder=tmp_path, port=listening.getsockname()[1], parent=os.getpid()
    )
    before = (canary.stat().st_mode, sorted(os.listdir(tmp_path)), _visible())
    started = time.monotonic()
    result = run_code(program, seconds=0.3, memory_bytes=256 << 20)
    assert not result.passed, result
    assert result.reason
    assert "\n" not in result.reason
    assert "precious" not in result.reason
    assert time.monotonic() - started < 20
    assert canary.read_text() == "precious"
    assert (canary.stat().st_mode, sorted(os.listdir(tmp_path)), _visible()) == before
    with pytest.raises(BlockingIOError):
        listening.accept()


def test_there_are_many_hostile_programs() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize(
    "program",
    [
        "",
        "x = 1",
        "def f(x):\n    return x + 1\n\nassert f(1) == 2",
        "from __future__ import annotations\nassert __name__ == '__main__'",
        "import math, re, heapq, itertools, collections, random, hashlib, typing, datetime",
        "print('hello')",
        "open('mine.txt', 'w').write('x')\nassert open('mine.txt').read() == 'x'",
        "import os\nos.mkdir('a')\nos.rename('a', 'b')\nos.rmdir('b')",
        "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\nasyncio.run(f())",
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(3) as p:\n    assert list(p.map(abs, [-1, 2])) == [1, 2]",
        "import sys\nsys.setrecursionlimit(5000)\nf = lambda n: n and f(n - 1)\nf(4000)",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "x = bytearray(100 << 20)",
        "import os\nassert not [k for k in os.environ if k not in ('HOME', 'TMPDIR')]",
        "import logging, decimal, zoneinfo, sqlite3, csv, json, pickle, inspect, doctest",
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
        "open('/dev/null', 'w').write('x')",
    ],
)
def test_a_harmless_program_passes(program: str) -> None:
    result = run_code(program)
    assert result.passed, result


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("assert 1 == 2, 'a\\nb'", "AssertionError: a b"),
        ("import sys; sys.exit(3)", "left before its end, with exit status 3"),
        ("while True: pass", "did not end within 0.3 s"),
        ("open('/etc/passwd')", "tried to read '/etc/passwd'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("while True: print('x' * 100)", "wrote more than 1 MiB"),
        ("import os; os.fork()", "tried to start a process (os.fork)"),
    ],
)
def test_the_reason_says_what_happened(program: str, reason: str) -> None:
    assert run_code(program, seconds=0.3).reason == reason


KERNEL = {
    "fork": "import os\ntry: os.fork()\nexcept OSError: pass",
    "exec": "import os\ntry: os.execv('/bin/true', ['true'])\nexcept OSError: pass",
    "vfork": "import subprocess\ntry: subprocess.run(['/bin/true'])\nexcept OSError: pass",
    "socket": "import socket\ntry: socket.socket()\nexcept OSError: pass",
    "datagrams": "import socket\ntry: socket.socketpair(type=socket.SOCK_DGRAM)\nexcept OSError: 1",
    "kill": "import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass",
    "setrlimit": "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "ctypes fork": "import ctypes\nctypes.CDLL(None).fork()",
    "ctypes crash": "import ctypes\nctypes.string_at(0)",
    "ptrace": "import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)",
    "unshare": "import ctypes\nctypes.CDLL(None).unshare(0x10000000)",
    "memfd": "import os\ntry: os.memfd_create('x')\nexcept OSError: pass",
    "io_uring": "import ctypes\nctypes.CDLL(None).syscall(425, 1, 0)",
    "read": "open({canary!r})",
    "write": "open({canary!r}, 'w')",
    "remove": "import os\nos.remove({canary!r})",
    "proc": "open('/proc/self/mem', 'rb')",
    "parent's environment": "import os\nopen(f'/proc/{{os.getppid()}}/environ', 'rb')",
    "accounts": "open('/etc/passwd')",
    "repository": "open({here!r})",
    "temporary folder": "open('/tmp/forgetless-hostile', 'w')",
    "shared memory": "open('/dev/shm/forgetless-hostile', 'w')",
    "link": "import os\nos.symlink({canary!r}, 'l')\nopen('l')",
    "rights": "import os\nos.chmod({canary!r}, 0)",
}


@pytest.mark.parametrize("option", [(), ("--no-private-root",)], ids=["private-root", "landlock"])
def test_the_kernel_alone_holds_a_program(option: tuple[str, ...], tmp_path: Path) -> None:
    supervisor = _Supervisor(*option)
    if option and "landlock" not in " ".join(supervisor.layers):
        pytest.skip("this kernel has no Landlock")
    canary = tmp_path / "canary"
    canary.write_text("precious")
    try:
        for name, program in KERNEL.items():
            text = program.format(canary=str(canary), here=__file__)
            request = {"program": text, "seconds": 2.0, "memory_bytes": 256 << 20, "guarded": False}
            answer = supervisor.ask(request, timeout=60)
            assert answer is not None, name
            assert not answer["passed"], (name, answer)
        request["program"] = "open('mine', 'w').write('x')"
        answer = supervisor.ask(request, timeout=60)
        assert answer is not None
        assert answer["passed"], answer
    finally:
        supervisor.end()
    assert canary.read_text() == "precious"
    assert canary.stat().st_mode & 0o777


def test_a_program_sees_nothing_of_the_one_before() -> None:
    leave = "import os, builtins\nopen('left', 'w').write('x')\nbuiltins.left = 1\nos.mkdir('d')"
    look = "import os, builtins\nassert os.listdir('.') == []\nassert not hasattr(builtins, 'left')"
    assert run_code(leave).passed
    assert run_code(look).passed


def test_programs_may_run_at_the_same_time() -> None:
    programs = [f"assert {i} % 2" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run_code, programs))
    assert [result.passed for result in results] == [i % 2 == 1 for i in range(12)]


def test_no_process_is_left_when_the_user_ends() -> None:
    script = """
        from forgetless.tasks.sandbox import _idle
        from forgetless.tasks import CodeResult, run_code
        assert run_code("x = 1").passed
        print(_idle[0].process.pid)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_killed_supervisor_is_replaced() -> None:
    assert run_code("x = 1").passed
    for supervisor in _idle:
        supervisor.process.kill()
    assert run_code("x = 1").passed


def test_a_thread_may_end_before_the_next_program() -> None:
    for _ in range(2):
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(run_code("x = 1").passed))  # noqa: B023
        thread.start()
        thread.join()
        assert found == [True]


def test_time_and_memory_are_what_was_asked_for() -> None:
    assert run_code("import time; time.sleep(0.3)", seconds=5).passed
    started = time.monotonic()
    assert not run_code("import time; time.sleep(60)", seconds=0.3).passed
    assert time.monotonic() - started < 10
    assert run_code("x = bytearray(300 << 20)").passed
    assert not run_code("x = bytearray(300 << 20)", memory_bytes=256 << 20).passed
    assert not run_code("x = bytearray(600 << 20)").passed


@pytest.mark.parametrize(
    "settings", [{"seconds": 0}, {"seconds": -1}, {"seconds": 1e9}, {"memory_bytes": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="got"):
        run_code("x = 1", **settings)  # type: ignore[arg-type]


def test_a_program_must_be_text() -> None:
    with pytest.raises(UserError, match="must be text, got bytes"):
        run_code(b"x = 1")  # type: ignore[arg-type]


def test_canonical_solutions_of_humaneval_pass(shared_data: Path) -> None:
    rows = _rows(shared_data / "humaneval" / "HumanEval.jsonl")
    programs = [
        f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})"
        for row in rows
    ]
    assert len(programs) == 164
    assert _failures(programs) == []


def test_solutions_of_the_test_split_of_mbpp_pass(shared_data: Path) -> None:
    rows = [row for row in _rows(shared_data / "mbpp" / "mbpp.jsonl") if 10 < row["task_id"] <= 510]
    programs = ["\n".join([r["code"], r["test_setup_code"], *r["test_list"]]) for r in rows]
    assert len(programs) == 500
    assert _failures(programs) == []


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _failures(programs: list[str]) -> list[tuple[str, CodeResult]]:
    """Two at a time, as a machine's other core would be idle otherwise."""
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda program: run_code(program, seconds=20), programs))
    return [(p, r) for p, r in zip(programs, results, strict=True) if not r.passed]


def _visible() -> tuple[bool, ...]:
    places = ("/tmp/forgetless-hostile", "/tmp/outside", "/dev/shm/forgetless-hostile")
    return tuple(Path(place).exists() for place in places)
