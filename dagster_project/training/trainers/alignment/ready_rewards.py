"""Ready-made rewards that can be verified, by the record's chosen answer, a pattern, a schema or tests.

A reward is one class below: its fields are its options in params.yaml, its docstring is its line in docs/alignment.md.
To add one, write its class and list it in READY.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Call, Message, Tools, calls
from dagster_project.core.params import Section, inside, parse
from dagster_project.core.text import STRICT_JSON
from dagster_project.core.tool_schemas import ArgumentsSchema, arguments_schema, call_problem, counted
from dagster_project.core.words import split_words
from dagster_project.training.inference.numbers import number_in
from dagster_project.training.trainers.alignment.code_runner import code_in, passes
from dagster_project.training.trainers.alignment.reward_functions import FOLDER
from dagster_project.training.trainers.alignment.reward_model import judged_text

Record = Mapping[str, Any]


class ReadyReward(Section):
    """A ready-made reward with its options."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Weight in the sum of rewards."""
    needs: ClassVar[str] = ""
    """What a record must have, for messages; empty: nothing."""

    def score(self, answer: Message, record: Record) -> float:
        """Between 0 and 1.

        Args:
            answer: a message of the assistant.
            record: the pair whose prompt it answers.
        """
        raise NotImplementedError

    def has_target(self, record: Record) -> bool:
        """Whether the record has what the answer is compared with."""
        return True

    def probe(self) -> None:
        """Raise InputError if it cannot work on this machine."""

    def loaded(self, root: Path, where: str) -> ReadyReward:
        """The reward with the files that it names.

        Raises:
            InputError: an option cannot be used.
        """
        return self


def target(record: Record) -> Message:
    """The answer that is compared with: the chosen one."""
    found: Message = record["chosen"][0]
    return found


class ExactMatch(ReadyReward):
    """1 if the content equals that of the chosen answer, apart from white space."""

    needs: ClassVar[str] = "a chosen answer with content"

    def score(self, answer: Message, record: Record) -> float:
        return float(_words(answer) == _words(target(record)))

    def has_target(self, record: Record) -> bool:
        return bool(_words(target(record)))


class NumberMatch(ReadyReward):
    r"""1 if the number after `####`, else in `\boxed{}`, else the last number of the content, is that of the chosen
    answer: 1,000.0 is 1000, and `\frac{3}{4}` is 0.75. An expression with several readings, such as `1,5`, is not a
    number."""

    needs: ClassVar[str] = "a chosen answer with a number"

    def score(self, answer: Message, record: Record) -> float:
        found = number_in(answer["content"])
        return float(found is not None and found == number_in(target(record)["content"]))

    def has_target(self, record: Record) -> bool:
        return number_in(target(record)["content"]) is not None


class Regex(ReadyReward):
    """1 if `pattern` matches somewhere in the content and calls.

    Rust's regular expressions, whose time is linear in the length of the answer: without look-around and
    backreferences.
    """

    pattern: str = Field(min_length=1)
    """The regular expression; `(?s)` and other flags at its beginning."""

    def score(self, answer: Message, record: Record) -> float:
        return float(self._matches(judged_text(answer)))

    def _matches(self, text: str) -> bool:
        import polars as pl

        return bool(pl.Series([text.encode("utf-8", "replace").decode()]).str.contains(self.pattern, strict=True)[0])

    def loaded(self, root: Path, where: str) -> ReadyReward:
        from polars.exceptions import PolarsError

        try:
            self._matches("")
        except PolarsError as error:
            reason = " ".join(str(error).split()).removeprefix("regex error: ")
            python = "a function in data/rewards/ can use Python's"
            hint = f"Rust's syntax has neither look-around nor backreferences; {python}"
            raise InputError(f"params.yaml: {where}.pattern: not a regular expression: {reason}", hint) from None
        return self


