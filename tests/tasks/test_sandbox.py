"""The sandbox: harmless programs pass, hostile ones neither pass nor reach anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetless.core.errors import UserError
from forgetless.tasks import CodeResult, run_code
from forgetless.tasks.humaneval import HumanEval
from forgetless.tasks.mbpp import MBPP
from forgetless.tasks.sandbox import _idle, _Supervisor, plain
from forgetless.tasks.sandbox.confine import landlock_version
from tests.hostile import FORGED, HOSTILE

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
    # Right but for what it tries, so that nothing but the attempt can make it fail.
    program = f"def answer():\n    return 42\n{program}"
    test = "assert answer() == 42"
    result = run_code(program, test, seconds=0.3, memory_bytes=256 << 20)
    assert not result.passed, result
    assert result.reason
    assert "\n" not in result.reason
    assert "precious" not in result.reason
    assert time.monotonic() - started < 20
    assert canary.read_text() == "precious"
    assert (canary.stat().st_mode, sorted(os.listdir(tmp_path)), _visible()) == before
    with pytest.raises(BlockingIOError):
        listening.accept()


def test_the_right_program_without_an_attempt_passes() -> None:
    assert run_code("def answer():\n    return 42\n", "assert answer() == 42").passed


SMALL = [
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n",
    "def check(candidate):\n    assert candidate([2, 1]) == [1, 2]\n",
    "def check(candidate):\n    assert abs(candidate(2.0) - 1.41) < 0.01\n",
    "def check(candidate):\n    assert candidate('a', 'b').upper() == 'AB'\n",
    "def check(candidate):\n    for i in range(9):\n        assert candidate(i) == i + 1\n",
    "def check(candidate):\n    assert set(candidate('aab')) == {'a', 'b'}\n",
]
WRONG = "def wanted(*given):\n    return 'no such answer'\n"


@pytest.mark.parametrize("name", FORGED)
def test_a_wrong_program_cannot_make_itself_pass(name: str) -> None:
    test = SMALL[list(FORGED).index(name) % len(SMALL)]
    program = WRONG + FORGED[name].replace("NAME", "wanted")
    result = run_code(program, f"{test}\ncheck(wanted)", seconds=0.2)
    assert not result.passed, result
    assert result.reason


@pytest.mark.parametrize("name", FORGED)
def test_a_wrong_program_fails_on_humaneval(name: str, shared_data: Path) -> None:
    """On one problem each; `benchmarks/sandbox.py --forged` tries all on all."""
    place = list(FORGED).index(name)
    row = _rows(shared_data / "humaneval" / "HumanEval.jsonl")[(place * 17) % 164]
    entry = row["entry_point"]
    result = run_code(
        f"{row['prompt']}    return None\n{FORGED[name].replace('NAME', entry)}",
        f"{row['test']}\ncheck({entry})",
        helpers=row["prompt"],
        names=[entry],
        seconds=0.2,
    )
    assert not result.passed, (row["task_id"], result)


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
    "length": "import os\nos.truncate({canary!r}, 0)",
    "pidfd": "import os\nos.pidfd_open({victim})",
    "file's owner": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {victim})",
    "file's signal": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)",
    "file's lease": "import fcntl\nfcntl.fcntl(open('l', 'w'), fcntl.F_SETLEASE, 1)",
    "folder's notices": "import fcntl, os\nfcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, 1)",
    "owner by ioctl": "import fcntl, os\nr, w = os.pipe()\nfcntl.ioctl(r, 0x8901, b'1234')",
    "kill by a socket": "import os, socket\n"
    "one, other = socket.socketpair()\n"
    "import fcntl\n"
    "fcntl.fcntl(one, fcntl.F_SETOWN, {victim})\n"
    "fcntl.fcntl(one, 10, 9)\n"
    "fcntl.fcntl(one, fcntl.F_SETFL, 0o20000)\n"
    "other.send(b'x')",
}
LANDLOCK = landlock_version()
LAYERS = [(), ("--landlock=0",), *[("--no-private-root", f"--landlock={i + 1}") for i in range(7)]]


@pytest.fixture(params=["as it is", "as a user"])
def identity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Whose supervisors are from here on; what `subprocess` takes to be that."""
    if request.param == "as it is":
        return {}
    if os.geteuid():
        pytest.skip("it is a user's already")
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            code = "import sys; sys.exit(sys.version_info < (3, 11))"
            if subprocess.run([python, "-c", code], cwd="/", **nobody, check=False).returncode == 0:
                monkeypatch.setattr(sys, "executable", python)
                monkeypatch.setattr(subprocess, "Popen", partial(subprocess.Popen, **nobody))
                return nobody
    pytest.skip("no Python here that another user may run")


