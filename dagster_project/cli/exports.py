"""What accompanies a model, and the model in the formats of servers: sign, attest, export."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from dagster_project.cli.arguments import add_command, day, named, project
from dagster_project.cli.output import print_result, write
from dagster_project.commands.model_files import FORMATS as MODEL_FORMATS
from dagster_project.commands.model_files import QUANTIZATIONS
from dagster_project.core.errors import InputError
from dagster_project.lineage.export.registry import formats

log = logging.getLogger("pedigree")


def sign(options: argparse.Namespace) -> None:
    """Sign a model with a local key, in the form of OpenSSF Model Signing."""
    from dagster_project.commands import sign as module

    print_result(options, module.sign(Path(options.project).resolve(), options.model, options.key), module.as_text)


def attest(options: argparse.Namespace) -> None:
    """Sign how each stage of a model's lineage was run: in-toto statements with SLSA provenance."""
    from dagster_project.commands import sign as module

    print_result(options, module.attest(project(options), options.model, options.key, options.remade), module.as_text)


def _add_signing_commands(commands: Any) -> None:
    for function, what in ((sign, "; or any folder"), (attest, "")):
        add = add_command(commands, function).add_argument
        add("model", metavar="MODEL", help=f"name of a stage, path, or content hash{what}")
        add(
            "--key",
            type=named,
            metavar="FILE",
            help="private key in PEM, Ed25519 or P-256 (default: the text in PEDIGREE_SIGNING_KEY)",
        )
    add(
        "--remade",
        action="store_true",
        help="first make all stages again from the sources, as `verify --deep`, and state the result",
    )


def export(options: argparse.Namespace) -> None:
    """Write a model's lineage for other tools and readers, or the model itself
    for servers: GGUF, safetensors, an adapter."""
    from dagster_project.lineage.export.export import export as export_model
    from dagster_project.lineage.signing.target import refuse_in_output

    if options.quantization and options.format not in MODEL_FORMATS:
        raise InputError("--quantization requires --format gguf", "leave it out")
    if options.all is not None:
        return _export_all(options)
    if options.with_model or options.key:
        raise InputError("export: --with-model and --key require --all", "see `pedigree export --help`")
    if options.format in (*MODEL_FORMATS, "adapter"):
        return _export_model(options)
    if options.out:
        refuse_in_output(project(options), "--out", Path(options.out), "file")
    text = export_model(project(options), options.model, options.format, options.rev, options.issued)
    if options.out:
        write("--out", Path(options.out), text)
        log.info(f"{options.format}: {options.out}")
    if options.json or not options.out:
        document = {"format": options.format, "file": options.out, "text": text}
        print_result(options, document, lambda _: text.rstrip(), safe=not sys.stdout.isatty())
    return None


def _export_model(options: argparse.Namespace) -> None:
    """Write the model itself for servers, with its pedigree in the metadata of its files, or an adapter as a folder."""
    if options.rev or options.issued:
        what = "adapter" if options.format == "adapter" else "model"
        raise InputError(
            f"--format {options.format}: not with --rev or --issued: the {what} is that of the workspace",
            "check out the revision first",
        )
    if options.format == "adapter":
        from dagster_project.commands.adapter_folder import as_text, write_adapter

        document = write_adapter(project(options), options.model, Path(options.out) if options.out else None)
    else:
        from dagster_project.commands.model_files.export import as_text, export

        document = export(project(options), options.model, options.format, options.quantization, options.out)
    print_result(options, document, as_text)


def _export_all(options: argparse.Namespace) -> None:
    """Write all formats, and a page that lists them."""
    from dagster_project.commands import export_all

    if options.out:
        raise InputError("--out cannot be combined with --all", "leave it out: --all names the folder")
    if options.all == "":
        raise InputError(
            "--all: the name of the folder is empty",
            "name a folder, or leave the name out to write into the folder of the release",
        )
    in_place = options.all is True or export_all.is_release(project(options), options.model, options.all)
    if options.key and not options.with_model and not in_place:
        raise InputError(
            "--key requires --with-model", "`pedigree sign FOLDER --key FILE` signs a folder of exports alone"
        )
    if in_place and options.with_model:
        raise InputError(
            "--with-model: without another folder, exports are written into the folder of the release",
            "leave it out, or name a new folder",
        )
    if (options.with_model or in_place) and options.rev:
        option = "--with-model" if options.with_model else "--all without a folder"
        raise InputError(
            f"--rev cannot be combined with {option}: the model is that of the workspace",
            "check out the revision first",
        )
    given = (project(options), options.model)
    if in_place:
        document = export_all.write_in_place(*given, options.issued, options.key)
    elif options.with_model:
        document = export_all.hand_over(*given, Path(options.all), options.issued, options.key)
    else:
        document = export_all.write_exports(*given, Path(options.all), options.rev, options.issued)
    print_result(options, document, export_all.as_text)


def _add_export(commands: Any) -> None:
    command = add_command(commands, export)
    add = command.add_argument
    add("model", metavar="MODEL", help="path, name of a stage, or content hash")
    form = command.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--format",
        choices=[*formats(), *MODEL_FORMATS, "adapter"],
        help=(
            "gguf and safetensors write the model itself,"
            " adapter a folder for PEFT and vLLM, the others describe the model"
        ),
    )
    form.add_argument(
        "--all",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help=(
            "write all formats to a folder, with exports.html,"
            " which lists them (default for a release: its own folder; signed if there is a key)"
        ),
    )
    add("--quantization", choices=QUANTIZATIONS, help="with --format gguf: its number format (default: f16)")
    add(
        "--out",
        "--output",
        type=named,
        metavar="FILE",
        help=(
            "with --format (default: standard output);"
            " of gguf and safetensors a new folder (default: in build/), of an adapter too (default: here)"
        ),
    )
    add(
        "--with-model",
        action="store_true",
        help="with --all: also copy the files of the release, and sign the folder if there is a key",
    )
    add(
        "--key",
        type=named,
        metavar="FILE",
        help=(
            "with --with-model, or --all without FOLDER: private key in PEM,"
            " Ed25519 or P-256 (default: the text in PEDIGREE_SIGNING_KEY)"
        ),
    )
    add("--rev", type=named, help="git revision (default: the workspace)")
    add("--issued", type=day, metavar="YYYY-MM-DD", help="default: the date of the commit that recorded the model")


def add_commands(commands: Any) -> None:
    _add_signing_commands(commands)
    _add_export(commands)