class JsonSchema(ReadyReward):
    """1 if the content is JSON that fits a JSON Schema, `schema` or that of `file`.

    Patterns in it that may take exponential time are not checked.
    """

    definition: dict[str, Any] | None = Field(default=None, alias="schema")
    """The schema."""
    file: str | None = Field(default=None, min_length=1)
    """A file in data/rewards/ with it, in its place."""

    def loaded(self, root: Path, where: str) -> ReadyReward:
        if (self.definition is None) == (self.file is None):
            hint = f"schema: {{type: object}}, or file: {FOLDER}/NAME.json"
            raise InputError(f"params.yaml: {where}: requires either schema or file", hint)
        schema = self.definition if self.file is None else self._read(root, where)
        checked = JsonSchema.model_construct(weight=self.weight, definition=schema)
        if checked.validator.broken:
            raise InputError(f"params.yaml: {where}: not a JSON Schema: {checked.validator.broken}", "fix the schema")
        return checked

    def _read(self, root: Path, where: str) -> dict[str, Any]:
        assert self.file
        path, what = inside(root, self.file, f"{where}.file"), f"params.yaml: {where}.file: {self.file}"
        if not path.is_relative_to((root / FOLDER).resolve()):
            raise InputError(f"{what} is not in {FOLDER}/", "DVC watches only files there: move it")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{what} cannot be read: {error.strerror}", "name a JSON file that is there") from None
        try:
            schema = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{what} is not JSON: {error}", "fix the file") from None
        if not isinstance(schema, dict):
            raise InputError(f"{what}: expected an object, found {type(schema).__name__}", "fix the file")
        return schema

    @cached_property
    def validator(self) -> ArgumentsSchema:
        return arguments_schema(self.definition)

    def score(self, answer: Message, record: Record) -> float:
        try:
            value = STRICT_JSON.decode(answer["content"])
            return float(self.validator.problem(value) is None)
        except (ValueError, RecursionError):
            return 0.0


class ToolCall(ReadyReward):
    """1 if the answer makes the calls of the chosen answer, in any order and with equal arguments, and they fit the
    record's tools; without calls in the chosen answer, 1 if it makes none."""

    needs: ClassVar[str] = "tools, and a chosen answer whose calls fit them"

    def score(self, answer: Message, record: Record) -> float:
        made = calls(answer)
        try:
            return float(counted(made) == counted(calls(target(record))) and _all_fit(made, record.get("tools")))
        except RecursionError:  # nested too deep
            return 0.0

    def has_target(self, record: Record) -> bool:
        return bool(record.get("tools")) and _all_fit(calls(target(record)), record["tools"])


def _all_fit(made: Sequence[Call], tools: Tools) -> bool:
    return all(call_problem(call, tools) is None for call in made)


class ReasoningFormat(ReadyReward):
    """1 if the answer has a trace that is closed, and content or calls after it."""

    def score(self, answer: Message, record: Record) -> float:
        said = bool(answer["content"].strip() or calls(answer))
        return float(bool((answer.get("reasoning_content") or "").strip()) and said)


class LengthWindow(ReadyReward):
    """1 if the content has from `min_words` to `max_words` words; less in proportion for shorter and longer ones; in
    scripts without spaces, characters."""

    min_words: int = Field(default=0, ge=0)
    """Fewest words."""
    max_words: int | None = Field(default=None, ge=1)
    """Most words. null: no limit."""

    def loaded(self, root: Path, where: str) -> ReadyReward:
        if self.max_words is None and not self.min_words:
            raise InputError(f"params.yaml: {where}: requires min_words, max_words or both", "e.g. {max_words: 50}")
        if self.max_words is not None and self.max_words < self.min_words:
            problem = f"params.yaml: {where}.max_words: {self.max_words} is below min_words {self.min_words}"
            raise InputError(problem, "raise max_words")
        return self

    def score(self, answer: Message, record: Record) -> float:
        words = len(split_words(answer["content"]))
        if words < self.min_words:
            return words / self.min_words
        return 1.0 if self.max_words is None or words <= self.max_words else self.max_words / words