@pytest.fixture(params=LAYERS, ids=" ".join)
def supervisor(request: pytest.FixtureRequest, identity: dict[str, Any]) -> Iterator[_Supervisor]:
    """One for every setting of the layers."""
    for option in request.param:
        if option.startswith("--landlock=") and int(option.partition("=")[2]) > LANDLOCK:
            pytest.skip(f"this kernel has version {LANDLOCK} of Landlock")
    try:
        started = _Supervisor(*request.param)
    except UserError as problem:
        if not identity:
            raise
        pytest.skip(f"not for a user here: {problem}")
    if not request.param and "private root" not in started.layers:
        pytest.skip("no namespaces here")
    yield started
    started.end()


def asked(supervisor: _Supervisor, program: str, test: str = "", **settings: Any) -> dict[str, Any]:
    """The answer to a program that only the kernel looks at."""
    request = {"program": program, "seconds": 5.0, "memory_bytes": 256 << 20, "guarded": False}
    tested = {"test": test, "helpers": "", "names": []}
    answer = supervisor.ask({**request, **settings}, tested, timeout=60)
    assert answer is not None, program
    return answer


def test_the_kernel_alone_holds_a_program(
    supervisor: _Supervisor, identity: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(tempfile.mkdtemp()) if identity else tmp_path
    canary = folder / "canary"
    canary.write_text("precious")
    if identity:
        for path in (folder, canary):
            os.chown(path, 65534, 65534)
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            for name, program in KERNEL.items():
                text = program.format(canary=str(canary), here=__file__, victim=victim.pid)
                answer = asked(supervisor, text)
                assert not answer["passed"], (name, answer)
                assert victim.poll() is None, name
        finally:
            victim.kill()
    assert asked(supervisor, "open('mine', 'w').write('x')")["passed"]
    assert canary.read_text() == "precious"
    assert canary.stat().st_mode & 0o777
    shutil.rmtree(folder)


def test_the_kernel_alone_is_enough_for_the_verdict() -> None:
    """Without the hook that ends a program at its first attempt."""
    supervisor = _Supervisor()
    try:
        for name, forged in FORGED.items():
            program = WRONG + forged.replace("NAME", "wanted")
            answer = asked(supervisor, program, f"{SMALL[0]}\ncheck(wanted)", seconds=0.2)
            assert not answer["passed"], (name, answer)
    finally:
        supervisor.end()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "for i in range(100):\n    open(f'f{i}', 'wb').write(bytes(16 << 20))",
            "wrote more than 64 MiB",
        ),
        (
            "import os\nwhile True:\n    f = open('f', 'wb')\n    f.write(bytes(8 << 20))\n"
            "    os.unlink('f')",
            "wrote more than 64 MiB",
        ),
        (
            "import mmap\nf = open('f', 'w+b')\nf.truncate(1 << 20)\nmmap.mmap(f.fileno(), 0)",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        (
            "import os\nos.posix_fallocate(os.open('f', os.O_CREAT | os.O_RDWR), 0, 1 << 24)",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        ("for i in range(10 ** 9):\n    open(f'f{i}', 'w').close()", "made more than 4096 files"),
        (
            "import os\nwhile True:\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)",
            "made more than 4096 files",
        ),
        (
            "import os\nos.umask(0o777)\nfor i in range(10 ** 9):\n    os.mkdir(f'{i}')",
            "made more than 4096 files",
        ),
    ],
)
def test_a_disk_is_not_filled_where_there_is_no_private_root(
    program: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not LANDLOCK:
        pytest.skip("this kernel has no Landlock")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of files, sooner
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        supervisor = _Supervisor("--no-private-root")
        try:
            assert asked(supervisor, program) == {"passed": False, "reason": reason}
            assert asked(supervisor, "x = 1")["passed"]
        finally:
            supervisor.end()
        assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("last", "processes"),
    [('run_code("while True: pass", seconds=600)', 3), ("time.sleep(600)", 1)],
    ids=["busy", "idle"],
)
def test_all_end_with_the_user_whatever_ends_it(last: str, processes: int) -> None:
    script = f"""
        import os, time
        from forgetless.tasks import run_code
        run_code("x = 1")
        if os.fork() == 0:
            time.sleep(600)  # it holds its parent's pipes
        {last}
    """
    started: set[int] = set()
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) as user:
        while len(started) < processes:
            time.sleep(0.05)
            assert user.poll() is None
            others = _descendants(user.pid)
            started = {pid for pid in others if b"sandbox.supervisor" in _command(pid)}
        user.kill()
    patience = 400
    while any(_command(pid) for pid in started) and (patience := patience - 1):
        time.sleep(0.05)
    assert not [pid for pid in started if _command(pid)]
    for pid in others - started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> set[int]:
    found = {pid}
    for _ in range(3):
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in found:
                    found.add(int(folder.name))
    return found - {pid}


