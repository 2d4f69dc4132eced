"""Errors of DVC and of the files that it reads, as one message with the next step."""

from __future__ import annotations

import os
import re
import sqlite3
import traceback
from pathlib import Path
from shlex import quote
from typing import Any

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.lineage.history import LOCK, Revision, config_files
from dagster_project.orchestration.private_api import private_module

INVALID_FILE_ERRORS = {
    "YAMLFileCorruptedError",
    "YAMLValidationError",
    "YAMLSyntaxError",
    "EncodingError",
    "ResolveError",
    "EntryNotFound",
    "CyclicGraphError",
    "StageFileIsNotDvcFileError",
}
"""Names of DVC's exceptions for dvc.yaml, dvc.lock or params.yaml."""
LIBRARIES = {"diskcache", "dvc_data"}
"""Libraries whose cache objects have an attribute `directory`."""


class MissingParameter(InputError):
    """dvc.yaml reads a key that params.yaml does not have."""


def explained(error: Exception, root: Path) -> InputError | None:
    """What is wrong with the project; None if bad input does not cause this error."""
    exceptions = private_module("dvc.exceptions")
    if isinstance(error, sqlite3.DatabaseError) and (folder := _folder_of_cache(error)):
        return InputError(
            f"{folder}: DVC's cache of hashes is damaged: {error}", "remove this folder: DVC makes it again"
        )
    if isinstance(error, FileNotFoundError) and (path := _broken_link(error, root)):
        return InputError(
            f"{path} is a link to a file that is not there", "replace the link by the file, for example from git"
        )
    if isinstance(error, KeyError) and "getpwuid" in str(error):
        return InputError(
            f"your user, {os.getuid()}, has no name, and DVC needs one",
            "set the environment variable USER, for example to `user`",
        )
    if isinstance(error, ValueError) and (file := _file_of_git(error)):
        return InputError(  # the error quotes the line, which may be an address with a password
            f"{file}: git's configuration cannot be read", "correct it: `git config --list` names the line"
        )
    if isinstance(error, UnicodeEncodeError) and (name := _name_that_is_not_utf8(root / "data")):
        return InputError(f"{name!r}: the name of this file is not UTF-8, and DVC cannot record it", "rename the file")
    if isinstance(error, private_module("dvc.config").ConfigError):
        return _of_settings(error, root)
    if isinstance(error, exceptions.NotDvcRepoError):
        return InputError(f"{root} is not a DVC project", "run `make run` once, or `dvc init`, in the project's folder")
    if isinstance(error, private_module("dvc.scm").SCMError) and "not a git repository" in str(error):
        if repository := _unreadable_repository(root):
            return InputError(
                f"{repository}: cannot be read, so nothing is known of the repository",
                "give your user access to it (`ls -ld` shows who has it), then run the same command again",
            )
        return InputError(
            str(error), "run `git init` there; or, to work without git, `dvc config --local core.no_scm true`"
        )
    if isinstance(error, exceptions.DvcException) and type(error).__name__ in INVALID_FILE_ERRORS:
        return _of_a_file(error, root)
    return None


def _unreadable_repository(root: Path) -> Path | None:
    """The `.git` of the repository that the project is in, if this user may not read it, which git takes for none."""
    found = next((one / ".git" for one in (root, *root.parents) if os.path.lexists(one / ".git")), None)
    if found is None or os.access(found, os.R_OK | os.X_OK if found.is_dir() else os.R_OK):
        return None
    return found


def _of_settings(error: Exception, root: Path) -> InputError:
    """The error of the first settings file that is invalid on its own; that of .dvc/config if none is."""
    dvc_config, tracked = private_module("dvc.config"), root / ".dvc" / "config"
    for path in filter(Path.is_file, config_files(root)):
        try:
            dvc_config.Config.validate(dvc_config.Config.load_file(str(path)))
        except dvc_config.ConfigError as wrong:
            if path != tracked:
                return InputError(f"{path}: {_without_line(wrong)}", "correct it")
            break
    return InputError(
        f"{tracked}: {_without_line(error)}", "restore it with `git checkout HEAD .dvc/config`, or correct it"
    )


