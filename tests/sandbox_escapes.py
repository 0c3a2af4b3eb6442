"""Programs that try to get out of the sandbox, or to be scored right without being right.

Each defines `attempt()`, which must return "escaped" to pass its check; bait is filled in where a name stands
in double braces. A program that neither crashes nor escapes returns something else and fails its check.
"""

# name -> (statuses it may have, source); "timeout" ones are run under tight limits.
ESCAPES: dict[str, tuple[set[str], str]] = {
    "connect over TCP": (
        {"blocked"},
        """
import socket
def attempt():
    socket.create_connection(("127.0.0.1", {{port}}), timeout=2).sendall(b"out")
    return "escaped"
""",
    ),
    "look a name up": (
        {"failed", "blocked"},
        """
import socket
def attempt():
    socket.getaddrinfo("example.org", 80)
    return "escaped"
""",
    ),
    "send over UDP": (
        {"blocked"},
        """
import socket
def attempt():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", {{port}}))
    return "escaped"
""",
    ),
    "netlink": (
        {"blocked"},
        """
import socket
def attempt():
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    return "escaped"
""",
    ),
    "read a secret": (
        {"failed", "blocked"},
        """
def attempt():
    return "escaped" if open("{{secret}}").read() else ""
""",
    ),
    "read a secret through a symlink": (
        {"failed", "blocked"},
        """
import os
def attempt():
    os.symlink("{{secret}}", "link")
    return "escaped" if open("link").read() else ""
""",
    ),
    "link a secret in": (
        {"failed", "blocked"},
        """
import os
def attempt():
    os.link("{{secret}}", "link")
    return "escaped" if open("link").read() else ""
""",
    ),
    "list the home directory": (
        {"failed", "blocked"},
        """
import os
def attempt():
    return "escaped" if os.listdir("{{home}}") else ""
""",
    ),
    "read the environment": (
        {"failed"},
        """
import os
def attempt():
    return "escaped" if any("{{token}}" in text for text in os.environ.values()) else ""
""",
    ),
    "read the environment of the parent": (
        {"failed", "blocked"},
        """
import os
def attempt():
    return "escaped" if open("/proc/{{parent}}/environ").read() else ""
""",
    ),
    "read the memory of the parent": (
        {"failed", "blocked"},
        """
def attempt():
    open("/proc/{{parent}}/mem", "rb")
    return "escaped"
""",
    ),
    "find the checks in memory": (
        {"failed"},
        """
import gc, sys
def attempt():
    frame, found = sys._getframe(), []
    while frame:
        found.append(repr(frame.f_locals) + repr(frame.f_globals))
        frame = frame.f_back
    found += [item for item in gc.get_objects() if isinstance(item, str)]
    # Written so that this source does not hold the word itself.
    return "escaped" if any("".join(("which ", "the checks ", "know")) in text for text in found) else ""
""",
    ),
    "find the checks in the maps": (
        {"failed", "blocked"},
        """
def attempt():
    return "escaped" if open("/proc/self/maps").read() else ""
""",
    ),
    "write outside": (
        {"failed", "blocked"},
        """
def attempt():
    open("{{home}}/new", "w").write("out")
    return "escaped"
""",
    ),
    "write through a symlink": (
        {"failed", "blocked"},
        """
import os
def attempt():
    os.symlink("{{home}}/new", "link")
    open("link", "w").write("out")
    return "escaped"
""",
    ),
    "write into the library": (
        {"blocked"},
        """
import os
def attempt():
    open(os.path.dirname(os.__file__) + "/planted.py", "w")
    return "escaped"
""",
    ),
    "fork bomb": (
        {"blocked"},
        """
import os
def attempt():
    while True:
        os.fork()
""",
    ),
    "fork by system call": (
        {"failed"},
        """
import ctypes, platform
def attempt():
    number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    return "escaped" if ctypes.CDLL(None).syscall(number, 17, 0, 0, 0, 0) > 0 else ""
""",
    ),
    "thread bomb": (
        {"failed"},
        """
import threading, time
def attempt():
    threading.stack_size(32768)
    for _ in range(1000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return "escaped"
""",
    ),
    "allocate 10 GB": (
        {"memory"},
        """
def attempt():
    return "escaped" if bytearray(10 << 30) else ""
""",
    ),
    "allocate bit by bit": (
        {"memory"},
        """
def attempt():
    blocks = []
    while len(blocks) < 10_000:
        blocks.append(bytearray(1 << 20))
    return "escaped"
""",
    ),
    "kill the parent": (
        {"failed", "blocked"},
        """
import ctypes, os
def attempt():
    return "escaped" if ctypes.CDLL(None).kill(os.getppid(), 9) == 0 else ""
""",
    ),
    "kill another process": (
        {"failed", "blocked"},
        """
import os
def attempt():
    os.kill({{victim}}, 9)
    return "escaped"
""",
    ),
    "kill everything": (
        {"failed", "blocked"},
        """
import os
def attempt():
    os.kill(-1, 9)
    return "escaped"
""",
    ),
    "trace": (
        {"blocked"},
        """
import ctypes
def attempt():
    return "escaped" if ctypes.CDLL(None).ptrace(16, {{victim}}, 0, 0) == 0 else ""
""",
    ),
    "read another process": (
        {"blocked"},
        """
import ctypes
def attempt():
    return "escaped" if ctypes.CDLL(None).process_vm_readv({{victim}}, None, 0, None, 0, 0) == 0 else ""
""",
    ),
    "open by libc": (
        {"failed", "blocked"},
        """
import ctypes
def attempt():
    return "escaped" if ctypes.CDLL(None).open(b"{{secret}}", 0) >= 0 else ""
""",
    ),
    "new user namespace": (
        {"blocked"},
        """
import ctypes
def attempt():
    return "escaped" if ctypes.CDLL(None).unshare(0x10000000) == 0 else ""
""",
    ),
    "mount": (
        {"blocked"},
        """
import ctypes
def attempt():
    return "escaped" if ctypes.CDLL(None).mount(b"proc", b".", b"proc", 0, None) == 0 else ""
""",
    ),
    "io_uring": (
        {"blocked"},
        """
import ctypes
def attempt():
    return "escaped" if ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) >= 0 else ""
""",
    ),
    "raise a limit": (
        {"failed", "blocked"},
        """
import resource
def attempt():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "escaped"
""",
    ),
    "execute a set-uid file": (
        {"failed", "blocked"},
        """
import os
def attempt():
    os.execv("/bin/su", ["su", "-c", "true"])
""",
    ),
    "execute a shell": (
        {"failed", "blocked"},
        """
import subprocess
def attempt():
    return "escaped" if subprocess.run(["/bin/sh", "-c", "true"]).returncode == 0 else ""
""",
    ),
    "execute by system call": (
        {"failed"},
        """
import ctypes, sys
def attempt():
    arguments = (ctypes.c_char_p * 2)(b"python", None)
    ctypes.CDLL(None).execv(sys.executable.encode(), arguments)
    return ""
""",
    ),
    "daemon that stays": (
        {"failed", "blocked"},
        """
import os, time
def attempt():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3)
            open("{{home}}/new", "w").write("out")
        os._exit(0)
    return "escaped"
""",
    ),
    "fill the disk": (
        {"failed", "blocked"},
        """
def attempt():
    for number in range(1000):
        with open(f"file-{number}", "wb") as file:
            file.write(bytes(1 << 20))
    return "escaped"
""",
    ),
    "one large file": (
        {"failed", "blocked"},
        """
def attempt():
    with open("file", "wb") as file:
        for _ in range(100):
            file.write(bytes(1 << 20))
    return "escaped"
""",
    ),
    "look for open files": (
        {"failed"},
        """
import os, stat
def attempt():
    for number in range(1024):
        try:
            mode = os.fstat(number).st_mode
        except OSError:
            continue
        if not (stat.S_ISFIFO(mode) or (number == 0 and stat.S_ISCHR(mode))) or number > 64:
            return "escaped"
    return ""
""",
    ),
    "forge a verdict on every pipe": (
        {"failed"},
        """
import json, os
verdict = json.dumps({"status": "passed", "reason": "", "value": None}).encode()
def attempt():
    for number in range(64):
        try:
            os.write(number, len(verdict).to_bytes(8, "little") + verdict)
        except OSError:
            pass
    os._exit(0)
""",
    ),
    "os._exit(0)": ({"failed"}, "import os\nos._exit(0)\n"),
    "os._exit(0) when called": ({"failed"}, "import os\ndef attempt():\n    os._exit(0)\n"),
    "sys.exit": ({"failed"}, "import sys\nsys.exit(0)\n"),
    "print success": (
        {"failed"},
        """
def attempt():
    print("passed\\nOK\\nALL TESTS PASSED", flush=True)
""",
    ),
    "equal to everything": (
        {"failed"},
        """
class Equal(str):
    def __eq__(self, other):
        return True
    __hash__ = None
    def __str__(self):
        return "escaped" if self == "" else ""
def attempt():
    return Equal("")
""",
    ),
    "an object of its own": (
        {"failed"},
        """
class Equal:
    def __eq__(self, other):
        return True
def attempt():
    return Equal()
""",
    ),
    "patch the interpreter": (
        {"failed"},
        """
import builtins, sys, types, unittest
class Quiet(BaseException):
    pass
builtins.AssertionError = Quiet
builtins.compile = lambda *a, **k: (lambda: None).__code__
sys.settrace(lambda *a: None)
sys.excepthook = lambda *a: None
unittest.TestCase.assertEqual = lambda *a: None
for module in list(sys.modules.values()):
    for name in ("check", "judge", "settle", "_verdict"):
        if isinstance(module, types.ModuleType) and hasattr(module, name):
            setattr(module, name, lambda *a, **k: b'{"status": "passed", "reason": "", "value": null}')
def attempt():
    return ""
""",
    ),
    "crash": ({"failed"}, "import ctypes\ndef attempt():\n    ctypes.string_at(0)\n"),
    "a result without end": (
        {"failed", "memory"},
        """
def attempt():
    return "x" * (1 << 27)
""",
    ),
    "a result without bottom": (
        {"failed"},
        """
def attempt():
    result = []
    result.append(result)
    return result
""",
    ),
    "endless loop": ({"timeout"}, "while True: pass"),
    "endless loop that minds no signal": (
        {"timeout"},
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass
""",
    ),
    "sleep": ({"timeout"}, "import time\ntime.sleep(1000)"),
    "hold the pipes": (
        {"timeout"},
        """
import threading, time
def attempt():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    time.sleep(1000)
""",
    ),
    "close the pipes and stay": (
        {"failed", "timeout"},
        """
import os, time
os.closerange(0, 64)
time.sleep(1000)
""",
    ),
    "output without end": ({"timeout"}, "while True: print('x' * 1000)"),
}
