"""An audit hook that ends a program at its first attempt, with the attempt's name.

The kernel's layers contain a program; most of them answer with an error that it could catch and
then finish as if nothing had been. The hook sees the attempt itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

_ATTEMPTS = {
    "start a process": "os.fork os.forkpty",
    "start another program": "os.exec os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen",
    "send a signal": "os.kill os.killpg signal.pthread_kill",
    "change a limit": "resource.setrlimit resource.prlimit",
    # A second interpreter would not have this hook.
    "take control of the interpreter": "cpython.PyInterpreterState_New code.__new__ sys.settrace "
    "sys.setprofile sys.monitoring.register_callback gc.get_objects gc.get_referrers "
    "gc.get_referents",
    "change a file's owner": "os.chown",
    "write to the system's log": "syslog.openlog syslog.syslog",
}
_FORBIDDEN = {event: attempt for attempt, events in _ATTEMPTS.items() for event in events.split()}
_FORBIDDEN_FAMILIES = {"ctypes.": "call native code", "socket.": "use the network"}
_FORBIDDEN_MODULES = ("ctypes", "_ctypes")
_READING = ("os.listdir", "os.scandir", "os.chdir", "os.getxattr", "os.listxattr")
_CHANGING = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.lchmod", "os.utime", "os.chflags", "os.setxattr", "os.removexattr"),
    "shutil.rmtree",
)
_AF_UNIX = 1


def install(box: str, readable: Sequence[str], devices: Sequence[str], report: int) -> None:
    """Watch this interpreter from now on; there is no way to stop it.

    Args:
        box: the folder that may be changed.
        readable: files and folders that may be read.
        devices: may be read and written.
        report: a pipe for "!" and the reason, before the process ends.
    """
    sys.addaudithook(_hook(box, tuple(readable), tuple(devices), report))


def _hook(box: str, readable: tuple[str, ...], devices: tuple[str, ...], report: int) -> Any:
    # All that the hook uses are constants and its own variables, so that nothing a program puts
    # into a module changes it.
    write, leave, fspath, fsdecode = os.write, os._exit, os.fspath, os.fsdecode
    normal, here, kind = os.path.normpath, os.getcwd, type
    forbidden, families = dict(_FORBIDDEN), tuple(_FORBIDDEN_FAMILIES.items())
    modules, reading, changing = _FORBIDDEN_MODULES, frozenset(_READING), frozenset(_CHANGING)
    creating = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside, number = (box, box + "/"), int

    def stop(attempt: str) -> None:
        try:
            write(report, b"!tried to " + attempt.encode("utf-8", "replace")[:300])
        finally:
            leave(1)

    def check(path: Any, change: bool) -> None:
        if path is None or kind(path) is number:
            return
        name = fsdecode(fspath(path))
        place = normal(name if name.startswith("/") else here() + "/" + name)
        allowed = place == inside[0] or place.startswith(inside[1]) or place in devices
        if not allowed and not change:
            for folder in readable:
                allowed = allowed or place == folder or place.startswith(folder + "/")
        if not allowed:
            stop(f"{'change' if change else 'read'} {name!r}")

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            check(given[0], bool(given[2] & creating))
        elif event == "import":
            if given[0] in modules:
                stop("call native code (ctypes)")
        elif event in forbidden:
            stop(f"{forbidden[event]} ({event})")
        elif event in reading:
            check(given[0], False)
        elif event in changing:
            check(given[0], True)
            if event in ("os.rename", "os.link", "os.symlink"):
                check(given[1], True)
        else:
            for prefix, attempt in families:
                if event.startswith(prefix):
                    pair = event == "socket.__new__" and given[1] in (_AF_UNIX, -1)
                    if not pair:
                        stop(f"{attempt} ({event})")
                    return

    return hook
