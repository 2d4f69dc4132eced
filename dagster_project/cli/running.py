"""Making a project, running its stages, and what follows from an edit of it:
init, run, sweep, render, upgrade, pipeline, sync, share, plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dagster_project.cli.arguments import add_command, count, named, project, utf8, warn_of_erasure
from dagster_project.cli.output import print_result
from dagster_project.core.errors import InputError
from dagster_project.core.imports import lean_imports


def init(options: argparse.Namespace) -> None:
    """Make a project in a folder, with parameters that fit your data."""
    from dagster_project.commands import init as module

    document = module.init(
        Path(options.folder or options.project), options.data, options.base_model, options.task, options.license
    )
    print_result(options, document, module.as_text)


def _add_init(commands: Any) -> None:
    add = add_command(commands, init).add_argument
    add("folder", nargs="?", type=named, metavar="FOLDER", help="an empty or new folder (default: the current folder)")
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="as for `check`; files are copied to data/sources/, others are read where they are",
    )
    add(
        "--base-model",
        type=named,
        metavar="MODEL",
        help="org/name@REVISION on the Hub, or a folder (default: the small model of the sample project)",
    )
    add(
        "--task",
        choices=("auto", "labels", "json", "text"),
        default="auto",
        help="what answers are (default: detected)",
    )
    add(
        "--license",
        type=lambda text: named(utf8(text)),
        default="unknown",
        metavar="SPDX",
        help="license of the data (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Run one stage (the command in dvc.yaml), or bring all stages up to date with --all."""
    if options.all:
        return _run_all(options)
    with lean_imports():
        from dagster_project.orchestration.run_stage import run_stage, streaming_to_dagster

    if not options.stage:
        raise InputError("STAGE or --all is required", "name a stage, or bring all stages up to date with --all")
    if options.force or options.jobs is not None:
        raise InputError(
            "--jobs and --force require --all",
            f"`dvc repro --single-item --force {options.stage}` runs one stage again",
        )
    # with --json, what a function of the user prints must not be on stdout
    with streaming_to_dagster(), redirect_stdout(sys.stderr if options.json else sys.stdout):
        report = run_stage(project(options), options.stage)
    if options.json:
        print_result(options, report, str)
    return 0


def _run_all(options: argparse.Namespace) -> int:
    from dagster_project.orchestration.run_all import as_text, run_all
    from dagster_project.pipeline import validate

    if options.stage:
        raise InputError(
            f"--all cannot be combined with {options.stage}",
            f"`dvc repro {options.stage}` runs a stage and all stages that it depends on",
        )
    root = project(options)
    warn_of_erasure(root)
    document = run_all(root, options.jobs or 1, options.force, validate)
    print_result(options, document, as_text)
    return _exit_code(document)


def _exit_code(document: Mapping[str, Any]) -> int:
    """Of several stages or trials."""
    return 130 if document["interrupted"] else 0 if document["passed"] else 1


def _add_run(commands: Any) -> None:
    add = add_command(commands, run).add_argument
    add("stage", nargs="?", metavar="STAGE[@VARIANT]", help="a stage of dvc.yaml, e.g. splits or adapter@lora")
    add("--all", action="store_true", help="bring all stages up to date, as `dvc repro` does")
    add("--jobs", type=count, metavar="N", help="with --all: up to N independent stages at once (default: 1)")
    add("--force", action="store_true", help="with --all: also run stages that are up to date")


def sweep(options: argparse.Namespace) -> int:
    """Run every combination of some parameter values as a DVC experiment, and compare parameters and metrics."""
    from dagster_project.commands import sweep as module
    from dagster_project.pipeline import VARIANTS_OF, validate

    document = module.sweep(
        project(options), options.section, options.set, options.jobs, options.to, VARIANTS_OF, validate
    )  # fmt: skip
    print_result(options, document, module.as_text)
    return _exit_code(document)


def _add_sweep(commands: Any) -> None:
    add = add_command(commands, sweep).add_argument
    add("section", metavar="SECTION", help="section of params.yaml, e.g. adapter.lora or splits")
    add(
        "-S",
        dest="set",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="a parameter of the section and its values; repeatable",
    )
    add("--jobs", type=count, default=1, metavar="N", help="trials at once (default: %(default)s)")
    add(
        "--to",
        type=named,
        metavar="STAGE[@VARIANT]",
        help="stage at which each trial ends (default: the stage of the section)",
    )


def render(options: argparse.Namespace) -> None:
    """Draw pages again from the documents on disk, without running a stage."""
    from dagster_project.commands import render as module

    print_result(options, module.render(project(options), options.stage), module.as_text)


