"""Custom rewards: functions of Python files in data/rewards/, each called in a process of its own, with a time limit.

A function gets the prompts, the answers and the records of a batch, and returns a number for each answer. See
docs/alignment.md.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_files
from dagster_project.core.params import inside
from dagster_project.training.trainers.alignment import reward_process

FOLDER = "data/rewards"
"""A dependency in dvc.yaml: editing a function trains again."""
FORM = re.compile(rf"({FOLDER}/[\w/-]+\.py):([^\W\d]\w*)")
HINT = f"fix it in {FOLDER}/"
TIME_KEY = "reward_seconds"
"""Key of an entry of `aligned` with the time limit."""

Record = Mapping[str, Any]
Prompt = Sequence[Mapping[str, Any]]


def is_function(name: str) -> bool:
    """Whether the name of a reward is that of a function in a file, `data/rewards/exact.py:correct`."""
    return ":" in name or name.startswith(FOLDER)


def check(root: Path, name: str, where: str) -> None:
    """Check that a file defines a function, without running the file.

    Args:
        name: of the reward in params.yaml.
        where: dotted path of the rewards in params.yaml.
    Raises:
        InputError: it does not.
    """
    path, function = _parts(root, name, where)
    relative = name.partition(":")[0]
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"{relative} is not Python: {error}", f"fix the file, or remove it from {where}") from None
    except OSError as error:
        raise InputError(f"{relative} cannot be read: {error.strerror}", "name a Python file") from None
    if function not in _defined(tree):
        problem = f"params.yaml: {where}: {relative} has no function {function!r}"
        raise InputError(problem, "define it there, or name another function")


def _defined(tree: ast.AST) -> set[str]:
    """The names that code defines, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def sha256_of_functions(folder: Path) -> str:
    """sha256 over all files that functions may read: those of the folder except notes (.md)."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]
    return sha256_of_files(sorted(path for path in files if "__pycache__" not in path.parts))


def _parts(root: Path, name: str, where: str) -> tuple[Path, str]:
    """The file and the name of the function."""
    found = FORM.fullmatch(name)
    if not found:
        hint = f"name a function of a Python file: {FOLDER}/exact.py:correct"
        raise InputError(f"params.yaml: {where}: {name!r} is not a reward", hint)
    return inside(root, found[1], where), found[2]


class RewardFunction:
    """A function of the project, in its process, which starts with the first call and ends with this object."""

    def __init__(self, folder: Path, name: str, seconds: float, where: str) -> None:
        """
        Args:
            folder: `FOLDER` in the project.
            name: as in params.yaml.
            seconds: wall time that loading the file, or the answers of one call, may take.
            where: dotted path of the rewards in params.yaml, for messages.
        Raises:
            InputError: there is no such function, or its file raises an exception.
        """
        self.name, self.seconds, self.where = name, seconds, where
        self.repeats = True
        root = folder.resolve().parents[1]
        path, function = _parts(root, name, where)
        command = [sys.executable, "-P", reward_process.__file__, str(path), function, str(seconds)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # DVC watches the folder
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, cwd=root)
        weakref.finalize(self, _end, self.process)
        if problem := self._reply("its file").get("problem"):
            hint = f"fix the file, or remove it from params.yaml: {where}"
            raise InputError(f"{name.partition(':')[0]} {problem}", hint)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str], records: Sequence[Record]) -> list[float]:
        """The reward of each answer.

        The first call is made twice: equal answers must get equal rewards, or nothing could be made again.

        Raises:
            InputError: the function fails, takes too long, or does not return a finite number for each answer.
        """
        if not answers:  # of a process for which a small batch has none
            return []
        scores = self._scores(prompts, answers, records)
        if self.repeats:
            self.repeats = False
            again = self._scores(prompts, answers, records)
            for number, (one, two) in enumerate(zip(scores, again, strict=True)):
                if one != two:
                    self._refuse(f"gave {one:g} and then {two:g} for the same answer", records, number)
        return scores

    def _scores(self, prompts: Sequence[Prompt], answers: Sequence[str], records: Sequence[Record]) -> list[float]:
        request = {"prompts": prompts, "answers": answers, "records": records}
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the missing reply says so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        reply = self._reply(f"{len(answers)} answers")
        if problem := reply.get("problem"):
            self._refuse(f"fails: {problem}", records, reply.get("example"))
        scores: list[float] = reply["scores"]
        if len(scores) != len(answers):
            self._refuse(f"returns {len(scores)} numbers for {len(answers)} answers", records, None)
        for number, score in enumerate(scores):
            if not math.isfinite(score):
                self._refuse(f"returns {score}, which is not a finite number", records, number)
        return scores

    def _refuse(self, problem: str, records: Sequence[Record], example: int | None) -> NoReturn:
        which = "" if example is None else f"; for the answer to example {records[example].get('example_id')}"
        raise InputError(f"{self.where}: {self.name} {problem}{which}", HINT)

    def _reply(self, work: str) -> dict[str, Any]:
        """The next line of the process, within the time limit."""
        assert self.process.stdout
        end, line = time.monotonic() + self.seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.process.kill()
                    problem = f"{self.where}: {self.name} took longer than {self.seconds:g} s for {work}"
                    raise InputError(problem, f"make it faster, or raise {TIME_KEY}")
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    code = self.process.wait()
                    raise InputError(f"{self.where}: {self.name} ended its process (exit code {code})", HINT)
                line += part
        reply: dict[str, Any] = json.loads(line)
        return reply


def started(folder: Path | None, rewards: Mapping[str, Any], seconds: float, where: str) -> list[RewardFunction]:
    """The functions among rewards, each with its process. For the arguments, see `RewardFunction`."""
    names = [name for name, weight in rewards.items() if weight and is_function(name)]
    if not names:
        return []
    assert folder, "the stage gives the folder if a reward is a function"
    return [RewardFunction(folder, name, seconds, where) for name in names]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream
        with contextlib.suppress(BrokenPipeError):
            stream.close()
