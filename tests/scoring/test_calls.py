import errno
import os
import struct
import sys
from pathlib import Path

import pytest

from tlora.errors import SandboxError
from tlora.scoring.sandbox import Limits, Sandbox
from tlora.scoring.sandbox.inside import calls, kernel

REFUSED = calls.ERROR | errno.EPERM
HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}


def verdict(program, number, convention, first_argument=0):
    """What the kernel's machine for such filters makes of a call."""
    steps = list(struct.iter_unpack("HBBI", program))
    data = struct.pack("<IIQ6Q", number, convention, 0, first_argument, *[0] * 5)
    place = value = 0
    while True:
        code, holds, fails, constant = steps[place]
        if code == 0x06:
            return constant
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
            place += 1
            continue
        true = {
            0x15: value == constant,
            0x35: value >= constant,
            0x45: bool(value & constant),
        }[code]
        place += 1 + (holds if true else fails)


@pytest.fixture(params=calls.MACHINES)
def machine(request):
    return request.param


def test_the_filter_refuses_what_is_listed_and_nothing_else(machine):
    column, convention = list(calls.MACHINES).index(machine), calls.MACHINES[machine]
    program = calls.program(machine)
    refused = {numbers[column] for numbers in calls.REFUSED.values()}
    assert len(refused) == len(calls.REFUSED)
    for number in range(600):
        expected = REFUSED if number in refused else calls.ALLOW
        if number == calls.CLONE3[column]:
            expected = calls.ERROR | errno.ENOSYS
        assert verdict(program, number, convention) == expected, number


def test_clone_makes_threads_and_processes_but_no_namespace(machine):
    number, convention = calls.CLONE[list(calls.MACHINES).index(machine)], calls.MACHINES[machine]
    program = calls.program(machine)
    thread, process = 0x003D0F00, 0x01200011  # as the C library calls it
    for flags in (thread, process, 0x4111):
        assert verdict(program, number, convention, flags) == calls.ALLOW
        for bit in (17, 25, 26, 27, 28, 29, 30):
            assert verdict(program, number, convention, flags | 1 << bit) == REFUSED


def test_calls_by_another_convention_end_the_process(machine):
    program, convention = calls.program(machine), calls.MACHINES[machine]
    for other in (0x40000003, 0x40000028, *set(calls.MACHINES.values()) - {convention}):
        assert verdict(program, 1, other) == calls.KILL
    if machine == "x86_64":
        x32 = 1 << 30
        assert verdict(program, x32 | 1, convention) == REFUSED


def test_the_numbers_are_those_of_the_kernels_headers(machine):
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip(f"there is no {header}")
    lines = [line.split() for line in header.read_text().splitlines()]
    told = {line[1]: line[2] for line in lines if len(line) == 3 and line[0] == "#define"}
    numbers = calls.REFUSED | {"clone": calls.CLONE, "clone3": calls.CLONE3}
    for name, known in numbers.items():
        # A header may be older than the call.
        said = int(told.get(f"__NR_{name}", known[list(calls.MACHINES).index(machine)]))
        assert said == known[list(calls.MACHINES).index(machine)], name


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(allow_untrusted_code=True, limits=Limits(seconds=600.0, cpu_seconds=60))


def test_a_program_is_refused_each_call(sandbox):
    column = list(calls.MACHINES).index(os.uname().machine)
    numbers = [known[column] for known in calls.REFUSED.values()]
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(number, first=0):\n    ctypes.set_errno(0)\n"
        "    arguments = [ctypes.c_ulong(a) for a in (first, 0, 0, 0, 0)]\n"
        "    return libc.syscall(ctypes.c_long(number), *arguments), ctypes.get_errno()"
    )
    tests = (
        f"for number in {numbers}:\n    assert call(number) == (-1, {errno.EPERM}), number\n"
        f"assert call({calls.CLONE3[column]}) == (-1, {errno.ENOSYS})\n"
        f"assert call({calls.CLONE[column]}, 0x10000011) == (-1, {errno.EPERM})"
    )
    assert sandbox.run(program, tests).detail == ""


def test_threads_processes_and_numpy_go_on_working(sandbox):
    program = (
        f"import sys\nsys.path[:0] = {sys.path!r}\nimport numpy as np\n"
        "def solved(): return np.linalg.solve(np.eye(300) * 2, np.ones(300)).sum()\n"
        "import multiprocessing, os, subprocess, sys, threading\n"
        "def by_thread():\n    found = []\n"
        "    one = threading.Thread(target=lambda: found.append(1))\n"
        "    one.start()\n    one.join()\n    return found\n"
        "def by_command(**how):\n"
        "    command = [sys.executable, '-c', 'import threading as t; a = t.Thread(target=print,"
        " args=(2,)); a.start(); a.join()']\n"
        "    return subprocess.run(command, capture_output=True, **how).stdout\n"
        "def by_process():\n    mine, theirs = multiprocessing.Pipe()\n"
        "    context = multiprocessing.get_context('fork')\n"
        "    one = context.Process(target=theirs.send, args=([3],))\n"
        "    one.start()\n    one.join()\n    return mine.recv()\n"
        "def by_fork():\n    child = os.fork()\n    if not child: os._exit(4)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])"
    )
    tests = (
        "assert by_thread() == [1]\nassert by_command() == b'2\\n'\n"
        "assert by_command(close_fds=False) == b'2\\n'\n"
        "assert by_process() == [3]\nassert by_fork() == 4 and solved() == 150"
    )
    assert sandbox.run(program, tests).detail == ""


def test_a_machine_without_such_filters_is_refused():
    with pytest.raises(OSError, match="the call filter supports x86_64 and aarch64, not riscv64"):
        calls.program("riscv64")
    with pytest.raises(OSError, match=r"the call filter \(seccomp\): Invalid argument"):
        kernel.control(22, "the call filter (seccomp)")


def test_the_caller_is_told_what_the_machine_lacks(tmp_path, monkeypatch):
    folder = tmp_path / "inside"
    folder.mkdir()
    for file in Path(calls.__file__).parent.glob("*.py"):
        text = file.read_text()
        if file.name == "calls.py":
            text = text.replace("os.uname().machine", "'riscv64'")
        (folder / file.name).write_text(text)
    monkeypatch.setattr("tlora.scoring.sandbox.host._INSIDE", str(folder / "__init__.py"))
    with pytest.raises(SandboxError, match=r"does not allow the sandbox .*not riscv64"):
        Sandbox(allow_untrusted_code=True)