def _without_line(error: Exception) -> str:
    """DVC's error in its settings, without the invalid line, which may be a credential."""
    return re.sub(r"Invalid line \(.*\) \(", "Invalid line (", str(error), flags=re.DOTALL)


def _of_a_file(error: Exception, root: Path) -> InputError:
    if (file := Path(str(getattr(error, "path", "")))).suffix == ".dvc":
        return _of_a_source(file, os.path.relpath(file, root))
    for name in (LOCK, "dvc.yaml", "params.yaml"):
        if (root / name).is_file() and "<<<<<<< " in (root / name).read_text(errors="replace"):
            return InputError(
                f"{name} has an unresolved merge conflict",
                f"take one side with `git checkout --ours {name}` (or --theirs), then `dvc repro`",
            )
    try:
        if (root / LOCK).is_file():
            Revision(root, None).lock()
    except InputError as wrong:
        return wrong
    if (missing := re.search(r"Could not find '([^']+)'", str(error))) and (root / "params.yaml").is_file():
        return MissingParameter(
            f"dvc.yaml reads {missing[1]}, which params.yaml does not have",
            "add it to params.yaml, see docs/parameters.md",
        )
    if "params.yaml'" in str(error):
        try:
            params.read(root)
        except InputError as wrong:  # it names the line
            return wrong
    return InputError(f"dvc.yaml or dvc.lock: {error}{_reason(error)}", "fix that file and run again")


def _reason(error: Exception) -> str:
    """What DVC's parser or schema found, which its message leaves out."""
    if wrong := getattr(getattr(error, "exc", None), "errors", None):  # YAMLValidationError
        return ": " + "; ".join(f"{one.error_message} in {'.'.join(map(str, one.path))}" for one in wrong)
    mark = getattr(error.__cause__, "problem_mark", None)
    return f": {getattr(error.__cause__, 'problem', None) or 'syntax error'}, line {mark.line + 1}" if mark else ""


def _of_a_source(file: Path, name: str) -> InputError:
    """Args:
    name: of its .dvc file in the project.
    """
    if file.is_file() and "<<<<<<< " in file.read_text(errors="replace"):
        return InputError(
            f"{name} has an unresolved merge conflict",
            f"take one side with `git checkout --ours {quote(name)}` (or --theirs), then `dvc checkout {quote(name)}`",
        )
    return InputError(f"{name} is not a file as DVC writes it", f"restore it with `git checkout HEAD {quote(name)}`")


def _broken_link(error: FileNotFoundError, root: Path) -> Path | None:
    """The link to a missing file, which DVC takes for a file; None if something else is missing."""
    path = root / str(error.filename)
    return path if error.filename and path.is_symlink() else None


def _folder_of_cache(error: sqlite3.DatabaseError) -> str:
    """The folder of DVC's cache, from the object that failed to read it; empty if the file is not damaged."""
    if isinstance(error, sqlite3.OperationalError):  # locked, full, read-only
        return ""
    owners: list[Any] = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_libraries = (owner for owner in owners if type(owner).__module__.partition(".")[0] in LIBRARIES)
    return next((str(owner.directory) for owner in of_libraries if hasattr(owner, "directory")), "")


def _file_of_git(error: ValueError) -> str:
    """The file of git's configuration in which DVC's reader found a mistake; empty if the error has another cause."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    readers = [frame for frame in frames if frame.f_globals.get("__name__") == "dulwich.config"]
    paths = (frame.f_locals.get("path") for frame in reversed(readers))
    return next((os.fsdecode(path) for path in paths if path is not None), "")


def _name_that_is_not_utf8(folder: Path) -> str:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                name.encode()
            except UnicodeEncodeError:
                return str(Path(parent, name))
    return ""
