"""One case: a fault in a copy of the project, what the user must see, and what one more run must leave on disk."""

from __future__ import annotations

import re
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builders import warm
from builders.warm import Command, Fault, Outcome

from faults import project

TRACEBACK = re.compile(
    r"Traceback \(most recent call last\)|^\s+File \".*\", line \d+|unexpected error(?! - \[Errno)", re.MULTILINE
)
CODES = {0, 1, 2}
"""Exit codes of a command that was not killed: fine, failed or busy, bad input."""
KILLED = -9
DVC_FAILED = 255
LEFT_BY_DVC = "Unable to read RWLock-file"
"""What `dvc repro` says if DVC was killed while it wrote its table of locked
paths; `pedigree sync` deletes the table (docs/troubleshooting.md)."""


class Violation(Exception):
    """A claim that does not hold."""


@dataclass
class Play:
    """A case at work: its copy of the project, and the commands that ran in it."""

    place: warm.Place
    projects: project.Projects
    outcomes: list[Outcome] = field(default_factory=list)
    removed: set[str] = field(default_factory=set)
    """Files that a message said to remove, and that nothing needs."""
    also: list[str] = field(default_factory=list)
    """Beginnings of paths that may differ after this fault."""
    before: Fault | None = None
    """Called in every process before its fault."""

    @property
    def root(self) -> Path:
        return self.place.root

    def start(
        self,
        *words: str,
        fault: Fault | None = None,
        in_stage: Fault | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Command:
        faults = [one for one in (self.before, fault) if one is not None]

        def all_faults() -> None:
            for one in faults:
                one()

        return warm.start(self.place, words, all_faults, in_stage, environment)

    def run(self, *words: str, **faults: Any) -> Outcome:
        """Run a command to its end."""
        return self.ended(self.start(*words, **faults))

    def ended(self, command: Command, seconds: float = warm.SECONDS) -> Outcome:
        outcome = command.wait(seconds)
        self.outcomes.append(outcome)
        return self.seen(outcome)

    def seen(self, outcome: Outcome) -> Outcome:
        """What the user sees of any command.

        Raises:
            Violation: a traceback, or an exit code that means nothing.
        """
        shown = " ".join(outcome.command)
        if TRACEBACK.search(outcome.text):
            raise Violation(f"`{shown}` shows a traceback:\n{outcome.text[-3000:]}")
        if outcome.code not in CODES | {KILLED} | ({DVC_FAILED} if outcome.command[0] == "dvc" else set()):
            raise Violation(f"`{shown}` ended with exit code {outcome.code}:\n{outcome.text[-2000:]}")
        return outcome

    def explained(self, outcome: Outcome) -> Outcome:
        """A command that failed says so in one message, with the next step.

        Raises:
            Violation: it does not.
        """
        shown = " ".join(outcome.command)
        if outcome.code in (0, KILLED):
            return outcome
        if outcome.command[0] == "pedigree":
            errors = len(re.findall(r"^error: ", outcome.err, re.MULTILINE))
            findings = outcome.command[1] in ("verify", "run") and any(
                word in outcome.text for word in ("next: ", "hint: ", "failed")
            )
            if errors > 1 or (
                errors == 0 and not findings
            ):  # a list of what differs with next steps, or of stages, is a message, too
                raise Violation(f"`{shown}` failed with {errors} messages:\n{outcome.text[-2000:]}")
            if errors and "hint: " not in outcome.err:
                raise Violation(f"`{shown}` names no next step:\n{outcome.err[-2000:]}")
        elif "ERROR: " not in outcome.text and "error: " not in outcome.text:
            raise Violation(f"`{shown}` failed without a message:\n{outcome.text[-2000:]}")
        return outcome

    def recovers(self, goal: str = project.DONE, *again: str, status: bool = True) -> None:
        """One more run makes the project equal to an undisturbed one: bytes of every file, DVC's status, integrity.

        Args:
            again: the command; empty: `dvc repro` of the stage `goal`.

        Raises:
            Violation: it does not.
        """
        self.runs_again(goal, *again)
        self.is_undisturbed(goal, status)

    def runs_again(self, goal: str = project.DONE, *again: str) -> None:
        """The run after the fault succeeds.

        Raises:
            Violation: it does not.
        """
        command = again or ("dvc", "repro", goal)
        done = self.run(*command)
        if done.code != 0 and command[0] == "dvc" and LEFT_BY_DVC in done.text:
            repaired = self.run("pedigree", "sync")
            if repaired.code != 0:
                raise Violation(repaired.text)
            done = self.run(*command)
        if done.code != 0:
            raise Violation(f"the run after the fault fails:\n{done.text[-3000:]}")

    def clear_temporary_files(self) -> None:
        """Remove what libraries leave in the folder for temporary files when
        their process is killed (docs/faults.md)."""
        shutil.rmtree(self.place.around / "tmp")
        (self.place.around / "tmp").mkdir()

    def is_undisturbed(self, goal: str = project.DONE, status: bool = True) -> None:
        expected = {
            path: digest for path, digest in self.projects.states[goal].files.items() if path not in self.removed
        }
        found = [
            line
            for line in project.differences(project.files(self.root), expected)
            if not line.partition(": ")[2].startswith((*self.also,))
        ]
        found += [f"left behind: {path}" for path in sorted((self.place.around / "tmp").iterdir())]
        if found:
            raise Violation("\n".join(found[:20]))
        if not status:
            return
        shown = self.run("dvc", "status", *([goal] if goal != project.DONE else []))
        if shown.code != 0 or "changed" in shown.out:
            raise Violation(f"dvc status: {shown.text}")
        intact = self.run("pedigree", "verify", "--integrity")
        if intact.code != 0:
            raise Violation(f"verify --integrity: {intact.text[-2000:]}")


@dataclass(frozen=True)
class Case:
    """A fault and the claims about it."""

    name: str
    """Starts with its class: "kill/tokenized/3-rename"."""
    state: str
    """State of the project in which it begins: a stage that has run, or empty."""
    play: Callable[[Play], None]


@dataclass(frozen=True)
class Result:
    case: str
    problem: str
    """Empty if the case passed."""
    commands: Sequence[str]


def result_of(case: Case, projects: project.Projects) -> Result:
    """Play a case in a new copy, which is removed afterwards."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", case.name)[-100:]
    at_work = Play(projects.copy(case.state, name), projects)
    try:
        case.play(at_work)
        problem = ""
    except Violation as violation:
        problem = str(violation)
    except Exception:  # noqa: BLE001  the other cases go on
        problem = f"the case itself failed: {traceback.format_exc()}"
    finally:
        _remove(at_work.place.around)
    return Result(case.name, problem, [" ".join(outcome.command) for outcome in at_work.outcomes])


def _remove(folder: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(folder)