def _command(pid: int) -> bytes:
    """Its command line; nothing for one that has ended and for a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_every_signal_has_a_name() -> None:
    from forgetless.tasks.sandbox import supervisor as module

    for number, name in ((9, "SIGKILL"), (signal.SIGRTMIN + 5, str(signal.SIGRTMIN + 5))):
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), number)
        assert module._death(pid) == f"was ended by signal {name}"
        os.waitpid(pid, 0)


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


VALUES = [
    *("None", "True", "0", "-1", "2 ** 200", "-(2 ** 64)", "0.1", "-0.0", "float('inf')", "1j"),
    *("''", "'a\\n\\ud800\\U0001f600'", "b'\\x00\\xff'", "bytearray(b'x')", "[]", "()", "set()"),
    *(
        "[1, [2, (3, {'a': {1, 2}})]]",
        "frozenset({1})",
        "{None: (), (1, 2): [None]}",
        "[True, 1]",
        "{1, 2}",
    ),
    *("__import__('decimal').Decimal('1.10')", "__import__('fractions').Fraction(-1, 3)"),
]


@pytest.mark.parametrize("value", VALUES)
def test_values_go_there_and_back(value: str) -> None:
    test = f"value = {value}\nfor one in (same(value), same(one=value), made()):\n"
    test += "    assert one == value and type(one) is type(value) and repr(one) == repr(value)"
    program = f"def same(one):\n    return one\ndef made():\n    return {value}"
    assert run_code(program, test) == CodeResult(True, "ran to its end")


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x):\n    x.sort()", "a = [2, 1]\nassert f(a) is None\nassert a == [1, 2]"),
        ("def f(x):\n    x['b'] = 2", "a = {'a': 1}\nf(a)\nassert a == {'a': 1, 'b': 2}"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
        ("def f(n):\n    while True:\n        yield n", "a = f(3)\nassert next(a) == next(a) == 3"),
        (
            "def f(n):\n    return range(n)",
            "assert sum(f(4)) == 6 and len(f(4)) == 4 and f(4)[1] == 1",
        ),
        ("def f(n):\n    return map(str, [n])", "assert [*f(1)] == ['1']\nassert f(1) != ['1']"),
        ("def f(n):\n    return lambda m: n + m", "assert f(1)(2) == 3"),
        ("import collections\nf = collections.Counter", "assert f('aab') == {'a': 2, 'b': 1}"),
        (
            "import enum\nclass E(enum.IntEnum):\n    A = 3\ndef f():\n    return E.A",
            "assert f() == 3",
        ),
        ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int", "assert P(1) == (1,)"),
        (
            "class Node:\n    def __init__(self, x):\n        self.x = x\n"
            "def total(n):\n    return n.x + n.left.x",
            "root = Node(1)\nroot.left = Node(2)\nassert total(root) == 3\n"
            "assert root.left.x == 2\n"
            "assert root.left is root.left\nassert not hasattr(root, 'right')",
        ),
        (
            "def f(x):\n    raise KeyError(x)",
            "try:\n    f(1)\nexcept LookupError as e:\n    assert str(e) == '1'",
        ),
        (
            "class Own(ValueError):\n    pass\ndef f():\n    raise Own('no')",
            "try:\n    f()\nexcept ValueError as e:\n    assert 'no' in str(e)\nelse:\n    1 / 0",
        ),
        ("import re\ndef f(x):\n    return re.match('a', x)", "assert f('a')\nassert not f('b')"),
        ("def f(*a, **k):\n    return a, k", "assert f(1, *[2], c=3) == ((1, 2), {'c': 3})"),
        ("def sum(a, b):\n    return a + b", "assert sum(1, 2) == 3"),
        ("LIMIT = 3", "def check():\n    assert LIMIT == 3\ncheck()"),
        (
            "def f(x):\n    return x / 3",
            "import math\nassert math.isclose(f(1), 0.333, rel_tol=1e-2)",
        ),
        (
            "def f(x):\n    return sorted(x)",
            "import random\nr = random.Random(1)\nfor _ in range(50):\n"
            "    a = [r.random() for _ in range(9)]\n    assert f(a) == sorted(a)",
        ),
        (
            "def f():\n    print('x' * 1000)\n    return f",
            "assert callable(f())\nassert 'f' in str(f)",
        ),
        ("def poly(x):\n    return 0\ndef f(x):\n    return x", "assert poly(f(2)) == 4"),
    ],
)
def test_what_tests_do_can_be_done_from_outside(program: str, test: str) -> None:
    found = run_code(program, test, helpers="def poly(x):\n    return x * x", names=["sum"])
    assert found.passed, found


@pytest.mark.parametrize(
    ("program", "test", "reason"),
    [
        ("x = 1", "assert f(1) == 2", "NameError: name 'f' is not defined"),
        ("def f(x):\n    return 1", "assert f(1) == 2, 'not two'", "AssertionError: not two"),
        ("def f(x):\n    return 1 / 0", "f(1)", "ZeroDivisionError: division by zero"),
        (
            "import os\ndef f(x):\n    os._exit(0)",
            "f(1)",
            "left before its end, with exit status 0",
        ),
        (
            "import sys\ndef f(x):\n    sys.exit()",
            "f(1)",
            "left before its end, with exit status 0",
        ),
        ("def f(x):\n    open('/etc/passwd')", "f(1)", "tried to read '/etc/passwd'"),
        ("def f(x):\n    while True: pass", "f(1)", "did not end within 0.3 s"),
        ("def f(x):\n    pass", "f(f)\nwhile True: pass", "did not end within 0.3 s"),
        (
            "def f(x):\n    pass",
            "f(print)",
            "TypeError: a test can hand plain data to a program, not builtin_function_or_method",
        ),
        (
            "def f(x):\n    y = []\n    y.append(y)\n    return y",
            "f(1)",
            "RecursionError: maximum recursion depth exceeded",
        ),
        ("import ctypes", "", "tried to call native code (ctypes)"),
        ("raise ValueError('\\x1b[2J')", "", "ValueError: ?[2J"),
        ("def f(x: Missing): pass", "", "NameError: name 'Missing' is not defined"),
    ],
)
def test_the_reason_of_a_test_says_what_happened(program: str, test: str, reason: str) -> None:
    assert run_code(program, test, seconds=0.3).reason.startswith(reason)


def test_what_a_program_is_asked_is_all_that_it_learns() -> None:
    """No test, of it or of another program, is in the memory that it is forked from."""
    secret = "".join(["the ", "right ", "answer"])
    for _ in range(2):
        assert run_code(
            "def f(x):\n    return x[:3] + 'x'", f"assert f({secret!r}) == 'thex'"
        ).passed
        assert not run_code("def f():\n    return 1", f"assert f() == {secret!r}").passed
    supervisor = _idle[-1]
    maps = Path(f"/proc/{supervisor.process.pid}/maps").read_text().splitlines()
    places = [line.split("-", 1) for line in maps if " rw-p " in line]
    with open(f"/proc/{supervisor.process.pid}/mem", "rb") as memory:
        for first, rest in places:
            memory.seek(int(first, 16))
            assert secret.encode() not in memory.read(int(rest.split()[0], 16) - int(first, 16))


def _plain(value: object) -> bytes:
    return plain.encode(value, lambda _: (7, True))


keys = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False)
)
values = st.recursive(
    keys | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner),
    max_leaves=20,
)


@given(values)
def test_plain_data_are_read_as_they_were(value: object) -> None:
    data = _plain(value)
    assert repr(plain.decode(data, lambda _: None)) == repr(value)


@given(st.binary(max_size=60) | values.map(_plain), st.data())
def test_bytes_of_anybody_become_plain_data_or_an_error(data: bytes, more: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(more.draw(st.integers(0, 3))):
        if changed:
            changed[more.draw(st.integers(0, len(changed) - 1))] = more.draw(st.integers(0, 255))
    with suppress(Exception):
        assert _is_plain(plain.decode(bytes(changed), lambda handle: None))


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    atoms = (bool, int, float, complex, str, bytes, bytearray, Decimal, Fraction)
    return value is None or type(value) in atoms


@pytest.mark.parametrize(("kind", "count"), [(HumanEval, 164), (MBPP, 500)])
def test_the_solutions_that_come_with_the_problems_pass(
    kind: Callable[..., HumanEval | MBPP], count: int, shared_data: Path
) -> None:
    task = kind(data_dir=shared_data, allow_code_execution=True, seconds=20.0)
    asked = task.questions()
    right = task.right([[item.expected] for item in asked])
    assert len(right) == count
    assert [i.id for i, each in zip(asked, right, strict=True) if each != [True]] == []


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _visible() -> tuple[bool, ...]:
    places = ("/tmp/forgetless-hostile", "/tmp/outside", "/dev/shm/forgetless-hostile")
    return tuple(Path(place).exists() for place in places)
