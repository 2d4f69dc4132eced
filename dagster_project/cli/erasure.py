"""`pedigree erase`."""

from __future__ import annotations

import argparse
from typing import Any

from dagster_project.cli.arguments import add_command, named, project, utf8
from dagster_project.cli.output import print_result
from dagster_project.core.errors import InputError
from dagster_project.lineage.erasure.kinds import KINDS


def erase(options: argparse.Namespace) -> int:
    """Erase records: from the sources, and from everything that was made from them, with a certificate."""
    from dagster_project.commands import erase as module
    from dagster_project.pipeline import validate

    root = project(options)
    given = (options.record, options.containing, options.source, options.file)
    if options.resume and options.dry_run:
        raise InputError("--resume cannot be combined with --dry-run", "leave one out")
    if options.resume and (options.also or options.declined or options.reason):
        raise InputError(
            "--resume cannot be combined with --also, --not and --reason: those of the unfinished erasure hold",
            "leave them out; --key and --verify must be given again",
        )
    request = None if options.resume else module.request_of(*given)
    if options.dry_run:
        assert request is not None
        print_result(
            options, module.dry_run(root, request, options.also, options.declined, options.reason), module.dry_run_text
        )
        return 0
    document = module.erase(
        root, request, options.also, options.declined, options.reason, options.key, validate, options.verify
    )
    print_result(options, document, module.as_text)
    return module.exit_code(document)


def add_commands(commands: Any) -> None:
    command = add_command(commands, erase)
    query = command.add_mutually_exclusive_group(required=True)
    query.add_argument(
        "--record", type=utf8, metavar="ID", help="a record, by its example_id or the id that a release gives it"
    )
    query.add_argument(
        "--containing",
        type=utf8,
        metavar="TEXT",
        help="every record with this part of a message, such as a name, between word boundaries",
    )
    query.add_argument(
        "--source", type=utf8, metavar="PATH[:ROW]", help="a row of a source, or all rows of a file or folder"
    )
    query.add_argument(
        "--file", metavar="REQUEST.csv", help="several requests, in columns record, containing and source"
    )
    query.add_argument(
        "--resume", action="store_true", help="go on with an interrupted erasure; give --key and --verify again"
    )
    add = command.add_argument
    add(
        "--dry-run",
        action="store_true",
        help="print the plan: rows, relatives, places, models and cost; change nothing",
    )
    kinds = "; ".join(f"{kind}: {about}" for kind, about in KINDS.items())
    add(
        "--also",
        action="append",
        default=[],
        choices=[*KINDS],
        metavar="KIND",
        help=f"erase these relatives too; repeatable. {kinds}",
    )
    add("--not", dest="declined", action="append", default=[], choices=[*KINDS], metavar="KIND",
        help="leave these relatives; repeatable (default: near)")  # fmt: skip
    add(
        "--reason",
        default="",
        help="why, for the certificate and the tombstones, as given; it must not repeat the text",
    )
    add("--key", type=named, metavar="FILE", help="sign the certificate with this private key (PEM)")
    add(
        "--verify",
        action="store_true",
        help="afterwards make every model again from the sources, as `verify --deep`, and compare the bytes",
    )
