"""Programs that misbehave, and a command that runs them all and prints what became of each.

The tests import it, and run it as a script under another user.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

from tlora.scoring.sandbox import Limits, Protection, Result, Sandbox

LIMITS = Limits(seconds=600.0, cpu_seconds=60, memory=300 << 20, output=200_000, processes=8)
SHORT = replace(LIMITS, seconds=1.5, cpu_seconds=1)
"""For programs that may time out. No other is short of time, however busy the machine is."""
TESTS = "for n in (3, 5):\n    assert abs(answer(n) - 7 * n) < 0.5"
"""No program below computes 7 n, but those that have got past a limit."""
WRONG = "def answer(n):\n    return 0\n"
BY_ENDING = {"failed", "crashed"}

# Name -> (program, what may become of it). {port}, {file} and {folder} are filled in.
PROGRAMS: dict[str, tuple[str, set[str]]] = {
    # Using up the machine
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"timed out", "memory"},
    ),
    "thread bomb": (
        "import threading, time\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(999,)).start()",
        {"failed"},
    ),
    "memory bomb": ("kept = []\nwhile True: kept.append(bytearray(10**7))", {"memory"}),
    "memory of many": (
        "import os, time\nfor _ in range(2): os.fork()\nkept = b'x' * (200 << 20)\ntime.sleep(999)",
        {"memory"},
    ),
    "memory in nameless files": (
        "import os\nkept = []\ntry:\n    while len(kept) < 30:\n"
        "        kept.append(os.memfd_create('m'))\n        os.write(kept[-1], bytes(16 << 20))\n"
        "except OSError: pass\ndef answer(n): return 7 * n * (len(kept) == 30)",
        {"failed"},
    ),
    "memory in segments": (
        "import ctypes\nlibc, made = ctypes.CDLL(None), 0\nlibc.shmat.restype = ctypes.c_void_p\n"
        "for _ in range(30):\n    segment = libc.shmget(0, 16 << 20, 0o1600)\n"
        "    if segment < 0: break\n"
        "    address = ctypes.c_void_p(libc.shmat(segment, None, 0))\n"
        "    ctypes.memset(address, 1, 16 << 20)\n    libc.shmdt(address)\n    made += 1\n"
        "def answer(n): return 7 * n * (made == 30)",
        {"failed"},
    ),
    "a file system of its own": (
        "import ctypes, os\nlibc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()\n"
        "written = 0\ntry:\n    libc.unshare(0x10020000)\n"
        "    open('/proc/self/setgroups', 'w').write('deny')\n"
        "    open('/proc/self/uid_map', 'w').write(f'0 {user} 1')\n"
        "    open('/proc/self/gid_map', 'w').write(f'0 {group} 1')\n    os.mkdir('own')\n"
        "    if libc.mount(b'm', b'own', b'tmpfs', 0, b'size=1g') == 0:\n"
        "        for written in range(1, 21):\n"
        "            open(f'own/{written}', 'wb').write(bytes(15 << 20))\n"
        "except OSError: pass\ndef answer(n): return 7 * n * (written == 20)",
        {"failed"},
    ),
    "endless output": ("while True: print('x' * 1000)", {"output limit"}),
    "endless errors": ("import os\nwhile True: os.write(2, b'x' * 1000)", {"output limit"}),
    "huge file": (
        "f = open('huge', 'wb')\nwhile True: f.write(b'x' * 10**6)",
        {"failed"},
    ),
    "many files": (
        "n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'wb').write(b'x' * 10**6)",
        {"failed", "timed out"},
    ),
    "endless loop": ("while True: pass", {"timed out"}),
    "endless sleep": ("import time\ntime.sleep(1000)", {"timed out"}),
    "deep recursion": ("def f(): f()\nf()", BY_ENDING),
    # Refusing to end
    "ignores signals": (
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        {"timed out", "crashed"},
    ),
    "blocks signals": (
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\n"
        "time.sleep(1000)",
        {"timed out"},
    ),
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.setsid()\n        os.closerange(0, 256)\n        time.sleep(1000)\n"
        "    os._exit(0)\n" + WRONG,
        {"failed"},
    ),
    "kills everybody": (
        "import os, signal\nfor p in [os.getppid(), 1, *range(2, 400)]:\n"
        "    if p != os.getpid():\n        try: os.kill(p, 9)\n        except OSError: pass\n"
        + WRONG,
        BY_ENDING,
    ),
    "kills its group": ("import os\nos.killpg(0, 9)", BY_ENDING),
    # Reaching out
    "calls home": (
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n" + WRONG,
        {"failed"},
    ),
    "deletes a file": ("import os\nos.remove({file!r})\n", {"failed"}),
    "deletes a folder": ("import shutil\nshutil.rmtree({folder!r}, True)\n" + WRONG, {"failed"}),
    "writes beside": ("open({folder!r} + '/new', 'w')\n", {"failed"}),
    "writes to home and /tmp": (
        "import os\nfor p in ('/tmp', '/root', '/home', '/var/tmp', '/dev/shm', '/'):\n"
        "    try: open(p + '/tlora-canary', 'w').write('x')\n    except OSError: pass\n" + WRONG,
        {"failed"},
    ),
    "overwrites Python": ("import os\nopen(os.__file__, 'a')\n", {"failed"}),
    "reads a secret": ("raise ValueError(open({file!r}).read())\n", {"failed"}),
    "reads environments": (
        "import os, glob\nfound = [dict(os.environ)]\n"
        "for p in [*glob.glob('/proc/*/environ'), f'/proc/{os.getppid()}/environ']:\n"
        "    try: found.append(open(p).read())\n    except OSError: pass\nraise ValueError(found)",
        {"failed"},
    ),
    "reads its examiner": (
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)\n",
        {"failed"},
    ),
    # Claiming to have passed
    "sys.exit": ("import sys\nsys.exit(0)", {"failed"}),
    "os._exit": ("import os\nos._exit(0)", {"failed"}),
    "exits when called": ("import os\ndef answer(n): os._exit(0)", {"failed"}),
    "raises SystemExit when called": ("def answer(n): raise SystemExit(0)", {"failed"}),
    "own abs": ("def abs(x): return 0\n" + WRONG, {"failed"}),
    "patched builtins": (
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = ValueError\n"
        "builtins.range = lambda *_: []\n" + WRONG,
        {"failed"},
    ),
    "agreeable object": (
        "class Any(float):\n    def __sub__(self, o): return self\n"
        "    def __abs__(self): return 0\n    def __lt__(self, o): return True\n"
        "    __eq__ = __gt__ = __lt__\ndef answer(n): return Any(1)",
        {"failed"},
    ),
    "agreeable stranger": (
        "class Any:\n    def __sub__(self, o): return self\n    def __abs__(self): return 0\n"
        "def answer(n): return Any()",
        {"failed"},
    ),
    "forged verdict": (
        "import os\nfor fd in range(256):\n    if fd != 3:\n"
        '        try: os.write(fd, b\'{"status": "passed", "detail": ""}\\n\')\n'
        "        except OSError: pass\n" + WRONG,
        {"failed"},
    ),
    "forged replies": (
        'import os\nos.write(3, b\'["result", ["dict", []], []]\\n\' * 9)\nos._exit(0)',
        {"failed"},
    ),
    "forged builtins": (
        "import sys\nwire = sys.modules['inside.wire']\npack = wire.Peer.pack\n"
        "def forged(self, value):\n    if isinstance(value, dict) and 'answer' in value:\n"
        "        value = {**value, '__builtins__': {'abs': lambda x: 0}}\n"
        "    return pack(self, value)\nwire.Peer.pack = forged\n" + WRONG,
        {"failed"},
    ),
    "broken replies": ("import os\nos.write(3, b'[' * 100000 + b'\\n')\n" + WRONG, BY_ENDING),
    "looks for the tests": (
        "import gc, sys\nmark = ' '.join(['-', '7', '*'])\n"
        "def has(o):\n    try: return mark in repr(o)[:99999]\n    except Exception: return False\n"
        "seen = [o for o in gc.get_objects() if has(o)]\n"
        "f = sys._getframe()\nwhile f:\n"
        "    seen += [o for o in f.f_locals.values() if has(o)]\n    f = f.f_back\n"
        "def answer(n): return 7 * n if seen else 0",
        {"failed"},
    ),
}


def filled(port: int, file: str, folder: str) -> dict[str, str]:
    """Return the programs with what they attack."""
    places = {"{port}": str(port), "{file!r}": repr(file), "{folder!r}": repr(folder)}
    programs = {name: program for name, (program, _) in PROGRAMS.items()}
    for mark, text in places.items():
        programs = {name: program.replace(mark, text) for name, program in programs.items()}
    return programs


def outcomes(protection: str, programs: dict[str, str]) -> dict[str, list[str]]:
    """Run all programs, several at a time; return status, detail and stderr of each."""
    sandbox = Sandbox(
        allow_untrusted_code=True, protection=cast(Protection, protection), limits=LIMITS
    )
    short = copy.copy(sandbox)
    short.limits = SHORT

    def run(name: str) -> Result:
        box = short if "timed out" in PROGRAMS[name][1] else sandbox
        return box.run(programs[name], TESTS)

    with ThreadPoolExecutor(4) as pool:
        results = pool.map(run, programs)
        return {
            name: [result.status, result.detail, result.stderr]
            for name, result in zip(programs, results, strict=True)
        }


if __name__ == "__main__":
    level, port, folder = sys.argv[1:]
    told = outcomes(level, filled(int(port), str(Path(folder) / "secret"), folder))
    sys.stdout.write(json.dumps({"user": os.getuid(), "outcomes": told}))
