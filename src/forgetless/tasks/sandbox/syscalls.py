"""Which system calls a program may make, as a filter that the kernel runs (seccomp-BPF).

Three lists: what a Python program needs is allowed; what only an attack needs ends the process on
the spot; anything else answers "no such call", from which C libraries fall back by themselves.
"""

from __future__ import annotations

import platform
import struct

ALLOWED = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 close close_range
    lseek open openat openat2 creat stat lstat fstat newfstatat statx access faccessat faccessat2
    readlink readlinkat getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir rename renameat
    renameat2 link linkat unlink unlinkat symlink symlinkat ftruncate fsync fdatasync flock umask
    statfs fstatfs fadvise64 copy_file_range sendfile dup dup2 dup3 pipe pipe2 select pselect6 poll
    ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
    timerfd_create timerfd_settime timerfd_gettime sendto recvfrom sendmsg recvmsg shutdown
    getsockopt setsockopt getsockname getpeername mprotect munmap mremap madvise brk membarrier
    futex futex_waitv set_tid_address set_robust_list get_robust_list rseq sched_yield
    sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
    sched_get_priority_min rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend
    rt_sigtimedwait sigaltstack restart_syscall pause alarm setitimer getitimer nanosleep
    clock_nanosleep clock_gettime clock_getres gettimeofday time times getpid gettid getppid getpgrp
    getpgid getsid getuid geteuid getgid getegid getgroups getresuid getresgid getpriority getrlimit
    getrusage sysinfo uname getcpu getrandom exit exit_group arch_prctl
"""

FATAL = """
    fork vfork execve execveat kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal
    pidfd_open pidfd_getfd ptrace process_vm_readv process_vm_writev process_madvise kcmp socket
    connect bind listen accept accept4 io_uring_setup io_uring_enter io_uring_register setrlimit
    setpriority sched_setscheduler sched_setparam sched_setattr setuid setgid setreuid setregid
    setresuid setresgid setgroups setfsuid setfsgid capset setsid setpgid personality mount umount2
    pivot_root chroot unshare setns memfd_create userfaultfd mknod mknodat chown fchown lchown
    fchownat
"""
"""Other programs, signals, sockets, limits, identities, mounts."""

CHANGES = """
    chmod fchmod fchmodat fchmodat2 utime utimes utimensat futimesat truncate fallocate splice tee
"""
"""What only a private root covers: rights, times and (before its version 3) lengths of files are
nothing to Landlock, and what the last three write is not counted where the disk has no limit."""

_TABLE = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
    pwritev:296:70 preadv2:327:286 pwritev2:328:287 close:3:57 close_range:436:436 lseek:8:62
    open:2:- openat:257:56 openat2:437:437 creat:85:- stat:4:- lstat:6:- fstat:5:80
    newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:-
    readlinkat:267:78 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50
    mkdir:83:- mkdirat:258:34 rmdir:84:- rename:82:- renameat:264:38 renameat2:316:276 link:86:-
    linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:- symlinkat:266:36 truncate:76:45
    ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83 flock:73:32 fcntl:72:25
    umask:95:166 statfs:137:43 fstatfs:138:44 fadvise64:221:223 copy_file_range:326:285
    sendfile:40:71 splice:275:76 tee:276:77 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59
    select:23:- pselect6:270:72 poll:7:- ppoll:271:73 epoll_create:213:- epoll_create1:291:20
    epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:-
    eventfd2:290:19 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
    sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockopt:55:209
    setsockopt:54:208 getsockname:51:204 getpeername:52:205 mmap:9:222 mprotect:10:226 munmap:11:215
    mremap:25:216 madvise:28:233 brk:12:214 membarrier:324:283 futex:202:98 futex_waitv:449:449
    set_tid_address:218:96 set_robust_list:273:99 get_robust_list:274:100 rseq:334:293
    sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 rt_sigaction:13:134
    rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133
    rt_sigtimedwait:128:137 sigaltstack:131:132 restart_syscall:219:128 pause:34:- alarm:37:-
    setitimer:38:103 getitimer:36:102 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113
    clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getpid:39:172 gettid:186:178
    getppid:110:173 getpgrp:111:- getpgid:121:155 getsid:124:156 getuid:102:174 geteuid:107:175
    getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150
    getpriority:140:141 getrlimit:97:163 getrusage:98:165 sysinfo:99:179 uname:63:160 getcpu:309:168
    getrandom:318:278 exit:60:93 exit_group:231:94 arch_prctl:158:- fork:57:- vfork:58:-
    execve:59:221 execveat:322:281 kill:62:129 tkill:200:130 tgkill:234:131 rt_sigqueueinfo:129:138
    rt_tgsigqueueinfo:297:240 pidfd_send_signal:424:424 pidfd_open:434:434 pidfd_getfd:438:438
    ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 process_madvise:440:440
    kcmp:312:272 socket:41:198 connect:42:203 bind:49:200 listen:50:201 accept:43:202
    accept4:288:242 io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427
    setrlimit:160:164 setpriority:141:140 sched_setscheduler:144:119 sched_setparam:142:118
    sched_setattr:314:274 setuid:105:146 setgid:106:144 setreuid:113:145 setregid:114:143
    setresuid:117:147 setresgid:119:149 setgroups:116:159 setfsuid:122:151 setfsgid:123:152
    capset:126:91 setsid:112:157 setpgid:109:154 personality:135:92 mount:165:40 umount2:166:39
    pivot_root:155:41 chroot:161:51 unshare:272:97 setns:308:268 memfd_create:319:279
    userfaultfd:323:282 mknod:133:- mknodat:259:33 chown:92:- fchown:93:55 lchown:94:-
    fchownat:260:54 chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 utime:132:-
    utimes:235:- utimensat:280:88 futimesat:261:- clone:56:220 clone3:435:435 prlimit64:302:261
    ioctl:16:29 socketpair:53:199 prctl:157:167 seccomp:317:277
"""

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and the kernel's AUDIT_ARCH constant."""


