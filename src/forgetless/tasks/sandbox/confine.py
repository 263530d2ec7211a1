"""The kernel's layers around a program: a private root, limits, no rights, Landlock, seccomp.

Only the standard library is used: the supervisor runs without site-packages.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOBODY = 65534
BOX = "/box"
BOX_BYTES, BOX_FILES = 64 << 20, 4096
FILE_BYTES, OPEN_FILES, THREADS = 16 << 20, 128, 256
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 1, 2, 4, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITIES_V3 = 0x20080522
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}

# Rights of Landlock: bits for execute, write, read a file, read a folder, and all that changes one.
_FS_READ = 0b1100
_FS_WRITE = 0b10
_FS_DEVICES = 1 << 6 | 1 << 11  # character and block devices
_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    """A function of the C library.

    Raises:
        OSError: it returned -1.
    """
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def readable_folders() -> list[str]:
    """What an interpreter reads: its own library, and those of the system that it links to."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    shared = {os.path.realpath(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")}
    own = os.path.realpath(os.path.join(sys.base_prefix, "lib"))
    found = {library, *shared, os.path.realpath("/usr/share/zoneinfo")}
    if own not in ("/lib", "/usr/lib"):
        found |= {str(file) for file in Path(own).glob("libpython*.so*")}
    return sorted(path for path in found if os.path.exists(path))


def landlock_version() -> int:
    """Landlock's version in this kernel; 0 where there is none."""
    version: int = _libc.syscall(_CREATE_RULESET, None, 0, 1)
    return max(version, 0)


def enter_private_root(readable: Sequence[str]) -> bool:
    """Move this process to a root that holds nothing but `readable`, devices and an empty box.

    As root this is a mount namespace; as a user, one inside a user namespace.

    Returns:
        Whether the process may take the identity of nobody: it is really root.

    Raises:
        OSError: namespaces are not allowed here. The process may then be half-way: start anew.
    """
    user, group = os.geteuid(), os.getegid()
    # In a container of a user's own, root is that user, and there may be no nobody.
    known = _is_mapped("uid_map", NOBODY) and _is_mapped("gid_map", NOBODY)
    privileged = user == 0
    if privileged:
        try:
            _call("unshare", _CLONE_NEWNS)
        except OSError:
            privileged = False
    if not privileged:
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    root = next(path for path in ("/sys", "/mnt", "/srv", "/opt") if os.path.isdir(path))
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for path in (*readable, *(device for device in DEVICES if os.path.exists(device))):
        _bind(path, root + path)
    for name in ("lib", "lib64"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
    os.mkdir(root + BOX)
    os.chdir(root)
    number = _PIVOT_ROOT[platform.machine()]
    _call("syscall", number, b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    _mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
    return privileged and known


def _is_mapped(table: str, number: int) -> bool:
    """Whether an identity exists in this user namespace."""
    rows = [map(int, row.split()) for row in Path(f"/proc/self/{table}").read_text().splitlines()]
    return any(first <= number < first + count for first, _, count in rows)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    given = (source.encode(), target.encode(), kind.encode() if kind else None)
    _call("mount", *given, ctypes.c_ulong(flags), options.encode() or None)


def _bind(source: str, target: str) -> None:
    """Show a file or folder at another place, to be read only."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    _mount(source, target, None, _MS_BIND | _MS_REC)
    # Flags that the place already has may not be taken off inside a user namespace. 15: read-only,
    # no set-user-id, no devices, no execution, with the same numbers in both interfaces.
    held = os.statvfs(target).f_flag & 15
    wanted = _MS_NOSUID if source in DEVICES else _MS_NOSUID | _MS_RDONLY
    _mount("none", target, None, _MS_REMOUNT | _MS_BIND | held | wanted)


@dataclass(frozen=True)
class Confinement:
    """What each program is put into, decided once.

    Attributes:
        private_root: whether this process has one.
        nobody: whether to take the identity of nobody.
        landlock: its version, 0 for none.
        interpreter_bytes: address space of the interpreter itself.
        calls: the filter of system calls.
    """

    readable: tuple[str, ...]
    private_root: bool
    nobody: bool
    landlock: int
    interpreter_bytes: int
    calls: bytes

    def layers(self) -> list[str]:
        """Words for the layers in use."""
        extra = {
            "private root": self.private_root,
            "nobody": self.nobody,
            f"landlock {self.landlock}": self.landlock > 0,
        }
        return ["seccomp", "limits", *(name for name, used in extra.items() if used)]

    def make_box(self) -> str:
        """Where the next program works: an empty folder of its own."""
        return BOX if self.private_root else tempfile.mkdtemp(prefix="forgetless-")

    def lock(self, box: str | None, seconds: float, memory_bytes: int, parent: int) -> None:
        """Put this process, which must be a fork of its own, into all layers; no way back.

        It may change the box alone, from `make_box`, compute twice `seconds` and a little more, and
        ends with its parent.

        Raises:
            OSError: a layer that is there could not be used.
        """
        os.setsid()
        if self.private_root and box is not None:
            _call("unshare", _CLONE_NEWNS)
            quota = f"size={BOX_BYTES},nr_inodes={BOX_FILES},mode=0700"
            _mount("tmpfs", BOX, "tmpfs", _MS_NOSUID | _MS_NODEV, quota)
            if self.nobody:
                os.chown(BOX, NOBODY, NOBODY)
        os.chdir(box or "/")
        os.umask(0o077)
        least = self.interpreter_bytes + (16 << 20)
        _limit(seconds, max(memory_bytes, least), threads=self.nobody)
        _drop_rights(self.nobody)
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # A change of identity undoes this, so it comes after; and the parent may be gone by now.
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        if self.landlock:
            _landlock(self.landlock, self.readable, box)
        _filter_calls(self.calls)


def _limit(seconds: float, memory_bytes: int, *, threads: bool) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        # In whole seconds; the supervisor is more exact, and counts computing half.
        resource.RLIMIT_CPU: int(2 * seconds) + 2,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if threads:
        limits[resource.RLIMIT_NPROC] = THREADS
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (allowed, allowed))


def _drop_rights(nobody: bool) -> None:
    """No capability and, where that is possible, the identity of nobody."""
    if nobody:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = struct.pack("Ii", _CAPABILITIES_V3, 0)
    _call("syscall", _CAPSET[platform.machine()], header, bytes(24))


def _landlock(version: int, readable: Sequence[str], box: str | None) -> None:
    """Read `readable`, change what is in `box`, use devices; no TCP, no signal to the outside."""
    rights = (1 << _FS_RIGHTS.get(version, 16)) - 1
    # Before version 4 no network rights, before 6 no scopes: the structure was shorter.
    fields = [rights, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _call("syscall", _CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable:
        _allow(ruleset, path, _FS_READ & rights)
    for path in DEVICES:
        if os.path.exists(path):
            _allow(ruleset, path, (_FS_READ | _FS_WRITE) & rights)
    if box is not None:
        _allow(ruleset, box, rights & ~_FS_DEVICES & ~1)
    _call("syscall", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= 0b111 | 1 << 14 | 1 << 15  # what a file can have: the rest is for folders
    rule = struct.pack("=Qi", rights, handle)
    _call("syscall", _ADD_RULE, ruleset, 1, rule, 0)
    os.close(handle)


def _filter_calls(program: bytes) -> None:
    """Let the kernel judge every system call from here on."""
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    pointer = ctypes.byref(Program(len(program) // 8, ctypes.addressof(code)))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer, 0, 0)
