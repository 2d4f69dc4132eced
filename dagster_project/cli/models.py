"""Using a model, and handing it to others: chat, serve, push, mlflow."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from dagster_project.cli.arguments import SYSTEM, add_command, count, day, named, project, utf8
from dagster_project.cli.output import print_result
from dagster_project.commands import ending
from dagster_project.core.errors import InputError
from dagster_project.core.text import many

log = logging.getLogger("pedigree")


def chat(options: argparse.Namespace) -> None:
    """Talk to a model in the terminal, or ask it one question."""
    from dagster_project.commands import chat as module

    if options.json and options.once is None:
        raise InputError("--json: only for one question", "add --once TEXT")
    if options.once is not None and not options.once.strip():
        raise InputError(
            "--once: the question is empty", "give the text of a question, e.g. --once 'Where is my parcel?'"
        )
    if not 0 <= options.temperature < float("inf"):
        raise InputError(
            f"--temperature {options.temperature:g}: cannot be negative or infinite", "0 gives the most likely answer"
        )
    asked = module.Options(
        [options.model, *([options.compare] if options.compare else [])],
        options.system,
        module.read_tools(options.tools and Path(options.tools)),
        module.Decoding(options.max_new_tokens, options.temperature, options.seed),
    )
    root = project(options)
    if options.once is None:
        try:
            module.talk(root, asked)
        except BrokenPipeError:  # the reader of a pipe is gone, which ends the conversation
            ending.discard(sys.stdout)
    else:
        document = module.once(root, asked, options.once)
        print_result(options, document, module.once_text)
        for one in document["answers"]:
            if not one["finished"]:
                log.info(f"{one['model']}: not finished after {many(one['tokens'], 'token')} (--max-new-tokens)")


def _add_chat(commands: Any) -> None:
    add = add_command(commands, chat).add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help=(
            "release, merged@VARIANT, ..."
            " or a folder (default: the release, else the recommended variant, else the base model)"
        ),
    )
    add("--compare", type=named, metavar="OTHER", help="another model that answers the same questions")
    add("--system", **SYSTEM)
    add(
        "--tools",
        type=named,
        metavar="FILE.json",
        help="functions to offer, as OpenAI writes them; calls are shown, not executed",
    )
    add("--once", type=utf8, metavar="TEXT", help="ask this, print the answer and end")
    add(
        "--max-new-tokens",
        type=count,
        default=256,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of sampling (default: 0, the most likely answer, as in evaluation)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: %(default)s)")


def serve(options: argparse.Namespace) -> None:
    """Serve a model on loopback, OpenAI-compatible, by a server that is installed."""
    from dagster_project.commands import serve as module

    def announce(document: dict[str, Any]) -> None:
        log.info(module.as_text(document))
        if options.json:
            print_result(options, document, str)

    module.serve(project(options), options.model, options.port, options.engine, announce)


def _add_serve(commands: Any) -> None:
    add = add_command(commands, serve).add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="as for `chat` (default: the release, else the recommended variant, else the base model), or a GGUF file",
    )
    add("--port", type=count, default=8000, help="on 127.0.0.1 (default: %(default)s)")
    add(
        "--engine",
        choices=("vllm", "transformers", "llama.cpp"),
        help=(
            "the server (default: llama.cpp for a GGUF file,"
            " vllm where it is installed and there is a GPU, else transformers)"
        ),
    )


def push(options: argparse.Namespace) -> None:
    """Upload a release with its card, license and exports to the Hugging Face Hub, in one commit."""
    from dagster_project.commands import push as module

    to = module.destination(options.repo, options.private, options.dry_run)
    module.progress_bars()
    document = module.push(project(options), options.model, to, options.dry_run, options.key, options.issued)
    print_result(options, document, module.as_text)


def _add_push(commands: Any) -> None:
    add = add_command(commands, push).add_argument
    add("model", metavar="MODEL", help="release, its path or content hash")
    add("repo", metavar="REPO_ID", help="repository on the Hub, OWNER/NAME; it is created if it does not exist")
    add(
        "--private",
        action="store_true",
        help="create the repository as a private one; refused if it exists and is public",
    )
    add(
        "--dry-run", action="store_true", help="check, and list what would be uploaded; needs neither network nor token"
    )
    add(
        "--key",
        type=named,
        metavar="FILE",
        help="sign the files with this private key in PEM (default: the text in PEDIGREE_SIGNING_KEY)",
    )
    add(
        "--issued",
        type=day,
        metavar="YYYY-MM-DD",
        help="of the exports (default: the date of the commit that recorded the model)",
    )


def mlflow(options: argparse.Namespace) -> None:
    """Register a model in MLflow, with its lineage as tags and its data as inputs of a run."""
    from dagster_project.commands.mlflow_registry import as_text, register

    document = register(
        project(options), options.model, options.name, options.experiment, options.tracking_uri, options.upload
    )
    print_result(options, document, as_text)


def _add_mlflow(commands: Any) -> None:
    add = add_command(commands, mlflow).add_argument
    add("model", metavar="MODEL", help="release, merged@VARIANT, adapter@VARIANT, ... as for `audit`")
    add(
        "--tracking-uri",
        type=named,
        metavar="URI",
        help="e.g. sqlite:///mlflow.db or http://127.0.0.1:5000 (default: MLFLOW_TRACKING_URI)",
    )
    add("--name", type=named, help="of the registered model (default: the stage, with - in place of @)")
    add("--experiment", default="pedigree", help="of the run (default: %(default)s)")
    add("--upload", action="store_true", help="also store the model's files in MLflow")


def add_commands(commands: Any) -> None:
    _add_chat(commands)
    _add_serve(commands)
    _add_push(commands)
    _add_mlflow(commands)
