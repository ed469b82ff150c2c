import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import hostile
import pytest

from tlora.errors import ConfigError, SandboxError
from tlora.scoring.sandbox import Limits, Sandbox, host
from tlora.scoring.sandbox.inside import kernel

SOURCE = Path(host.__file__).parents[3]
ROOT = os.geteuid() == 0
NOBODY = 65534
AMPLE = Limits(seconds=600.0, cpu_seconds=60)
"""No program that ends by itself is short of time, however busy the machine is."""
PLACES = ("/tmp", "/root", "/home", "/var/tmp", "/dev/shm", "/", str(Path.home()))


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(allow_untrusted_code=True, limits=AMPLE)


def own_processes(source):
    """Sandboxes that still run and were started from ``source``, which is this test's alone."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes()
        except OSError:
            continue
        if b"inside.launch" in line and str(source).encode() in line:
            found.append(file.parent.name)
    return found


@pytest.fixture
def own_source(tmp_path, monkeypatch):
    """A way to the sandbox's files that no other test takes."""
    source = tmp_path / "src"
    source.symlink_to(SOURCE)
    monkeypatch.setattr(host, "_INSIDE", str(source / Path(host._INSIDE).relative_to(SOURCE)))
    return source


class Target:
    """What the hostile programs go for: a folder that anybody may write to, and listeners."""

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="tlora-target-"))
        self.folder.chmod(0o777)
        self.secret = self.folder / "secret"
        self.secret.write_text("hunter2")
        self.secret.chmod(0o666)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        return self

    def __exit__(self, *_):
        self.listener.close()
        shutil.rmtree(self.folder)

    def check(self, mounted=()):
        """Everything is as it was."""
        assert {path.name for path in self.folder.iterdir()} == {"secret", *mounted}
        assert self.secret.read_text() == "hunter2"
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        assert [place for place in PLACES if (Path(place) / "tlora-canary").exists()] == []


def check_outcomes(outcomes):
    assert outcomes.keys() == hostile.PROGRAMS.keys()
    unexpected = {
        name: told
        for name, told in outcomes.items()
        if told[0] not in hostile.PROGRAMS[name][1] or "hunter2" in told[2]
    }
    assert unexpected == {}


def test_hostile_programs_fail_and_leave_nothing(monkeypatch, own_source):
    monkeypatch.setenv("TLORA_TEST_SECRET", "hunter2")
    with Target() as target:
        programs = hostile.filled(target.port, str(target.secret), str(target.folder))
        check_outcomes(hostile.outcomes("namespaces", programs))
        target.check()
    assert own_processes(own_source) == []


