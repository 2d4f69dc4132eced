"""`pedigree check`."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.cli.arguments import add_command, count, named
from dagster_project.cli.output import HTML, print_result, require_suffix, require_writable, write
from dagster_project.core.errors import InputError
from dagster_project.core.text import many

if TYPE_CHECKING:
    from collections.abc import Callable

    from dagster_project.curation.checks.checks import Judgement

log = logging.getLogger("pedigree")


def check(options: argparse.Namespace) -> int:
    """Validate any data set, without a pipeline."""

    from dagster_project.curation.check_files import check_paths, read_mapping, read_policy
    from dagster_project.curation.checks.checks import Rules
    from dagster_project.curation.checks.review import refuse_expired
    from dagster_project.curation.checks.token_counts import ESTIMATED, tokens_of
    from dagster_project.curation.write_checked import refuse_overwriting
    from dagster_project.lineage.files_at import files_at
    from dagster_project.lineage.scratch_folder import scratch_folder
    from dagster_project.views.data_quality import data_quality_page
    from dagster_project.views.data_quality_terminal import check_text
    from dagster_project.views.rendered_terminal import rendered_text

    if options.report:
        require_suffix("--report", options.report, HTML)
        require_writable("--report", Path(options.report))
    if options.thirteen_grams and not options.against:
        raise InputError("--thirteen-grams requires held-out files", "name them with --against")
    outputs = {f"--{name}": Path(path) for name in ("out", "dropped") if (path := getattr(options, name))}
    inputs = [*options.paths, *options.against, *filter(None, (options.policy, options.base_model, options.since))]
    refuse_overwriting(outputs, [Path(path) for path in inputs], Path(options.report) if options.report else None)
    mapping = None if options.mapping is None else read_mapping(options.mapping)
    rules = read_policy(Path(options.policy)) if options.policy else Rules()
    refuse_expired(rules.waivers, f"{options.policy}: waivers", date.today())
    base_model = Path(options.base_model or Path(options.project) / "data" / "base_model")
    if options.base_model and not (base_model / "tokenizer.json").is_file():
        raise InputError(f"{base_model}: no tokenizer.json in this folder", "name the folder of a model")
    tokens = tokens_of(base_model) if (base_model / "tokenizer.json").is_file() else ESTIMATED
    show = _show(options)
    with nullcontext() if options.since is None else scratch_folder(Path(options.project)) as folder:
        earlier = list[Path]()
        if folder is not None:
            earlier = files_at(options.since, [Path(path) for path in options.paths], folder)
        document = check_paths(
            options.paths,
            options.format,
            options.against,
            rules,
            tokens,
            [*map(str, earlier)],
            options.since or "",
            options.thirteen_grams,
            mapping,
            outputs.get("--out"),
            outputs.get("--dropped"),
            show,
        )
    if options.report:
        write("--report", Path(options.report), data_quality_page(document, document.get("changes")))
        log.info(f"report: {options.report}")
    for option, path in outputs.items():
        log.info(
            f"{option.lstrip('-')}: {path},"
            f" {many(document['kept'] if option == '--out' else document['rows'] - document['kept'], 'row')}"
        )
    columns = shutil.get_terminal_size((120, 24)).columns
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown = ["", rendered_text(document["shown"], color)] if show else []
    print_result(
        options, document, lambda document: "\n".join([check_text(document, color, columns), *shown]), safe=True
    )
    return 1 if any(finding["severity"] == "error" and finding["count"] for finding in document["findings"]) else 0


def _show(options: argparse.Namespace) -> Callable[[Judgement], list[dict[str, Any]]] | None:
    """The function that renders the rows of --show or --show-rows; None without them."""
    if options.show is None and options.show_rows is None:
        if options.template is not None:
            raise InputError("--template requires --show or --show-rows", "add --show 3")
        return None
    from dagster_project.commands import show as module

    by = module.renderer(
        Path(options.project), Path(options.base_model) if options.base_model else None, options.template
    )
    return lambda judged: module.show(judged, module.select(judged, options.show, options.show_rows or ()), by)


def add_commands(commands: Any) -> None:
    command = add_command(commands, check)
    add = command.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help=(
            "examples, preference pairs or benchmark questions:"
            " files, folders, hub:ORG/NAME@REVISION:SPLIT, s3://BUCKET/PREFIX"
        ),
    )
    add(
        "--format",
        default="auto",
        help="alpaca, messages, sharegpt, dolly, dpo, hh, ...; default: detected from the keys",
    )
    add(
        "--mapping",
        metavar="FIELD=COLUMN,...",
        help="for other columns: prompt=q,response=a or prompt=q,chosen=a,rejected=b",
    )
    add(
        "--out",
        type=named,
        metavar="CLEAN.jsonl",
        help="write the rows that would be kept, repaired where the policy is `fix`",
    )
    add(
        "--dropped",
        type=named,
        metavar="DROPPED.jsonl",
        help="write the other rows, each with its source row and all reasons",
    )
    add("--against", nargs="+", default=[], metavar="PATH", help="held-out files that must not overlap with PATH")
    add(
        "--policy",
        type=named,
        metavar="FILE",
        help="YAML with policy, limits and waivers: the keys of `instructions` in params.yaml",
    )
    add("--report", type=named, metavar="FILE.html", help="also write one self-contained page")
    add(
        "--since",
        metavar="PATH|REV",
        help="list the changes since another version: a path, or a git revision of the same paths",
    )
    add(
        "--base-model",
        type=named,
        metavar="FOLDER",
        help="model whose tokenizer and chat template are used (default: data/base_model, if it exists)",
    )
    add(
        "--thirteen-grams",
        action="store_true",
        help="also list what the common rule, any 13 shared words, would report as leakage",
    )
    rows = command.add_mutually_exclusive_group()
    rows.add_argument(
        "--show",
        type=count,
        metavar="N",
        help="also print the first N rows as rendered, with what is trained on highlighted",
    )
    rows.add_argument(
        "--show-rows",
        type=_rows,
        metavar="ROW,...",
        help="the same for some rows, by the numbers of the findings: 3,17",
    )
    add(
        "--template",
        metavar="NAME|FILE",
        help="with --show: chatml, hermes, alpaca or a Jinja file (default: the base model's chat template)",
    )


def _rows(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of row numbers such as 3,17")
    return [int(part) for part in parts]