def upgrade(options: argparse.Namespace) -> None:
    """Record the code of the installed version in code.lock.yaml, write its
    dvc.yaml unless that was edited, and list the stages that become stale."""
    from dagster_project.commands import upgrade as module

    print_result(options, module.upgrade(project(options)), module.as_text)


def pipeline(options: argparse.Namespace) -> None:
    """Write into dvc.yaml what each adapter reads, after an edit of params.yaml that merges adapters or adds one."""
    from dagster_project.commands.adapter_reads import as_text, write_reads

    print_result(options, write_reads(project(options)), as_text)


def sync(options: argparse.Namespace) -> None:
    """Report DVC's state to Dagster's event log."""
    from dagster_project.orchestration.dagster.lean_sync import sync_if_changed

    root = project(options)
    warn_of_erasure(root)
    lines = sync_if_changed(root, tuple(filter(None, options.key_prefix.split("/"))))
    print_result(
        options, {"reported": lines}, lambda _: "\n".join(lines) or "Dagster and DVC agree: nothing to report."
    )


def share(options: argparse.Namespace) -> None:
    """Copy sources, outputs and past runs to a DVC remote, so that another
    clone restores stages instead of running them."""
    from dataclasses import asdict

    from dagster_project.orchestration.dvc_remote import push

    pushed = push(project(options), options.remote)
    text = (
        f"{pushed.remote}: {pushed.objects} new objects, {pushed.runs} past runs."
        " In another clone, `dvc repro --pull` restores them."
    )
    print_result(options, asdict(pushed), lambda _: text)


MODEL_OPTIONS: dict[str, Any] = {
    "method": ("full", "lora", "qlora"),
    "tokens_per_row": 2048,
    "batch": 1,
    "gradient_checkpointing": True,
    "dtype": "auto",
    "device": "cuda",
}
"""Options of `plan --model` and their defaults."""


def plan(options: argparse.Namespace) -> None:
    """Predict tokens, steps, memory and time of each variant, before training."""
    from dagster_project.commands.plan import as_text, plan_model, plan_variants
    from dagster_project.core.params import Compute

    given = {name: getattr(options, name) for name in MODEL_OPTIONS if getattr(options, name) is not None}
    if options.model is not None and options.variants:
        raise InputError(
            f"plan: {options.variants[0]} and --model are both given", "name variants of params.yaml, or any model"
        )
    if options.model is None and given:
        raise InputError(
            f"plan: --{next(iter(given)).replace('_', '-')} requires --model",
            "edit params.yaml, or plan for a model with --model",
        )
    with lean_imports():
        if options.model is not None:
            chosen = MODEL_OPTIONS | given
            document = plan_model(
                Path(options.model),
                chosen["method"],
                tokens=chosen["tokens_per_row"],
                rows=chosen["batch"],
                checkpointing=chosen["gradient_checkpointing"],
                compute=Compute(dtype=chosen["dtype"]),
                device=chosen["device"],
            )
        else:
            document = plan_variants(project(options), options.variants)
    print_result(options, document, as_text)


def _add_plan(commands: Any) -> None:
    add = add_command(commands, plan).add_argument
    add("variants", nargs="*", metavar="VARIANT", help="variants of params.yaml (default: all)")
    add(
        "--model",
        type=named,
        metavar="CONFIG",
        help="plan for any model instead, from its folder or its config.json only",
    )
    add("--method", action="append", help="with --model; can be repeated (default: full, lora and qlora)")
    add("--tokens-per-row", type=int, metavar="N", help=f"with --model (default: {MODEL_OPTIONS['tokens_per_row']})")
    add(
        "--batch",
        type=int,
        metavar="N",
        help=f"with --model: rows in a forward pass (default: {MODEL_OPTIONS['batch']})",
    )
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="with --model (default: on)")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        help="with --model: bfloat16 or float32 (default: bfloat16 if the device supports it)",
    )
    add(
        "--device",
        help=f"with --model: cuda or cpu; it need not be on this machine (default: {MODEL_OPTIONS['device']})",
    )


def add_commands(commands: Any) -> None:
    _add_init(commands)
    _add_run(commands)
    _add_sweep(commands)
    add_command(commands, render).add_argument(
        "stage", nargs="?", metavar="STAGE[@VARIANT]", help="default: all stages that have pages"
    )
    add_command(commands, upgrade)
    add_command(commands, pipeline)
    add_command(commands, sync).add_argument(
        "--key-prefix",
        default="",
        metavar="PREFIX",
        help="of the project's asset keys in an instance with other assets, e.g. ml/support",
    )
    add_command(commands, share).add_argument(
        "--remote", type=named, metavar="NAME", help="a remote of .dvc/config (default: the default remote)"
    )
    _add_plan(commands)
