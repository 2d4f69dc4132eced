"""uv or pip, with the user's own index: installs wheels into a scratch environment.

No index and no address is named here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from dagster_project.core.errors import InputError

INDEX = ("INDEX_URL", "EXTRA_INDEX_URL", "DEFAULT_INDEX", "INDEX", "FIND_LINKS", "NO_INDEX", "CONFIG_FILE")
"""Environment variables that choose an index, after PIP_ or UV_."""
PLACES = {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "UV_TARGET", "UV_PREFIX", "UV_PYTHON", "UV_SYSTEM_PYTHON"}
"""Environment variables that would install elsewhere."""
UNREACHABLE = re.compile(r"Retrying \(|error sending request")
ABSENT = re.compile(
    r"No matching distribution|there is no version of|was not found in|has no usable wheels|has no wheels"
)
"""Of pip or uv."""


def paths_of_packages(environment: Path) -> Path:
    """The folder `site-packages` of a venv made by the current Python."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))


def install(python: str, arguments: Sequence[str]) -> None:
    """Install wheels. Source distributions are refused, because building them runs their code.

    Args:
        python: of the environment.
        arguments: of `pip install`, which uv has too.
    Raises:
        InputError: neither uv nor pip is here, or something cannot be installed.
    """
    command = [*command_of(python, os.environ), "--only-binary", ":all:", *arguments]
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in PLACES | {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    }
    done = subprocess.run(
        command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        names = ", ".join(one for one in arguments if "==" in one or not one.startswith(("-", "/")))
        raise InputError(*explained(names, Path(command[0]).name == "uv", done.stdout + done.stderr))


def command_of(python: str, variables: Mapping[str, str]) -> list[str]:
    """`uv pip install` where uv is present, unless only pip's environment
    variables choose an index; otherwise `pip install`.

    Raises:
        InputError: neither is here.
    """
    for_pip, for_uv = (any(variables.get(f"{tool}_{name}") for name in INDEX) for tool in ("PIP", "UV"))
    has_pip = find_spec("pip") is not None
    if (uv := shutil.which("uv")) and not (for_pip and not for_uv and has_pip):
        return [uv, "pip", "install", "--python", python]
    if not has_pip:
        raise InputError("--install needs uv or pip, and neither is installed", "`python -m ensurepip` installs pip")
    options = ["--no-input", "--no-compile", "--disable-pip-version-check"]
    return [sys.executable, "-P", "-m", "pip", "--python", python, "install", *options]


def explained(names: str, by_uv: bool, output: str) -> tuple[str, str]:
    """What is wrong, and the next step, from the output of a failed installer; without credentials in addresses.

    Args:
        names: what was to be installed.
    """
    variables = "UV_DEFAULT_INDEX or UV_FIND_LINKS" if by_uv else "PIP_INDEX_URL or PIP_FIND_LINKS"
    if UNREACHABLE.search(output):
        return (
            f"{names}: the package index does not answer",
            f"check the network, or name an index with {variables}; nothing was run",
        )
    if ABSENT.search(output):
        return (
            f"{names}: the package index has no such wheel for this Python and platform",
            f"name an index that has it with {variables}, in uv or pip as usual; nothing was run",
        )
    lines = [line for line in re.sub(r"//[^/\s]*@", "//", output).splitlines() if line.strip()]
    return (
        f"{names} cannot be installed: {' '.join(lines[-3:])[:500] or 'no message'}",
        "see the message above; nothing was run",
    )
