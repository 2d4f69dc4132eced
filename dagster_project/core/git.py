"""Git commands in a project's folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from dagster_project.core.errors import InputError

SAFE = ("-c", "core.fsmonitor=false")
"""A program that the configuration of a repository names, which git would start to list files."""


def git(root: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it fails or git is not installed."""
    output = git_bytes(root, *arguments)
    return None if output is None else os.fsdecode(output)


def git_bytes(root: Path, *arguments: str, given: bytes | None = None) -> bytes | None:
    """As `git`, without decoding.

    Args:
        given: standard input.
    """
    if shutil.which("git") is None:
        return None
    process = subprocess.run(["git", *SAFE, *arguments], cwd=root, input=given, capture_output=True, check=False)
    return process.stdout if process.returncode == 0 else None


def refuse_without_git() -> None:
    """Raises:
    InputError: git is not installed, which is why it found nothing.
    """
    if shutil.which("git") is None:
        raise InputError("git is not installed, or not on PATH", "install it by your system")
