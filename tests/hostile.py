"""Programs that must not pass, and must not reach anything: `HOSTILE`, by what they try.

`{canary}` is a file of the user's, `{folder}` the folder it is in, `{port}` a port that listens,
`{parent}` the process that runs the test.
"""

from __future__ import annotations

__all__ = ["HOSTILE"]

HOSTILE: dict[str, str] = {}


def _add(section: str) -> None:
    for part in section.split("\n# === ")[1:]:
        name, program = part.split("\n", 1)
        HOSTILE[name.strip()] = program


_add(
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
