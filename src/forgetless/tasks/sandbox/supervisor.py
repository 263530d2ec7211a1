"""The process beside the user's own that runs programs one after the other.

For each it starts two processes, forks of its own, whose modules are imported already: a few
milliseconds instead of an interpreter's start. One runs the program (`program`), the other the test
of it (`verdict`); both are in the sandbox. What it reads is a message of JSON for the program
(`program`, `seconds`, `memory_bytes`), and behind it one for the test (`test`, `helpers`, `names`),
which the test's process takes from the pipe itself: no memory that a program is forked from ever
holds a test. It answers with one message of JSON (`passed`, `reason`).
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from forgetless.tasks.sandbox import confine, guard, syscalls
from forgetless.tasks.sandbox.plain import receive, send
from forgetless.tasks.sandbox.program import READY, run_program
from forgetless.tasks.sandbox.verdict import ENDED, FAILED, PASSED, READ, run_test

OUTPUT_BYTES = 1 << 20

PATIENCE = 20
"""Even where there is no free core, a program is ended after so many times its seconds."""

_STARTING = 60
_LONGEST_PATH = 1000
_HERE = os.path.dirname(os.path.abspath(__file__))
_PRELOADED = (
    *("typing", "math", "cmath", "re", "collections", "itertools", "functools", "operator"),
    *("heapq", "bisect", "array", "random", "copy", "string", "hashlib", "datetime", "decimal"),
    *("fractions", "statistics", "json", "dataclasses", "enum", "textwrap", "calendar", "struct"),
    *("queue", "threading", "contextlib", "io", "numbers", "pprint", "types", "warnings"),
    *("traceback", "unicodedata", "tempfile", "unittest", "asyncio", "locale", "linecache"),
)
_BROKEN = b"?"
"""What either process reports when it could not be closed in; the error follows."""


def main() -> None:
    """Prepare, say which layers there are, then answer until the user's process or pipe ends."""
    parent = os.pidfd_open(os.getppid())
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(nothing, standard)
    for name in _PRELOADED:
        __import__(name)
    try:
        supervisor = _prepare(parent)
        tests, empty = os.pipe()
        send(empty, b'{"test": "", "helpers": "", "names": []}')
        supervisor.judge(tests, program="", seconds=10.0, memory_bytes=0)
    except OSError as problem:
        send(answers, json.dumps({"error": str(problem)}).encode())
        return
    send(answers, json.dumps({"layers": supervisor.confinement.layers()}).encode())
    gc.collect()
    gc.freeze()  # so that no collection in a fork copies what all of them share
    with suppress(BrokenPipeError):  # nobody waits for the answer any more
        while parent not in select.select([requests, parent], [], [])[0]:
            request = receive(requests, 1 << 31)
            if request is None:
                return
            send(answers, json.dumps(supervisor.judge(requests, **json.loads(request))).encode())


def _prepare(parent: int) -> Supervisor:
    """Take the strongest layers that there are.

    Raises:
        OSError: too few for hostile programs.
    """
    if sys.platform != "linux" or os.uname().machine not in syscalls.ARCHITECTURES:
        raise OSError("generated programs need Linux on x86-64 or ARM64")
    processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    readable = tuple(confine.readable_folders())
    # Tried in a fork first, as a half-made root cannot be left again.
    wanted = "--no-private-root" not in sys.argv
    private = wanted and _succeeds(lambda: confine.enter_private_root(readable))
    nobody = private and confine.enter_private_root(readable)
    capped = [int(option[11:]) for option in sys.argv if option.startswith("--landlock=")]
    landlock = min(confine.landlock_version(), *capped, 99)
    if not (private or landlock):
        raise OSError(
            "generated programs need a kernel with Landlock (Linux 5.13 or newer) or the right to "
            "make namespaces; without one of them they could read your files"
        )
    calls = syscalls.program(private_root=private)
    confinement = confine.Confinement(readable, private, nobody, landlock, used, calls)
    return Supervisor(confinement, processes, parent, os.getpid())


def _succeeds(step: Callable[[], object]) -> bool:
    """Whether a step works, tried in a fork."""
    pid = os.fork()
    if pid == 0:
        with suppress(OSError):
            step()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


