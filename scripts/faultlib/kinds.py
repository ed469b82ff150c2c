"""The kinds of faults, and the judgment on what the command, given again, makes of the rest."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from faultlib import events
from faultlib.children import Ended, finish, run, start
from faultlib.commands import Command, World, beside
from faultlib.mounts import can_mount, mounted
from tlora.files import is_leftover

RECOVERED, REFUSED, LOST, STUCK = "recovered", "refused", "lost", "stuck"
WRITERS = ("train", "init", "compare", "eval", "export", "merge")
GROUP = ("train, 2 parts",)
READERS = ("resume", "inspect plan", "export of a run", "merge of a run", "eval of a run")
READERS += ("chat with a run", "train further", "chat with an export", "chat with a merged model")
READERS += ("compare again", "inspect comparison", "eval again", "inspect evaluation")
_YEAR = 365 * 24 * 3600
_HOW = ("before", "after", "cut", "group before", "group cut")
_HELD = "another process"
"""How a command says that a lock is held."""


@dataclass(frozen=True)
class Case:
    """A command with one fault."""

    world: World
    command: Command
    share: float
    """Where among its events, its time or its bytes the fault comes: from 0 to 1."""
    draw: random.Random

    @property
    def out(self) -> Path:
        """The folder of its result."""
        return self.world.case / "out"

    def begin(self) -> None:
        """Make the folder that the command starts with."""
        self.world.begin(self.command, self.out)

    def run(
        self, prepare: Callable[[], None] | None = None, kill_after: float | None = None
    ) -> Ended:
        """Run the command."""
        launch = self.world.launch(self.command, kill_after)
        return run(self.command.argv(self.out), launch, prepare)

    def run_with(self, act: events.Act) -> Ended:
        """Run the command with something that happens at its events."""
        counter = events.Counter()
        return self.run(lambda: events.watch(self.out.parent, counter, act))

    def event(self) -> int:
        """Return the number of the event that the fault comes at."""
        count = self.world.reference(self.command.name).events
        return 1 + min(count - 1, int(self.share * count))


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    outcome: str
    detail: str


def again(case: Case, first: Ended, prepare: Callable[[], None] | None = None) -> Verdict:
    """Give the command again, now undisturbed; it has to end as if nothing had happened.

    An export that was whole before the fault came is refused, and is the result.
    """
    if first.traceback or first.code is None:
        return _unlike(first, "under the fault")
    second = case.run(prepare)
    if second.traceback or second.code is None or _HELD in second.text:
        return _unlike(second, "given again")
    if differs := _differs(case, second):
        said = f"{first.text[-300:]} ... {second.text[-600:]}"
        return Verdict(LOST, f"exit code {second.code}, another result: {differs}: {said}")
    if second.code != 0 and "already exists" not in second.text:
        return Verdict(LOST, f"the result is there, and refused: {second.text[-600:]}")
    left = [path for path in case.out.parent.rglob(".*") if is_leftover(path.name)]
    if left:
        return Verdict(LOST, f"left behind: {left}")
    return Verdict(RECOVERED, "")


def _unlike(ended: Ended, when: str) -> Verdict:
    if ended.traceback:
        return Verdict(LOST, f"{when}: {ended.text[-1500:]}")
    return Verdict(STUCK, f"{when}: {ended.text[-600:]}")


def _differs(case: Case, ended: Ended) -> list[str]:
    """Return what of the result is not that of an undisturbed command."""
    expected = case.world.reference(case.command.name).result
    try:
        found = case.command.result(case.out, ended)
    except (OSError, ValueError, LookupError) as error:
        return [str(error)]
    return [
        name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)
    ]


def kill_at_event(case: Case) -> Verdict:
    """Kill the command just before or after one of its file events, or in the middle of a file."""
    case.begin()
    first = case.run_with(events.kill_at(case.event(), case.draw.choice(_HOW)))
    return again(case, first)


def kill_at_time(case: Case) -> Verdict:
    """Kill the command and all its processes at any moment."""
    case.begin()
    seconds = case.world.reference(case.command.name).seconds
    return again(case, case.run(kill_after=case.share * seconds))


def full_disk(case: Case) -> Verdict:
    """Let the disk fill up; then give it room."""
    case.begin()
    folder = case.out.parent
    if not can_mount():
        first = case.run_with(events.refuse_from(case.event(), errno.ENOSPC))
        return again(case, first)
    size = int(case.share * case.world.reference(case.command.name).bytes) // 4096 * 4096 + 4096
    aside = folder.with_suffix(".aside")
    folder.rename(aside)
    folder.mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", folder):
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        first = case.run()
        subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
        verdict = again(case, first)
    shutil.rmtree(aside)
    return verdict


def read_only(case: Case) -> Verdict:
    """Let the file system become read-only at an event; then let it be written to again."""
    case.begin()
    folder = case.out.parent
    if not can_mount():
        return again(case, case.run_with(events.refuse_from(case.event(), errno.EROFS)))

    def freeze() -> None:
        # A mount of its own: the one below cannot be read-only while a file of it is being written.
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    first = case.run_with(events.call_at(case.event(), freeze))
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)
    return again(case, first)


def two_processes(case: Case) -> Verdict:
    """Start the command twice at the same time in one folder; one of them may be refused."""
    case.begin()
    first = case.world.launch(case.command)
    second = replace(first, log=first.log.with_suffix(".other"))
    argv = case.command.argv(case.out)
    one, other = start(argv, first), start(argv, second)
    ended = [finish(one, first), finish(other, second)]
    for each in ended:
        if each.traceback or each.code is None:
            return _unlike(each, "beside the other")
    if all(each.code for each in ended):
        return Verdict(LOST, f"both were refused: {ended[0].text[-300:]} {ended[1].text[-300:]}")
    return again(case, next(each for each in ended if each.code == 0))


def clock(case: Case) -> Verdict:
    """Kill the command, and set the clock back before it is given again."""
    case.begin()
    first = case.run_with(events.kill_at(case.event(), "group before"))
    seconds = case.draw.uniform(3600, 20 * _YEAR)
    events.age(case.out.parent, seconds)
    return again(case, first, lambda: events.set_back(seconds))


def cut_file(case: Case) -> Verdict:
    """Cut a file that the command reads."""
    return _damaged(case, lambda content: content[: case.draw.randrange(len(content))])


def flipped_bit(case: Case) -> Verdict:
    """Flip a bit of a file that the command reads."""

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[case.draw.randrange(len(changed))] ^= 1 << case.draw.randrange(8)
        return bytes(changed)

    return _damaged(case, flip)


def _damaged(case: Case, change: Callable[[bytes], bytes]) -> Verdict:
    """Damage a file: the command takes it for what it is, or makes the same of what is left."""
    case.begin()
    files = sorted(
        path
        for path in case.out.rglob("*")
        if path.stat().st_size and any(path.match(each) for each in case.command.reads)
    )
    file = files[min(len(files) - 1, int(case.share * len(files)))]
    file.write_bytes(change(file.read_bytes()))
    ended = case.run()
    name = file.relative_to(case.out)
    if ended.traceback or ended.code is None:
        return _unlike(ended, str(name))
    if ended.code == 0:
        if differs := _differs(case, ended):
            said = ended.text[-600:]
            return Verdict(LOST, f"{name}: without a word another result: {differs}: {said}")
        return Verdict(RECOVERED, str(name))
    refusal = [line for line in ended.text.splitlines() if line.startswith("tlora: ")]
    if not refusal or beside(case.out).exists():
        return Verdict(LOST, f"{name}: exit code {ended.code}: {ended.text[-600:]}")
    return Verdict(REFUSED, f"{name}: {refusal[-1]}")


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    do: Callable[[Case], Verdict]
    commands: tuple[str, ...]
    weight: float
    """Its share of the cases, by command, relative to the others'."""


KINDS = (
    Kind("killed at a file event", kill_at_event, WRITERS, 6),
    Kind("killed at a file event", kill_at_event, GROUP, 2),
    Kind("killed at any time", kill_at_time, WRITERS, 2),
    Kind("killed at any time", kill_at_time, GROUP, 1),
    Kind("full disk", full_disk, WRITERS, 2),
    Kind("read-only folder", read_only, WRITERS, 2),
    Kind("two processes", two_processes, WRITERS, 1),
    Kind("clock set back", clock, WRITERS, 1),
    Kind("cut file", cut_file, READERS, 2),
    Kind("flipped bit", flipped_bit, READERS, 3),
)
