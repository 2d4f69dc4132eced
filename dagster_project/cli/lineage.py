"""Questions about the lineage of a model: audit, impact, verify."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from dagster_project.cli.arguments import add_command, day, named, project, utf8, warn_of_erasure
from dagster_project.cli.output import HTML, print_result, require_suffix, write
from dagster_project.core.errors import InputError
from dagster_project.core.text import many

log = logging.getLogger("pedigree")


def audit(options: argparse.Namespace) -> int:
    """Show the data, parameters and code behind a model, or the differences between two models."""
    from dagster_project.commands import export_all
    from dagster_project.commands.where import where
    from dagster_project.lineage import lineage, registered
    from dagster_project.lineage.attribution import owners
    from dagster_project.lineage.diff import as_text, diff
    from dagster_project.lineage.index import Index
    from dagster_project.lineage.signing.target import refuse_in_output
    from dagster_project.views.lineage import lineage_page

    if (code := _audit_exported(options)) is not None:
        return code
    root = project(options)
    warn_of_erasure(root)
    if options.diff:
        if options.model or options.html or options.records or options.where or options.as_of:
            raise InputError(
                "--diff cannot be combined with MODEL, --html, --records, --where or --as-of",
                "leave these out: --diff names both models",
            )
        before, after = options.diff
        print_result(options, diff(root, before, after, options.rev, options.against_rev), as_text)
        return 0
    if not options.model or options.against_rev:
        what = "no MODEL given" if not options.model else "--against-rev requires --diff"
        raise InputError(what, "see `pedigree audit --help`")
    files = (("--html", options.html, HTML), ("--records", options.records, (".csv", ".parquet")))
    for option, name, suffixes in files:
        if name:
            require_suffix(option, name, suffixes)
            refuse_in_output(root, option, Path(name), "file")
    subject = lineage.find(Index(root), options.model, options.rev)
    document = lineage.document(subject, options.as_of) | registered.of_model(root, subject.run.md5)
    is_release = subject.run.address == "release" and subject.run.in_workspace
    if is_release and (note := export_all.of_another_version(root, subject.run.md5)):
        log.warning(note)
    if options.json or options.html or options.records:
        records, _ = lineage.trained_on(subject)
        listed = lineage.listed(records) if options.json or options.html else []
        if options.records:
            lineage.write_trained_on(records, Path(options.records))
            log.info(f"records: {options.records}, {many(document['records']['records'], 'record')}")
        if options.html:
            write("--html", Path(options.html), lineage_page(document, listed))
            log.info(f"page: {options.html}")
        if options.json and document["records"]:
            document["records"]["list"] = listed
    if options.where:
        document["where"] = where(root, document["stages"])
    stores = owners.stores_of(root, subject)
    document |= {"gradients": stores} if stores else {}
    print_result(options, document, lineage.as_text)
    verdict = document["use_policy"] if options.as_of else {}
    return 1 if verdict.get("violations") and "waiver" not in verdict else 0


def _audit_exported(options: argparse.Namespace) -> int | None:
    """Audit a GGUF file or a folder that `export` wrote, in the project or
    without one; None if MODEL is anything else."""
    from dagster_project.commands.model_files import claim, claimed
    from dagster_project.lineage.history import path_exists

    path = Path(options.model or "")
    if not options.model or options.diff or not path_exists(path):
        return None
    has_project = (Path(options.project) / "dvc.yaml").is_file()
    if has_project and _is_recorded_here(project(options), options.model):
        return None
    file = claim.read(path)
    if file is None:
        if not has_project and claim.is_model_file(path):
            raise InputError(
                f"{path}: its metadata does not say where it is from", "run the command in a project that may have it"
            )
        return None
    if options.html or options.records or options.where or options.as_of or options.rev or options.against_rev:
        raise InputError(
            "--html, --records, --where, --as-of, --rev and --against-rev are not for exported files",
            f"use them with the hash that {path} names",
        )
    document = claimed.examine(project(options) if has_project else None, file)
    print_result(options, document, claimed.as_text)
    return claimed.exit_code(document)


def _is_recorded_here(root: Path, model: str) -> bool:
    """Whether it is the name of a stage, even if a folder has this name, or the path
    of an output: a base model may itself be a file that `export` wrote."""
    from dagster_project.lineage.history import workspace_lock

    lock = workspace_lock(root)
    outputs = {(root / out["path"]).resolve() for stage in lock.values() for out in stage.get("outs", [])}
    return model in lock or Path(model).resolve() in outputs


def _add_audit(commands: Any) -> None:
    add = add_command(commands, audit).add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help=(
            "name of a stage, path (also of a copied folder, or of an exported file), content hash, or REV:one of these"
        ),
    )
    add("--rev", type=named, help="git revision (default: the workspace)")
    add("--html", type=named, metavar="FILE.html", help="also write one self-contained page")
    add(
        "--records",
        type=named,
        metavar="FILE",
        help="also write every record the model was trained on, with step and epoch: .csv or .parquet",
    )
    add(
        "--as-of",
        type=day,
        metavar="YYYY-MM-DD",
        help=(
            "judge the use policy for this day instead of its own,"
            " and end with exit code 1 if it is violated and not waived"
        ),
    )
    add(
        "--where",
        action="store_true",
        help="also show where each stage ran on a cluster: node, resources, times and cost",
    )
    add(
        "--diff",
        nargs=2,
        type=named,
        metavar=("A", "B"),
        help="instead: differences between two models, each as MODEL or REV:MODEL",
    )
    add("--against-rev", type=named, metavar="REV", help="with --diff: the revision of B, as --rev is that of A")


def impact(options: argparse.Namespace) -> int:
    """List every model in history that was trained on a record, a text, a source or a file."""
    from dagster_project.lineage.impact import question
    from dagster_project.lineage.impact.text import as_text

    query = {
        "record": options.record,
        "text": options.text,
        "source": options.source,
        "content": options.hash,
        "containing": options.containing,
    }
    document = question.impact(project(options), **query, near=options.near, regex=options.regex)
    print_result(options, document, as_text)
    return {"yes": 0, "no": 1, "cannot tell": 2}[document["verdict"]]


def _add_impact(commands: Any) -> None:
    command = add_command(commands, impact)
    query = command.add_mutually_exclusive_group(required=True)
    query.add_argument(
        "--record", type=utf8, metavar="ID", help="a record, by its example_id or the id that a release gives it"
    )
    query.add_argument(
        "--text",
        type=utf8,
        help="the text of one of its messages; case, white space and composition of letters are ignored",
    )
    query.add_argument(
        "--source", type=utf8, metavar="PATH", help="every record of a source: a file, or a folder with all its files"
    )
    query.add_argument("--hash", help="md5 or sha256 (or its beginning) of a source, an output, or a file in one")
    query.add_argument(
        "--containing", type=utf8, metavar="TEXT", help="part of a message, such as a name, between word boundaries"
    )
    command.add_argument("--near", action="store_true", help="with --record or --text: its near-copies too")
    command.add_argument(
        "--regex",
        action="store_true",
        help="with --containing: it is a regular expression (no look-around, no back-references), ignoring case",
    )


def verify(options: argparse.Namespace) -> int:
    """Reproduce a stage in a scratch clone and compare the bytes, hash
    all outputs that dvc.lock names, or verify signatures."""
    if options.signatures:
        return _verify_signatures(options)
    from dagster_project.commands import verify as module
    from dagster_project.orchestration import integrity

    if options.key:
        raise InputError("verify: --key requires --signatures", "see `pedigree verify --help`")
    if options.integrity == bool(options.stage):
        raise InputError("verify: give either a stage or --integrity", "see `pedigree verify --help`")
    if ((options.deep or options.install) and options.integrity) or (options.all_revs and not options.integrity):
        raise InputError(
            "verify: --deep and --install require a stage, --all-revs requires --integrity",
            "see `pedigree verify --help`",
        )
    if options.all_revs and options.rev:  # else the workspace would not be hashed
        raise InputError("verify: --rev and --all-revs exclude each other", "leave one of the two out")
    if options.integrity:
        document = integrity.examine(project(options), options.rev, options.all_revs)
        print_result(options, document, integrity.as_text)
        return {"intact": 0, "altered": 1, "incomplete": 2}[document["verdict"]]
    if options.install:
        from dagster_project.commands.verify_installed import verify_installed

        code = verify_installed(project(options), options.stage, options.rev, options.deep, options.json)
        if code is not None:
            return code
    document = module.verify(project(options), options.stage, options.rev, options.deep)
    print_result(options, document, module.as_text)
    return 1 if document["verdict"] == "different" else 0


def _verify_signatures(options: argparse.Namespace) -> int:
    from dagster_project.commands.verify_signatures import as_text, verify_signatures

    others = ("rev", "deep", "install", "integrity", "all_revs")
    if not options.stage or any(getattr(options, name) for name in others):
        raise InputError(
            "verify: --signatures requires a model, and no other option than --key", "see `pedigree verify --help`"
        )
    document = verify_signatures(Path(options.project).resolve(), options.stage, options.key)
    print_result(options, document, as_text)
    return 0 if document["verdict"] == "verified" else 1


def _add_verify(commands: Any) -> None:
    add = add_command(commands, verify).add_argument
    add(
        "stage",
        nargs="?",
        metavar="STAGE[@VARIANT]",
        help="name of a stage, path of its output, or content hash; with --signatures also a folder",
    )
    add("--rev", help="git revision (default: the workspace, including uncommitted changes)")
    add("--deep", action="store_true", help="start from the sources: reproduce all upstream stages first")
    add(
        "--install",
        action="store_true",
        help="if another version made it: install that one in a scratch environment, and verify there",
    )
    add(
        "--integrity",
        action="store_true",
        help="instead hash every output and report that dvc.lock names, in the cache and the workspace",
    )
    add("--all-revs", action="store_true", help="with --integrity: also at every commit that changed dvc.lock")
    add(
        "--signatures",
        action="store_true",
        help="instead verify the signature and the attestations of a model, or of a folder that has them",
    )
    add(
        "--key",
        type=named,
        metavar="PUB",
        help="with --signatures: the public key to trust (default: the one in the folder of the signatures)",
    )


def add_commands(commands: Any) -> None:
    _add_audit(commands)
    _add_impact(commands)
    _add_verify(commands)
