"""DAGSTER_HOME -> Dagster's instance. Errors in its dagster.yaml or database are bad input, with one message each."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dagster_project.core.errors import InputError

EXAMPLE = "deploy/dagster.yaml is an example (docs/cluster.md)"
STORAGES = frozenset({"storage", "run_storage", "event_log_storage", "schedule_storage"})
"""Sections of dagster.yaml that put Dagster's database elsewhere."""
UNUSABLE = re.compile(r"\?|%[0-9A-Fa-f]{2}")
"""Part of a path that changes its meaning in the URL that Dagster makes of it: the files would be in another folder."""


def open_at(folder: Path) -> dg.DagsterInstance:
    """The instance that `folder`/dagster.yaml describes.

    Raises:
        InputError: the file is invalid, SQLite cannot use the folder, a variable or package that it needs is
            missing, or its database does not answer.
    """
    file = folder / "dagster.yaml"
    try:
        settings = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8")) or {}
        if not isinstance(settings, dict):
            raise InputError(f"{file} is not a mapping", EXAMPLE)
        if STORAGES.isdisjoint(settings) and (part := UNUSABLE.search(str(folder))):
            raise InputError(
                f"Dagster's home {folder}: Dagster's SQLite files cannot be in a path with {part.group()!r}, which it"
                " reads as a part of a URL",
                "rename the folder, or set DAGSTER_HOME to another one",
            )
        with _retries_unlogged():
            return dg.DagsterInstance.from_config(str(folder))
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{file} is not valid YAML{f' (line {mark.line + 1})' if mark else ''}", EXAMPLE) from None
    except dg.DagsterInvalidConfigError as error:
        raise _invalid(file, str(error)) from None
    except Exception as error:
        if explained := _missing_package(file, error) or _unusable_server(file, error) or _no_address(file, error):
            raise explained from None
        raise


def _missing_package(file: Path, error: Exception) -> InputError | None:
    missing = next(
        (one for one in (error, error.__cause__, error.__context__) if isinstance(one, ModuleNotFoundError)), None
    )
    if missing is None:
        return None
    package = (missing.name or "").partition(".")[0].replace("_", "-")
    return InputError(
        f"{file} needs the package {package}, which is not installed",
        "`pip install 'pedigree-llm[cluster]'` installs dagster-postgres; docs/cluster.md names the other packages",
    )


def _no_address(file: Path, error: Exception) -> InputError | None:
    """The error for an address that is not one. It is not repeated: it can have a password, and so has part of it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_globals.get("__name__") != "sqlalchemy.engine.url":
        return None
    hint = "write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with / and @ in the password as %2F and %40"
    return InputError(f"{file}: the address of its database is not one", f"{hint}: {EXAMPLE}")


def _unusable_server(file: Path, error: Exception) -> InputError | None:
    if type(error).__name__ != "DagsterPostgresException":  # of an optional package
        return None
    cause = error.__cause__ or error
    # the driver's message, without SQLAlchemy's links
    text = str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
    return InputError(
        f"the Postgres server that {file} names cannot be used: {text}",
        "start the server, or correct its address, user, database or password",
    )


def _invalid(file: Path, text: str) -> InputError:
    """The error for an invalid configuration. Values are not repeated: one of them can be a password."""
    if missing := dict.fromkeys(re.findall(r'environment variable "([^"]+)" which is not set', text)):
        names = ", ".join(missing)
        return InputError(
            f"{file} reads environment variables that are not set: {names}",
            "set them in the environment of this command",
        )
    unexpected = re.search(r'Received unexpected config entr(?:y|ies) "?([^"]+?)"? at (?:the root|path [\w:]+)', text)
    what = f": unexpected key {unexpected[1]}" if unexpected else ""
    return InputError(f"{file} is not a valid configuration of Dagster{what}", EXAMPLE)


@contextmanager
def _retries_unlogged() -> Iterator[None]:
    """Suppress the log of dagster-postgres about failed attempts to connect (five in ten seconds).

    Our message contains the last failure.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Retrying failed database connection")

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)
