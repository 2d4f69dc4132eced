"""Git commands in a project's folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def git(root: Path, *arguments: str) -> str | None:
    """What a git command prints; None if it fails, or git is not installed."""
    printed = git_bytes(root, *arguments)
    return None if printed is None else os.fsdecode(printed)


def git_bytes(root: Path, *arguments: str, given: bytes | None = None) -> bytes | None:
    """As `git`, without decoding.

    Args:
        given: standard input.
    """
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=root, input=given, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None