@dataclass
class Supervisor:
    """Runs programs one after the other.

    Attributes:
        confinement: what they and their tests are put into.
        processes: handle of the folder /proc, which a private root does not show.
        parent: handle of the user's process, with which this one ends.
    """

    confinement: confine.Confinement
    processes: int
    parent: int
    pid: int

    def judge(
        self, tests: int, program: str, seconds: float, memory_bytes: int, guarded: bool = True
    ) -> dict[str, object]:
        """Run a program and its test; whether it passed, and a line that says what happened.

        The test comes from the pipe `tests`. Not `guarded` leaves all to the kernel, to test that
        layer.

        Raises:
            OSError: a layer is missing, or the test's process ended before it had its test.
        """
        # The end of a process with a root of its own takes the kernel long: nobody waits for it.
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        box = self.confinement.make_box()
        disk = None if self.confinement.private_root else box
        out, err, report, verdict, asked, answers = (os.pipe() for _ in range(6))

        def run() -> None:
            if guarded:
                # A traceback looks for its sources in all of the path.
                readable = (*self.confinement.readable, *sys.path, _HERE)
                guard.install(box, readable, confine.DEVICES, 3)
            run_program(program, 3, 4, 5)

        ends = [0, 0, verdict[1], asked[1], answers[0]]
        closed_in = partial(self._fork, seconds=seconds, memory_bytes=memory_bytes)
        tester = closed_in(lambda: run_test(3, 4, 5, 6), [*ends, tests], None)
        runner = closed_in(run, [out[1], err[1], report[1], answers[1], asked[0]], box)
        for end in (*ends[2:], out[1], err[1], report[1], answers[1], asked[0]):
            os.close(end)
        sources = (out[0], err[0], report[0], verdict[0])
        watch = _Watch(self, runner, tester, seconds, disk, *sources)
        reason = watch.reason()
        for end in sources:
            os.close(end)
        for pid in (runner, tester):
            os.kill(pid, signal.SIGKILL)
        if disk is not None:
            for pid in (runner, tester):
                os.waitpid(pid, 0)
            _remove(disk)
        return {"passed": watch.passed, "reason": reason}

    def _fork(
        self,
        run: Callable[[], None],
        ends: Sequence[int],
        box: str | None,
        seconds: float,
        memory_bytes: int,
    ) -> int:
        """A process in the sandbox that holds nothing but `ends`, as descriptors from 1 on."""
        pid = os.fork()
        if pid:
            return pid
        try:
            ends = [os.dup(end) for end in ends]  # above those that are now given away
            for place, end in enumerate(ends, 1):
                os.dup2(end, place)
            os.closerange(1 + len(ends), os.sysconf("SC_OPEN_MAX"))
            self.confinement.lock(box, seconds, memory_bytes, self.pid)
            os.environ.clear()
            os.environ.update({} if box is None else {"HOME": box, "TMPDIR": box})
            run()
        except OSError as problem:
            os.write(3, _BROKEN + str(problem).encode())
        finally:
            os._exit(1)

    def read(self, pid: int, name: str) -> str:
        """The beginning of a file that the kernel has about a process; empty once it is gone."""
        with suppress(OSError):
            file = os.open(f"{pid}/{name}", os.O_RDONLY, dir_fd=self.processes)
            try:
                return os.read(file, 4096).decode()
            finally:
                os.close(file)
        return ""