class UnitTests(ReadyReward):
    """1 if the answer's code (its last fenced block, or all of it) runs, and then the tests that the record has in
    `meta`. Only with `reward_target: response`. It runs code that the model wrote: nothing is run unless `run` says
    how."""

    needs: ClassVar[str] = "tests in meta that run"
    run: Literal["sandbox", "unprotected"] | None = None
    """How code is run; required. sandbox: without network, other processes and files that it can write; refused where
    the system does not allow that. unprotected: within the limits alone, as you."""
    tests: str = Field(default="tests", min_length=1)
    """Key of `meta` with the tests: Python code that raises an exception if one fails, or a list of such texts. Code
    that only defines functions, and calls none, tests nothing: such records are left out."""
    seconds: int = Field(default=5, ge=1, le=3600)
    """Processor time for an answer; wall time is limited to ten times that."""
    memory_mb: int = Field(default=512, ge=64)
    """Address space, in MiB."""

    def loaded(self, root: Path, where: str) -> ReadyReward:
        if self.run is None:
            raise InputError(
                f"params.yaml: {where}.run: {where.rpartition('.')[2]} runs code that the model writes, and is off"
                " unless you say how",
                "set run: sandbox, or read docs/security.md#code-that-a-model-wrote",
            )
        return self

    def probe(self) -> None:
        self._passes("", "")

    def score(self, answer: Message, record: Record) -> float:
        return float(self._passes(code_in(answer["content"]), self._tests(record)))

    def has_target(self, record: Record) -> bool:
        return runs_something(self._tests(record))

    def _passes(self, code: str, tests: str) -> bool:
        return passes(code, tests, self.run == "sandbox", self.seconds, self.memory_mb << 20)

    def _tests(self, record: Record) -> str:
        found = json.loads(record.get("meta") or "{}").get(self.tests)
        parts = found if isinstance(found, list) else [found]
        return "\n".join(parts) if all(isinstance(part, str) for part in parts) else ""


READY: dict[str, type[ReadyReward]] = {
    "exact_match": ExactMatch,
    "number_match": NumberMatch,
    "regex": Regex,
    "json_schema": JsonSchema,
    "tool_call": ToolCall,
    "reasoning_format": ReasoningFormat,
    "length_window": LengthWindow,
    "unit_tests": UnitTests,
}
"""Name in params.yaml -> reward."""


def parse_ready(name: str, entry: float | Mapping[str, Any], where: str, root: Path) -> ReadyReward:
    """A reward from its entry in params.yaml: a weight, or a mapping of its options.

    Args:
        where: dotted path of the rewards.
    Raises:
        InputError: an option is unknown, missing or wrong.
    """
    options = dict(entry) if isinstance(entry, Mapping) else {"weight": float(entry)}
    return parse(READY[name], options, f"{where}.{name}").loaded(root, f"{where}.{name}")


def refuse_missing_targets(rewards: Mapping[str, ReadyReward], records: Sequence[Record], where: str) -> None:
    """Raise InputError if a record lacks what a reward compares answers with."""
    for name, reward in rewards.items():
        missing = [record["example_id"] for record in records if not reward.has_target(record)]
        if missing:
            raise InputError(
                f"params.yaml: {where}.{name} needs {reward.needs}, which {len(missing)} of {len(records)} training"
                f" pairs do not have; the first is example {missing[0]}",
                f"remove these pairs from raw_preferences.sources, or {name} from {where}",
            )


# ---- tests


def runs_something(tests: str) -> bool:
    """Whether code does more than import, assign and define: test functions that nobody calls pass whatever is tested.

    False if it is not Python.

    >>> runs_something("def check(f): assert f(1) == 2"), runs_something("assert add(1, 1) == 2")
    (False, True)
    """
    try:
        statements = ast.parse(tests).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(one, PASSIVE) and not _is_text(one) and not _is_of_a_program(one) for one in statements)


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
PASSIVE = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_of_a_program(statement: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__"`, which tests of an answer are not."""
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test) and not statement.orelse


def _words(message: Message) -> list[str]:
    words: list[str] = message["content"].split()
    return words
