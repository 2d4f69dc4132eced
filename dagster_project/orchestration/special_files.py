"""Named pipes and devices in place of the files that define a project: whoever reads one waits, or reads forever."""

from __future__ import annotations

import stat
from pathlib import Path

from dagster_project.core.errors import InputError

FILES = ("dvc.yaml", "dvc.lock", "params.yaml", "code.lock.yaml", ".dvcignore", ".dvc/config", ".dvc/config.local")
REPORTS = "data/reports/*.json"
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def refuse_special_files(root: Path) -> None:
    """Call it before anything opens these files.

    Raises:
        InputError: one of them is a named pipe, a socket or a device, or a link to one.
    """
    for path in (*(root / name for name in FILES), *root.glob(REPORTS)):
        try:
            kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
        except OSError:  # missing, or a link to nowhere: other messages name it
            continue
        if kind:
            name = path.relative_to(root).as_posix()
            raise InputError(
                f"{path} is {kind}, not a file",
                f"remove it and restore the committed file: `rm {name}`, then `git checkout HEAD {name}`",
            )
