"""Programs that must not pass: `HOSTILE` and `FORGED`, by what they try.

The first try to reach something. `{canary}` is a file of the user's, `{folder}` its folder,
`{port}` a port that listens, `{parent}` the process that runs the test.

The second are wrong and try to pass nevertheless, written by somebody who has read the sandbox.
`NAME` is the function that is tested; `forge`, which is put in front of them, says on every pipe
that there is what a verdict of the sandbox's own might be made of.
"""

from __future__ import annotations

from forgetless.tasks.sandbox.plain import encode

__all__ = ["FORGED", "HOSTILE"]


def _parts(section: str) -> dict[str, str]:
    pairs = (part.split("\n", 1) for part in section.split("\n# === ")[1:])
    return {name.strip(): program for name, program in pairs}


HOSTILE = _parts(
    """
# === fork bomb
import os
while True:
    os.fork()
# === fork bomb that ignores errors
import os
while True:
    try:
        os.fork()
    except BaseException:
        pass
# === one quiet child
import os
try:
    if os.fork() == 0:
        os._exit(0)
except OSError:
    pass
# === child that sleeps in a session of its own
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
# === new session
import os
os.setsid()
# === multiprocessing
import multiprocessing, time
multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
# === subprocess
import subprocess
subprocess.run(["/bin/sh", "-c", "echo hello"])
# === subprocess without its module
import _posixsubprocess, os
r, w = os.pipe()
_posixsubprocess.fork_exec([b"/bin/true"], [b"/bin/true"], True, (w,), None, None, -1, -1, -1, -1,
                           -1, -1, r, w, False, False, -1, None, None, None, -1, None, False)
# === system
import os
os.system("touch {folder}/made")
# === exec
import os
os.execv("/bin/true", ["true"])
# === posix_spawn
import os
os.posix_spawn("/bin/true", ["true"], {{}})
# === memory bomb
a = []
while True:
    a.append(bytearray(16 << 20))
# === memory bomb in one piece
a = bytearray(1 << 33)
# === memory bomb that catches its error
a = []
while True:
    try:
        a.append(bytearray(16 << 20))
    except MemoryError:
        pass
# === huge number
print(len(str(10 ** (10 ** 9))))
# === endless output
while True:
    print("x" * 1000)
# === endless errors
import sys
while True:
    sys.stderr.write("x" * 1000)
# === endless loop
while True:
    pass
# === endless loop that cannot be interrupted
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
# === endless match
import re
re.match(r"(a*)*b", "a" * 40)
# === long sleep
import time
time.sleep(600)
# === waiting for input
input()
# === thread that never ends
import threading
def forever():
    while True:
        pass
threading.Thread(target=forever, daemon=True).start()
# === sleeping thread
import threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
# === very many threads
import threading, time
for _ in range(100000):
    threading.Thread(target=time.sleep, args=(600,)).start()
# === endless recursion
def f():
    f()
f()
# === recursion without limit
import sys
sys.setrecursionlimit(10 ** 9)
def f(x):
    return [f, sorted([1], key=f)]
f(0)
# === reads the user's file
print(open("{canary}").read())
# === reads the user's file and goes on
try:
    print(open("{canary}").read())
except OSError:
    pass
# === reads the user's file by its descriptor
import os
try:
    os.read(os.open("{canary}", os.O_RDONLY), 10)
except OSError:
    pass
# === reads the accounts of the machine
print(open("/etc/passwd").read())
# === lists the home folder
import os
print(os.listdir(os.path.expanduser("~root")))
# === lists everything
import os
for folder, _, files in os.walk("/"):
    print(folder, files)
# === deletes the user's file
import os
os.remove("{canary}")
# === deletes the user's folder
import shutil
shutil.rmtree("{folder}", ignore_errors=True)
# === overwrites the user's file
open("{canary}", "w").write("gone")
# === empties the user's file
import os
os.truncate("{canary}", 0)
# === renames the user's file
import os
os.rename("{canary}", "{canary}.bak")
# === takes the user's rights away
import os
os.chmod("{canary}", 0)
# === writes beside its folder
open("../outside", "w").write("x")
# === writes to the temporary folder
open("/tmp/forgetless-hostile", "w").write("x")
# === leaves shared memory behind
open("/dev/shm/forgetless-hostile", "w").write("x")
# === shared memory by its module
from multiprocessing import shared_memory
shared_memory.SharedMemory("forgetless-hostile", create=True, size=100)
# === memory file
import os
os.memfd_create("x")
# === reads by a link
import os
os.symlink("{canary}", "link")
print(open("link").read())
# === reads by a hard link
import os
os.link("{canary}", "link")
# === reads by a path that changes
class Path:
    def __init__(self):
        self.names = ["mine", "{canary}", "{canary}"]
    def __fspath__(self):
        return self.names.pop(0)
print(open(Path()).read())
# === fills the disk
with open("big", "wb") as file:
    while True:
        file.write(bytes(1 << 20))
# === fills the disk with many files
for i in range(10 ** 9):
    with open(f"f{{i}}", "wb") as file:
        file.write(bytes(1 << 20))
# === uses up the inodes
for i in range(10 ** 9):
    open(f"f{{i}}", "w").close()
# === deep folders
import os
while True:
    os.mkdir("d")
    os.chdir("d")
# === network
import socket
socket.create_connection(("127.0.0.1", {port}), timeout=1).sendall(b"x")
# === network without an error
import socket
try:
    socket.socket().connect(("127.0.0.1", {port}))
except OSError:
    pass
# === network without the module
import _socket
_socket.socket(2, 2, 0).sendto(b"x", ("127.0.0.1", {port}))
# === web
import urllib.request
urllib.request.urlopen("http://127.0.0.1:{port}/")
# === name look-up
import socket
socket.getaddrinfo("example.org", 80)
# === abstract socket
import socket
s = socket.socket(socket.AF_UNIX)
s.bind("\\0forgetless")
# === network by a subprocess
import subprocess
subprocess.run(["curl", "http://127.0.0.1:{port}/"])
# === signal to the parent
import os, signal
os.kill(os.getppid(), signal.SIGKILL)
# === signal to the test
import os, signal
os.kill({parent}, signal.SIGKILL)
# === signal to everybody
import os, signal
os.kill(-1, signal.SIGKILL)
# === signal to its group
import os, signal
os.killpg(0, signal.SIGTERM)
# === signal by a thread
import signal, threading
signal.pthread_kill(threading.get_ident(), signal.SIGKILL)
# === signal to itself
import signal
signal.raise_signal(signal.SIGTERM)
# === signals ignored, then for ever
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
# === ctypes
import ctypes
ctypes.CDLL(None).getpid()
# === ctypes without its package
import _ctypes
_ctypes.dlopen(None, 2)
# === crash by ctypes
import ctypes
ctypes.string_at(0)
# === crash by hand-made code
def f():
    pass
f.__code__ = f.__code__.replace(co_code=bytes([100, 255] * 50), co_consts=())
f()
# === limits raised
import resource
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
# === limits lowered
import resource
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
# === limits of another process
import resource
resource.prlimit({parent}, resource.RLIMIT_NOFILE, (0, 0))
# === memory of itself
open("/proc/self/mem", "r+b").write(b"x")
# === environment of the parent
import os
print(open(f"/proc/{{os.getppid()}}/environ").read())
# === descriptors of itself
import os
print(os.listdir("/proc/self/fd"))
# === early exit
import sys
sys.exit(0)
# === early exit by hand
raise SystemExit
# === early exit by a builtin
exit()
# === hard exit
import os
os._exit(0)
# === abort
import os
os.abort()
# === says that it passed
import os
print("passed", flush=True)
print('{{"passed": true, "reason": "ran to its end"}}', flush=True)
os._exit(0)
# === says so everywhere
import os
for fd in range(100):
    for said in (b"g", b"passed", b'{{"passed": true, "reason": "ran to its end"}}\\n'):
        try:
            os.write(fd, said)
        except OSError:
            pass
os._exit(0)
# === says what the watcher says
import os
for said in (b"!ran to its end", b"?ran to its end", b"g", b"ran to its end"):
    os.write(3, said)
os._exit(0)
# === an error by the watcher's words
import os
os.write(3, b"!ran to its end")
while True:
    pass
# === does what the watcher does
import os
os.write(3, b"g")
os.read(4, 1)
os.write(3, b"g")
os.read(4, 1)
os._exit(0)
# === does what the watcher does, in a thread
import os, threading
def fake():
    os.write(3, b"g")
    os.read(4, 1)
threading.Thread(target=fake).start()
while True:
    pass
# === does what the watcher does, at exit
import atexit, os, sys
def fake(*_):
    os.write(3, b"g")
    os.read(4, 1)
    os._exit(0)
atexit.register(fake)
sys.excepthook = sys.unraisablehook = fake
sys.exit(0)
# === does what the watcher does, on the way out
import os
def fake(*_):
    os.write(3, b"g")
    os.read(4, 1)
class Late:
    def __del__(self):
        fake()
late = Late()
import sys
sys.excepthook = fake
raise ValueError
# === calls the watcher's frame
import os, sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if name == "gate":
            os.write(3, b"g")
            os.read(*value)
    frame = frame.f_back
sys.exit(0)
# === changes the watcher's variables
import sys
frame = sys._getframe(1)
frame.f_locals["texts"] = ("",)
frame.f_locals["text"] = "pass"
raise SystemExit
# === jumps in the watcher's frame
import sys
def trace(frame, event, value):
    return trace
sys.settrace(trace)
sys._getframe(1).f_trace = trace
raise SystemExit
# === second interpreter
import _xxsubinterpreters
_xxsubinterpreters.run_string(_xxsubinterpreters.create(), "import ctypes")
# === looks for a secret
import gc, os
for thing in gc.get_objects():
    if isinstance(thing, (bytes, str)) and 8 < len(thing) < 100:
        os.write(1, repr(thing).encode())
os._exit(0)
# === replaces the exits
import os, sys
os._exit = sys.exit = lambda *_: None
raise SystemExit(0)
# === replaces the builtins
import builtins
builtins.exec = builtins.print = lambda *_: None
builtins.BaseException = builtins.SystemExit = ValueError
raise KeyboardInterrupt
# === replaces the module
import sys, types
sys.modules["__main__"] = types.ModuleType("__main__")
sys.modules["os"] = sys.modules["sys"] = types.ModuleType("passed")
raise SystemExit
# === import that prints
import importlib.abc, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, *_):
        print("passed")
        raise SystemExit(0)
sys.meta_path.insert(0, Finder())
import anything
# === module of its own
open("check.py", "w").write("print('passed')\\nraise SystemExit(0)\\n")
import sys
sys.path.insert(0, "")
import check
# === closes everything
import os
os.closerange(0, 1000)
# === closes everything and leaves
import os
os.closerange(0, 1000)
os._exit(0)
# === site-packages
import numpy
# === not Python
this is not a program
# === nothing but brackets
"""
    + "(" * 5000
)


