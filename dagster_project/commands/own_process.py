"""Settings of a process that runs one command.

They count only if they are made before the first import of torch or transformers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from dagster_project.core import waiting
from dagster_project.core.imports import import_transformers, lean_imports

COMPUTING = frozenset({"run", "chat", "serve", "why", "bisect", "plan"})
"""Commands that compute with torch. `plan` times operations, so its threads
must wait in the same way as those of a training."""
ONLY_TOKENIZERS = frozenset({"tokenized"})
"""Stages that use tokenizers of transformers, which imports torch wherever it is installed."""


def prepare(arguments: Sequence[str]) -> None:
    """Prepare this process for its command.

    Args:
        arguments: of the command line, e.g. ["run", "adapter@lora"].
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # of `mlflow` and of trainings with `report_to: mlflow`
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")  # of the program `dvc`, which `init` and `sweep` start
    waiting.choose(os.environ, computes=bool(COMPUTING & {*arguments[:1]}))
    if arguments[:1] == ["run"] and ONLY_TOKENIZERS & {*arguments}:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it does without torch
        with suppress(ModuleNotFoundError), lean_imports("torch"):
            import_transformers()
            from transformers.utils import is_torch_available

            is_torch_available()  # it looks once