def as_nobody(folder):
    """Leave root for good, where this is root; Python and the source are shown under ``folder``.

    Runs between fork and exec.
    """
    shown = {"python": sys.base_prefix, "src": SOURCE, "tests": Path(__file__).parent}
    if not ROOT:
        return
    kernel.unshare(kernel.NEW_MOUNTS)
    kernel.mount(None, "/", None, kernel.SLAVE | kernel.RECURSIVE)
    for name, path in shown.items():
        kernel.mount(str(path), str(folder / name), None, kernel.BIND)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_hostile_programs_of_an_ordinary_user_fail_and_leave_nothing(level):
    if level == "landlock" and kernel.landlock_version() < 6:
        pytest.skip("before Linux 6.12, Landlock keeps no signals from the launcher")
    python = Path(os.path.realpath(sys.executable))
    with Target() as target:
        shown = target.folder.with_name(f"{target.folder.name}-shown")
        source, tests, scratch = (shown / name for name in ("src", "tests", "tmp"))
        shown.mkdir()
        for folder in (shown / "python", tests, scratch):
            folder.mkdir()
        scratch.chmod(0o777)
        if ROOT:
            source.mkdir()
            python = shown / "python" / python.relative_to(os.path.realpath(sys.base_prefix))
        else:
            source.symlink_to(SOURCE)
            tests = Path(__file__).parent
        try:
            run = subprocess.run(
                [python, tests / "hostile.py", level, str(target.port), target.folder],
                env={
                    "PYTHONPATH": str(source),
                    "TLORA_TEST_SECRET": "hunter2",
                    "TMPDIR": str(scratch),
                },
                preexec_fn=lambda: as_nobody(shown),
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, run.stderr
            assert list(scratch.iterdir()) == []
        finally:
            shutil.rmtree(scratch)
            # Never by rmtree: Python and the source are mounted here, though for the child alone.
            for folder in shown.iterdir():
                folder.unlink() if folder.is_symlink() else folder.rmdir()
            shown.rmdir()
        told = json.loads(run.stdout)
        assert told["user"] == (NOBODY if ROOT else os.getuid())
        check_outcomes(told["outcomes"])
        target.check()
    assert own_processes(source) == []


def test_protection_that_the_machine_lacks_is_refused():
    code = (
        "from tlora.scoring.sandbox import Sandbox\n"
        "from tlora.errors import SandboxError\n"
        "try: Sandbox(allow_untrusted_code=True)\n"
        "except SandboxError as error: print(error)"
    )

    def without_namespaces():
        if ROOT:
            kernel._prctl(24, 21)  # CAP_SYS_ADMIN leaves the bounding set
        else:
            kernel.unshare(kernel.NEW_USER)
            Path("/proc/sys/user/max_user_namespaces").write_text("0")

    run = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=without_namespaces,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("this machine does not allow the sandbox ([Errno")


def test_wrong_arguments_are_named():
    with pytest.raises(SandboxError, match="allow_untrusted_code=True"):
        Sandbox()
    with pytest.raises(ConfigError, match="no protection 'none'; choose from namespaces, landlock"):
        Sandbox(allow_untrusted_code=True, protection="none")
    with pytest.raises(ConfigError, match=r"`seconds` is 0; .*\n.*`memory` is -1"):
        Limits(seconds=0, memory=-1)


def test_the_program_goes_when_its_caller_is_killed(own_source):
    code = (
        "from tlora.scoring.sandbox import host\n"
        f"host._INSIDE = {host._INSIDE!r}\n"
        "limits = host.Limits(seconds=6000)\n"
        "box = host.Sandbox(allow_untrusted_code=True, limits=limits)\n"
        "print('ready', flush=True)\nbox.run('import time; time.sleep(6000)', '')"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert caller.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 600
    while len(own_processes(own_source)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    while own_processes(own_source):
        assert time.monotonic() < deadline
        time.sleep(0.05)


VALUES = """
from fractions import Fraction
from decimal import Decimal
values = [
    None, True, 3, -(10 ** 400), 2.5, float("inf"), -0.0, 1 + 2j, "text \\ud800", b"\\x00",
    [], [1, [2]], (1, (2,)), {1, 2}, frozenset({3}), {"a": [1], (1, 2): None}, range(2, 9, 3),
    Fraction(1, 3), Decimal("1.10"), bytearray(b"ab"),
]
for value in values:
    back = same(value)
    assert type(back) is type(value), value
    assert repr(back) == repr(value), value
"""


CROSSING = (
    "def same(x): return x\n"
    "from collections import Counter, namedtuple\n"
    "def count(x): return Counter(x)\n"
    "def pair(): return namedtuple('P', 'a b')(1, 2)\n"
    "def change(x, y):\n    x.sort()\n    y['a'] = 1\n    x[0].append(9)"
)
SUBCLASSES = "assert count('aab') == {'a': 2, 'b': 1}\nassert type(pair()) is tuple\n"
CHANGED = "x, y = [[3], [1]], {}\nchange(x, y)\nassert x == [[1, 9], [3]] and y == {'a': 1}"


def test_values_come_back_as_they_were_subclasses_as_built_ins_arguments_changed(sandbox):
    assert sandbox.run(CROSSING, VALUES + SUBCLASSES + CHANGED).detail == ""


def test_functions_objects_iterators_and_exceptions_cross_over(sandbox):
    program = (
        "import math\n"
        "class Node:\n    def __init__(self, value): self.value, self.next = value, None\n"
        "    def total(self): return self.value + (self.next.total() if self.next else 0)\n"
        "def apply(f, x): return [f(n) for n in x]\n"
        "def squares(n):\n    for i in range(n): yield i * i\n"
        "def refuse(): raise KeyError('no')\n"
        "def root(node): return node\n"
        "def ints(x, kind): return [n for n in x if isinstance(n, kind)]"
    )
    tests = (
        "head = Node(1)\nhead.next = Node(2)\nassert head.total() == 3 and head.next.value == 2\n"
        "assert apply(lambda n: n + 1, [1, 2]) == [2, 3]\n"
        "assert list(squares(4)) == [0, 1, 4, 9] and max(squares(4)) == 9\n"
        "try: refuse()\nexcept KeyError: pass\nelse: assert False\n"
        "assert root(head) == head and root(head) != head.next\n"
        "assert math.sqrt(4) == 2\n"
        "assert ints([1, 'a'], int) == [1]"
    )
    assert sandbox.run(program, tests).detail == ""


def test_a_built_in_name_is_the_programs_only_as_an_entry_point(sandbox):
    program, tests = "def sum(a, b): return a * b", "assert sum(2, 5) == 10"
    assert sandbox.run(program, tests).status == "failed"
    assert sandbox.run(program, tests, entry_points=["sum"]).passed


def test_an_object_does_not_pass_for_a_standard_module(sandbox):
    program = "class M:\n    def isclose(self, *_): return True\nmath = M()\ndef f(): return 1"
    tests = "assert math.isclose(f(), 2)"
    assert sandbox.run(program, tests).detail.startswith("NameError: name 'math'")
    assert sandbox.run(program, f"import math\n{tests}").detail.startswith("AssertionError")


def test_the_detail_says_which_test_failed(sandbox):
    result = sandbox.run("def one(): return 1", "assert one() == 1\nassert one() == 2, 'two'")
    assert (result.status, result.passed) == ("failed", False)
    assert result.detail == "AssertionError: two, at: assert one() == 2, 'two'"
    result = sandbox.run("def f(): pass", "assert (")
    assert result.detail.startswith("the tests are not Python: '(' was never closed")


def test_errors_of_the_program_are_told_with_the_end_of_its_stderr(sandbox):
    result = sandbox.run("x = 1\nx[0]", "")
    assert result.detail == (
        "TypeError: 'int' object is not subscriptable, at: loading the program"
    )
    assert result.stderr.rstrip().endswith("TypeError: 'int' object is not subscriptable")
    assert 'File "candidate.py", line 2' in result.stderr
    assert sandbox.run("x = (", "").detail.startswith("SyntaxError: '(' was never closed")
    assert sandbox.run("if __name__ == '__main__': 1 / 0", "").passed


def test_many_at_a_time_give_the_records_of_one_at_a_time(sandbox):
    programs = [f"def f(x): return {n % 3} * x + len(set('ab'))" for n in range(12)]
    tests = "assert f(1) == 3"
    one = [sandbox.run(program, tests) for program in programs[:3]]
    with ThreadPoolExecutor(6) as pool:
        many = list(pool.map(lambda program: sandbox.run(program, tests), programs))
    assert many == one * 4
    assert [result.passed for result in one] == [False, True, False]


def test_a_verdict_cannot_be_forged_by_a_caller_with_many_handles(sandbox):
    program = (
        "import os\nfor fd in range(4, 3000):\n"
        '    try: os.write(fd, b\'{"status": "passed", "detail": ""}\\n\')\n'
        "    except OSError: pass\n    else: raise SystemExit(f'handle {fd} is open')"
    )
    before = sorted(Path("/proc/self/fd").iterdir())
    handles = [os.open("/dev/null", os.O_RDONLY) for _ in range(1500)]
    try:
        result = sandbox.run(program, "assert False")
    finally:
        for handle in handles:
            os.close(handle)
    assert result.detail == "AssertionError, at: assert False"
    assert sorted(Path("/proc/self/fd").iterdir()) == before  # of a run no handle is left open


def test_cpu_time_is_limited_as_asked():
    limits = replace(AMPLE, cpu_seconds=1)
    result = Sandbox(allow_untrusted_code=True, limits=limits).run("while True: pass", "")
    assert (result.status, result.detail) == ("timed out", "the limit on CPU time")


def test_processes_and_memory_are_limited_as_asked():
    limits = replace(AMPLE, processes=5, memory=300 << 20)
    sandbox = Sandbox(allow_untrusted_code=True, limits=limits)
    program = (
        "import os, signal\n"
        "def children():\n    made = []\n    try:\n        while len(made) < 50:\n"
        "            made.append(os.fork())\n            if not made[-1]: signal.pause()\n"
        "    except OSError: pass\n    for child in made: os.kill(child, 9)\n"
        "    return len(made)\n"
        "def reserve(megabytes): return len(bytearray(megabytes << 20)) >> 20"
    )
    tests = (
        "made = children()\nassert made == 4, made\nassert reserve(100) == 100\n"
        "try: reserve(400)\nexcept MemoryError: pass\nelse: assert False"
    )
    assert sandbox.run(program, tests).detail == ""