@dataclass
class _Watch:
    """One program and its test while they run.

    Attributes:
        seconds: they may take together.
        disk: the program's folder where it lies on a disk, so that nothing else limits it.
        report: where its process says that it begins, or what it was stopped for.
        verdict: where the test's process says how it went. Nothing else can make it pass.
    """

    supervisor: Supervisor
    runner: int
    tester: int
    seconds: float
    disk: str | None
    out: int
    err: int
    report: int
    verdict: int
    written: int = 0
    stopped: bytes = b""
    said: bytes = b""
    passed: bool = False
    ready: bool = False
    started: float = field(default_factory=time.monotonic)

    def reason(self) -> str:
        """Wait for the end and say how it went."""
        poller = select.poll()
        for source in (self.out, self.err, self.report, self.verdict, self.supervisor.parent):
            poller.register(source, select.POLLIN)
        while True:
            for source, _ in poller.poll(1 if self.said == READ + PASSED else 50):
                if source == self.supervisor.parent:
                    os._exit(1)  # both end with this process
                if not self._drain(source):
                    poller.unregister(source)
            reason = self._decided() or self._too_long() or self._too_much()
            # Until the test is read, it is in the pipe that the next request comes from.
            if reason is not None and self.said:
                return reason

    def _drain(self, source: int) -> bool:
        """Take what was written; False when nothing will come any more."""
        data = os.read(source, 1 << 16)
        if source == self.verdict:
            self.said += data
            if not data and not self.said:
                raise OSError("the process of the test ended before it had its test")
            if not data and self.said == READ:
                self.said += FAILED + b"its test " + _death(self.tester).encode()
        elif source != self.report:
            self.written += len(data)
        elif data[:1] == READY and not self.ready:
            self.ready, self.started, self.stopped = True, time.monotonic(), data[1:]
        elif data[:1] in (FAILED, _BROKEN):
            self.stopped = self.stopped or data
        return bool(data)

    def _decided(self) -> str | None:
        """The reason to end now, or None to go on."""
        verdict = self.said[len(READ) :]
        for problem in (self.said, b"" if self.ready else self.stopped):
            if problem.startswith(_BROKEN):
                raise OSError(f"the sandbox could not be closed: {problem[1:].decode()}")
        if self.stopped:
            return self.stopped[1:].decode("utf-8", "replace") or "said that it failed"
        if self.written > OUTPUT_BYTES:
            return f"wrote more than {OUTPUT_BYTES >> 20} MiB"
        if verdict == ENDED:
            return _death(self.runner)
        if verdict == PASSED:
            # Threads that it left behind may end yet: both processes wait.
            self.passed = "\nThreads:\t1\n" in self.supervisor.read(self.runner, "status")
            return "ran to its end" if self.passed else None
        return verdict[1:].decode("utf-8", "replace") or None

    def _too_long(self) -> str | None:
        """Whether they have had their time.

        Waiting for a free core does not count, and computing counts half: beside others, a core
        does as little as half the work in a second.
        """
        passed = time.monotonic() - self.started
        if not self.ready and passed > _STARTING:
            raise OSError(f"the sandbox was not ready after {_STARTING} s")
        if not self.ready or passed < self.seconds:
            return None
        counted = passed
        for pid in (self.runner, self.tester):
            ran, waited, _ = (self.supervisor.read(pid, "schedstat") or "0 0 0").split()
            counted -= int(waited) / 1e9 + int(ran) / 2e9
        if counted < self.seconds and passed < PATIENCE * self.seconds:
            return None
        what = "left threads behind" if self.said == READ + PASSED else "did not end"
        return f"{what} within {self.seconds:g} s"

    def _too_much(self) -> str | None:
        """Whether the program has filled more of a disk than it may."""
        if self.disk is None:
            return None
        written = self.supervisor.read(self.runner, "io").partition("wchar:")[2].split()
        if written and int(written[0]) > confine.BOX_BYTES:
            return f"wrote more than {confine.BOX_BYTES >> 20} MiB"
        found, left = 0, [self.disk]
        while left:
            path = left.pop()
            with suppress(OSError), os.scandir(path) as entries:
                for entry in entries:
                    found += 1
                    if found > confine.BOX_FILES or len(path) > _LONGEST_PATH:
                        return f"made more than {confine.BOX_FILES} files"
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
        return None


def _death(pid: int) -> str:
    """What a process that has closed its pipe ended with; it is left to be waited for again."""
    ended = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(ended, select.POLLIN)
    dead = poller.poll(1000)
    os.close(ended)
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) if dead else None
    if found is None:
        return "closed the pipe to its test"
    if found.si_code == os.CLD_EXITED:
        return f"left before its end, with exit status {found.si_status}"
    if found.si_status == signal.SIGSYS:
        return "made a system call that is not allowed"
    # Signals of real time have numbers only.
    names = {known.value: known.name for known in signal.Signals}
    return f"was ended by signal {names.get(found.si_status, found.si_status)}"


def _remove(folder: str) -> None:
    """Delete a folder, however deep and whatever rights a program took from what is in it.

    What is in a folder of it is moved up before that is deleted, so that no path grows long.
    """
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # or it could not be moved
                os.rename(inner.path, f"{folder}/{os.urandom(16).hex()}")
            os.rmdir(entry.path)
    os.rmdir(folder)