def _numbers() -> dict[str, int]:
    column = ARCHITECTURES.get(platform.machine(), (0, 0))[0]
    rows = (entry.split(":") for entry in _TABLE.split())
    return {name: int(columns[column]) for name, *columns in rows if columns[column] != "-"}


NUMBERS = _numbers()
"""System calls of this machine by name."""

_LOAD, _JUMP_EQUAL, _JUMP_NOT_LESS, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_CLONE_THREAD, _SOCK_STREAM = 0x10000, 1
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Duplicates, flags and locks. Others have a signal sent to any process of the user (F_SETOWN).
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20

Instruction = tuple[int, int, int, int]


def program(*, private_root: bool) -> bytes:
    """The filter as an array of `struct sock_filter`.

    Without a private root, fewer calls are allowed.
    """
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, ARCHITECTURES[platform.machine()][1]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        # Numbers of the 32-bit interface of x86-64 start here.
        (_JUMP_NOT_LESS, 0, 1, 0x40000000),
        (_RETURN, 0, 0, _KILL),
    ]
    for name in (*ALLOWED.split(), *(CHANGES.split() if private_root else ())):
        code += _verdict(name, _ALLOW)
    for name in FATAL.split():
        code += _verdict(name, _KILL)
    for name in ("prctl", "seccomp", *CHANGES.split()):
        code += _verdict(name, _ERROR | _EPERM)
    # A new thread, but no new process; a pair of connected sockets, which asyncio wakes itself
    # with, but none that could send to an address; limits to read, not to set.
    code += _depends("clone", 0, [(_AND, 0, 0, _CLONE_THREAD), (_JUMP_EQUAL, 1, 0, 0)])
    code += _depends("socketpair", 1, [(_AND, 0, 0, 0xF), (_JUMP_EQUAL, 0, 1, _SOCK_STREAM)])
    code += _depends("ioctl", 1, _one_of(_IOCTLS), otherwise=_ERROR | _ENOTTY)
    code += _depends("fcntl", 1, _one_of(_FCNTLS))
    # What is written to a file through memory is not counted either.
    shared = [(_AND, 0, 0, _MAP_SHARED | _MAP_ANONYMOUS), (_JUMP_EQUAL, 1, 0, _MAP_SHARED)]
    code += _depends("mmap", 3, [] if private_root else shared, otherwise=_ERROR | _EPERM)
    code += _no_new_limits()
    code.append((_RETURN, 0, 0, _ERROR | _ENOSYS))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _verdict(name: str, action: int) -> list[Instruction]:
    if name not in NUMBERS:
        return []
    return [(_JUMP_EQUAL, 0, 1, NUMBERS[name]), (_RETURN, 0, 0, action)]


def _depends(
    name: str, argument: int, test: list[Instruction], otherwise: int = _KILL
) -> list[Instruction]:
    """Allowed where `test` falls through, `otherwise` where it jumps over one instruction."""
    body = [
        (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
        *test,
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, otherwise),
    ]
    return [(_JUMP_EQUAL, 0, len(body), NUMBERS[name]), *body]


def _one_of(values: tuple[int, ...]) -> list[Instruction]:
    last = len(values) - 1
    return [(_JUMP_EQUAL, last - i, 1 if i == last else 0, value) for i, value in enumerate(values)]


def _no_new_limits() -> list[Instruction]:
    """prlimit64 may read (its third argument, a pointer, is null) but not set."""
    low, high = _ARGUMENTS + 16, _ARGUMENTS + 20
    body = [
        (_LOAD, 0, 0, low),
        (_JUMP_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, high),
        (_JUMP_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    ]
    return [(_JUMP_EQUAL, 0, len(body), NUMBERS["prlimit64"]), *body]