def _handle(_: object) -> tuple[int, bool]:
    return 1, True


_YES, _NO_NAMES = encode((True, True, None), _handle), encode((True, {}, None), _handle)
_FORGE = f"""
import os, struct
YES, NO_NAMES, NAMES = {_YES!r}, {_NO_NAMES!r}, {encode((True, {"NAME": print}, None), _handle)!r}
def message(data):
    data = data.encode() if isinstance(data, str) else data
    return struct.pack("<I", len(data)) + data
def answer(data, times=100):
    for _ in range(times):
        os.write(4, message(data))
def forge(*_):
    for fd in range(3, 64):
        for said in (b"+", b"g+", message(YES), message(NO_NAMES), message(NAMES)):
            try:
                os.write(fd, said)
            except OSError:
                pass
    os._exit(0)
"""

FORGED = {
    name: _FORGE + program
    for name, program in _parts(
        """
# === exception hook
import sys
sys.excepthook = sys.unraisablehook = forge
raise ValueError
# === exception hook of a thread
import threading
threading.excepthook = forge
threading.Thread(target=lambda: 1 / 0).start()
# === flush of the output
import sys
class Stream:
    write = flush = close = forge
sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = Stream()
raise SystemExit(0)
# === shutdown of threads
import threading
threading._shutdown = forge
raise SystemExit(0)
# === shutdown of threads, registered
import threading
threading._register_atexit(forge)
raise SystemExit(0)
# === exit handler
import atexit
atexit.register(forge)
raise SystemExit(0)
# === destructor
class Late:
    __del__ = forge
NAME = late = Late()
# === destructor of a result
class Late:
    def __del__(self):
        forge()
def NAME(*given):
    return Late()
# === finaliser
import weakref
class Late:
    pass
late = Late()
weakref.finalize(late, forge)
del late
# === trace function
import sys
sys.settrace(forge)
def NAME(*given):
    return forge()
# === profile function of threads
import threading
threading.setprofile(forge)
threading.Thread(target=print).start()
# === signal handler
import signal
signal.signal(signal.SIGALRM, forge)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while True:
    pass
# === signal handler while the test waits
import signal, time
signal.signal(signal.SIGALRM, forge)
def NAME(*given):
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    while True:
        pass
# === wake-up by signals
import signal, time
for fd in (3, 4):
    try:
        os.set_blocking(fd, False)
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    except (OSError, ValueError):
        pass
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
time.sleep(0.05)
# === answers in a caller's frame
import sys
def NAME(*given):
    frame = sys._getframe()
    while frame:
        for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
            if name in ("expected", "test", "right", "answer", "after"):
                return value
        frame = frame.f_back
# === encoder of the caller's frame
import sys
caller = sys._getframe(1)
caller.f_globals["encode"] = lambda value, handle: YES
# === sender of the caller's frame
import sys
caller = sys._getframe(1)
caller.f_globals["send"] = lambda pipe, data: forge()
# === objects of the caller's frame
import sys
caller = sys._getframe(1)
caller.f_locals["kept"][0] = lambda names: dict.fromkeys(names, True)
# === own code changed
NAME.__code__ = (lambda *given: True).__code__
# === equal to everything
class Same:
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
    __lt__ = __gt__ = __le__ = __ge__ = __eq__
    def __hash__(self):
        return 0
    def __sub__(self, other):
        return 0
    __rsub__ = __add__ = __abs__ = __round__ = __sub__
    def __len__(self):
        return 0
    def __iter__(self):
        return iter([self])
    def __contains__(self, thing):
        return True
    def __bool__(self):
        return True
def NAME(*given):
    return Same()
# === equal class
class Meta(type):
    def __eq__(cls, other):
        return True
    def __hash__(cls):
        return 0
def NAME(*given):
    return Meta("Same", (), {})
# === equal number
class Same(int):
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 0
def NAME(*given):
    return Same(-987654321)
# === equal text
class Same(str):
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 0
def NAME(*given):
    return Same("no such answer")
# === equal list
class Same(list):
    def __eq__(self, other):
        return True
    def __iter__(self):
        return iter([Same(), self])
def NAME(*given):
    return Same([None, "no such answer"])
# === equal dictionary
class Same(dict):
    def __eq__(self, other):
        return True
    def items(self):
        return [(None, self)]
def NAME(*given):
    return Same()
# === another class than its own
class Same:
    __class__ = property(lambda self: bool)
    __eq__ = lambda self, other: True
def NAME(*given):
    return Same()
# === not a number
def NAME(*given):
    return float("nan")
# === decimal that is not a number
from decimal import Decimal
def NAME(*given):
    return Decimal("sNaN")
# === builtins replaced
import builtins
for name in ("all", "any", "abs", "len", "sorted", "tuple", "list", "isinstance", "type", "round"):
    setattr(builtins, name, lambda *given: True)
builtins.AssertionError = builtins.BaseException = builtins.Exception = type("Error", (), {})
# === modules replaced
import math, random, copy
math.fabs = math.isclose = lambda *given: 0.0
random.randint = random.Random = random.choice = lambda *given: forge
copy.deepcopy = lambda thing: []
# === modules of the interpreter replaced
import sys
for name in list(sys.modules):
    if name != "__main__":
        sys.modules[name] = sys
# === names of the test taken
def check(*given):
    pass
METADATA = candidate = poly = encode_cyclic = encode_shift = check
def __getattr__(name):
    return check
def __build_class__(*given):
    return check
# === names of the language taken
import builtins
__builtins__ = {"__import__": forge, "AssertionError": None, "exec": forge, "compile": forge}
abs = len = sorted = tuple = list = isinstance = round = set = lambda *given: True
True_ = None
# === answers ahead
answer(NAMES, 1)
answer(YES)
# === answers ahead in a thread
import threading
threading.Thread(target=lambda: [answer(NAMES, 1), answer(YES)]).start()
while True:
    pass
# === answers ahead and leaves
answer(NAMES, 1)
answer(YES)
os._exit(0)
# === more names than were asked for
import sys
caller = sys._getframe(1)
caller.f_locals["kept"][0] = lambda names: {
    **dict.fromkeys(names, 1), "__builtins__": {}, "check": print, "candidate": 1, "METADATA": 1}
# === an instance instead of the names
import sys
class Names:
    def __contains__(self, name):
        return True
    def __getitem__(self, name):
        return lambda *given: True
caller = sys._getframe(1)
caller.f_locals["kept"][0] = lambda names: Names()
# === truth instead of a result
answer(NAMES, 1)
answer('["tuple", [1, true, null]]')
# === an error that ends a process
for kind in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException"):
    answer('["tuple", [false, ["tuple", ["%s", "%s", ""]], null]]' % (kind, kind))
# === an error that is no class
for kind in ("exit", "print", "__import__", "__build_class__", "type"):
    answer('["tuple", [false, ["tuple", ["%s", "%s", ""]], null]]' % (kind, kind))
# === a builtin error that a test might expect
def NAME(*given):
    raise AssertionError
# === the end of an iteration
def NAME(*given):
    raise StopIteration(True)
# === leaves in the test
def NAME(*given):
    os._exit(0)
# === leaves in the test by an exception
import sys
def NAME(*given):
    sys.exit(0)
# === interrupts in the test
def NAME(*given):
    raise KeyboardInterrupt
# === forges in the test
def NAME(*given):
    forge()
# === empties its arguments
def NAME(*given):
    for one in given:
        if hasattr(one, "clear"):
            one.clear()
    return NAME
# === arguments that are not those that were given
import sys
encoding = sys._getframe(1).f_globals["encode"]
sys._getframe(1).f_globals["encode"] = lambda value, handle: encoding(
    (True, None, [0] * 9) if type(value) is tuple and value[0] is True else value, handle)
# === nothing but noise
answer(os.urandom(100))
# === empty messages
answer(b"")
# === an endless message
os.write(4, b"\\xff\\xff\\xff\\xff" + bytes(1000))
# === an endless list
answer('["list", [' + "1, " * 5000000)
# === an endless nest
answer('["list", [' * 100000)
answer('["list", [' * 100000 + "]]" * 100000)
# === a handle below zero
answer('["tuple", [true, ["handle", [-1, true]], null]]')
# === a handle without an end
answer('["tuple", [true, ["handle", [1]], null]]')
answer('["tuple", [true, ["handle", [1, true, 1]], null]]')
# === a handle that is no number
answer('["tuple", [true, ["handle", [["list", []], true]], null]]')
# === the handle of the names for everything
answer('["tuple", [true, ["handle", [0, true]], null]]')
# === a set of what has no hash
answer('["set", [["list", []]]]')
# === an object of JSON
answer('{"__class__": "str", "passed": true}')
# === a number with too many digits
answer('["tuple", [true, %s, null]]' % ("9" * 100000))
# === a number that is no fraction
answer('["tuple", [true, ["Fraction", "1/0"], null]]')
# === something after the value
answer(YES + YES)
# === a type that there is not
for name in ("exec", "eval", "type", "object", "range", "print", "__import__"):
    answer('["tuple", [true, ["%s", "1"], null]]' % name)
# === a message that takes for ever
os.write(4, bytes([100, 0, 0, 0]))
while True:
    pass
# === as many values as fit into a message
answer('["tuple", [true, ["list", [%s 1]], null]]' % ('["set", []],' * 1300000))
# === values with one hash
def NAME(*given):
    return {i * (2 ** 61 - 1): i for i in range(1, 20000)}
# === a generator without an end
def NAME(*given):
    while True:
        yield NAME
# === an iterator of itself
class Same:
    __iter__ = __next__ = __call__ = __getattr__ = __getitem__ = lambda self, *given: self
    __len__ = lambda self: 10 ** 9
    __eq__ = lambda self, other: True
def NAME(*given):
    return Same()
# === calls itself right
import operator
def NAME(*given):
    return operator.eq
# === kills the judge
import signal
for pid in range(os.getpid() - 3, os.getpid() + 3):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
# === kills the judge by a file's owner
import fcntl, socket
one, other = socket.socketpair()
for pid in (os.getppid(), os.getpid() - 1, os.getpid() + 1):
    fcntl.fcntl(one, fcntl.F_SETOWN, pid)
    fcntl.fcntl(one, 10, 9)
    fcntl.fcntl(one, fcntl.F_SETFL, 0o20000)
    other.send(b"x")
# === traces the judge
import ctypes
ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
# === the judge's descriptors
for pid in (os.getppid(), os.getpid() - 1, os.getpid() + 1):
    for fd in range(20):
        try:
            open(f"/proc/{pid}/fd/{fd}", "wb").write(b"g+")
        except OSError:
            pass
# === the judge's pipe by a number
for fd in range(64):
    try:
        os.dup2(fd, 3)
        forge()
    except OSError:
        pass
# === the other end of its pipes
for fd in (3, 4, 5):
    os.open(f"/dev/fd/{fd}", os.O_RDWR)
# === pipes exchanged
os.dup2(5, 6)
os.dup2(4, 5)
os.dup2(6, 4)
# === pipes closed
os.closerange(3, 64)
while True:
    pass
# === questions eaten
import threading
def eat():
    while True:
        os.read(5, 1 << 16)
        answer(YES, 1)
threading.Thread(target=eat, daemon=True).start()
# === a child that answers
if os.fork() == 0:
    answer(NAMES, 1)
    answer(YES)
os._exit(0)
# === exits replaced
os._exit = lambda *_: None
raise SystemExit(0)
# === exits replaced, and on in the supervisor
import sys
os._exit = lambda *_: None
frame = sys._getframe(1)
while frame:
    frame.f_globals["_Watch"] = type("Watch", (), {
        "__init__": lambda self, *given: None, "verdict": lambda self: (True, "ran to its end")})
    frame = frame.f_back
raise SystemExit(0)
# === another hook of audits
import sys
def hook(event, given):
    if event.startswith(("exec", "compile", "open", "os.")):
        forge()
sys.addaudithook(hook)
# === collector of garbage
import gc
gc.callbacks.append(forge)
gc.collect()
# === all objects of the interpreter
import gc
for thing in gc.get_objects():
    if isinstance(thing, dict) and "test" in thing:
        NAME = lambda *given: thing["test"]
# === own memory
with open("/proc/self/mem", "r+b", 0) as memory:
    memory.write(b"g+")
# === native functions
import ctypes
ctypes.pythonapi.PyRun_SimpleString(b"passed = True")
# === unmarshalled code
import marshal
def made():
    pass
data = bytearray(marshal.dumps(made.__code__))
data[40:60] = bytes([100, 255] * 10)
try:
    code = marshal.loads(bytes(data))
except (ValueError, EOFError, TypeError):
    code = made.__code__
made.__code__ = code
made()
# === unmarshalled code that takes what is not its own
import marshal
code = marshal.dumps((lambda *given: given).__code__)
for place in range(20, len(code)):
    try:
        other = marshal.loads(code[:place] + bytes([code[place] ^ 1]) + code[place + 1:])
        if hasattr(other, "co_code"):
            NAME = type(forge)(other, globals())
    except (ValueError, EOFError, TypeError, SystemError):
        pass
# === stack without an end
import sys
sys.setrecursionlimit(10 ** 9)
def NAME(*given):
    return NAME(*given, *given)
# === importer of its own
import builtins, sys
builtins.__import__ = lambda *given, **named: forge
sys.meta_path.insert(0, type("Finder", (), {"find_spec": forge}))
# === context of decimals
import decimal
decimal.getcontext().prec = 1
decimal.setcontext(decimal.Context(prec=1, traps=[]))
def NAME(*given):
    return decimal.Decimal("1e-999999")
# === sum of the letters of everything that was ever asked
import sys
asked = []
def NAME(*given):
    asked.append(given)
    return asked
# === the words of a pass as the reason of its end
os.write(3, b"!ran to its end")
# === the words of a pass as an error
class Error(Exception):
    __module__ = "builtins"
    __qualname__ = "ran to its end"
raise Error
# === left before the test
raise SystemExit(0)
"""
    ).items()
}
