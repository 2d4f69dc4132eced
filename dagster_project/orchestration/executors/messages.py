"""Messages from a worker to its driver: marked JSON lines in the job's log.

Also the versions that must be equal on both.
"""

from __future__ import annotations

import json
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

from dagster_project.core.errors import InputError

MARK = "@pedigree "
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "numpy", "pyarrow", "polars", "tokenizers", "safetensors",
    "gguf", "bitsandbytes", "numba", "pandas", "pandera", "great-expectations", "datasets", "ftfy", "py3langid",
    "detect-secrets", "phonenumberslite", "python-stdnum", "license-expression", "jsonschema", "jinja2", "scikit-learn",
    "sacrebleu", "lm-eval", "huggingface_hub",
)  # fmt: skip
"""Packages whose version can change a result: of training and evaluation, of checks and repairs of rows, of rendered
prompts, of cards. Not Liger's kernels: the image for GPUs has them, and the driver's may be the one without."""

THREADS = "OMP_NUM_THREADS"
"""Ray sets it to the number of CPUs reserved. The worker gets the driver's,
because it can change the last bits of a result and is in reports."""

_lock = threading.Lock()

receiver: Callable[[str, Any], None] | None = None
"""Gets the messages of a worker whose stdout is not the job's log (ray_nodes.py)."""


def send(kind: str, content: Any) -> None:
    """Write one message to the log of the job, which is this process's stdout.

    Kinds: hello, log, live, error, damaged.
    """
    if receiver:
        receiver(kind, content)
        return
    line = f"{MARK}{json.dumps([kind, content])}\n"
    with _lock:
        sys.stdout.write(line)
        sys.stdout.flush()


def received(text: str) -> Iterator[tuple[str, Any]]:
    """The messages in a part of a job's log that ends with a whole line.

    Any other line, e.g. of Ray, is of the kind "raw".
    """
    for line in text.splitlines():
        if line.startswith(MARK):
            try:
                kind, content = json.loads(line.removeprefix(MARK))
            except (ValueError, TypeError):  # another process wrote into the line
                yield "raw", line
            else:
                yield kind, content
        elif line.strip():
            yield "raw", line


def versions() -> dict[str, str]:
    """Versions of Python and of all packages that can change results; "" for a package that is not installed.

    Builds of one version (torch 2.13.0+cpu and +cu130) count as equal: a report records the build with the machine.
    """
    found = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def different(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """One text for each version that differs, e.g. "numpy 2.3.0 instead of 2.4.1"."""
    return [
        f"{name} {there.get(name) or 'missing'} instead of {version or 'none'}"
        for name, version in here.items()
        if there.get(name, "") != version
    ]


def refuse_other_versions(expected: Mapping[str, str]) -> None:
    """Raises:
    InputError: this process has other versions.
    """
    if differences := different(expected, versions()):
        raise InputError(
            f"node {platform.node()} would not compute the same result:"
            f" it has {'; '.join(differences)} (the driver's version)",
            "install the driver's versions on the nodes, or start the driver in their environment",
        )
