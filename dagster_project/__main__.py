"""The command line: one thin function per command. `--json` prints one document on stdout; logs go to stderr."""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import logging
import os
import shutil
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dagster_project.commands import ending, own_process
from dagster_project.commands.model_files import FORMATS as MODEL_FORMATS
from dagster_project.commands.model_files import QUANTIZATIONS
from dagster_project.core.errors import INNER, DamagedIndex, InputError, Interrupted, PedigreeError
from dagster_project.core.imports import lean_imports

if TYPE_CHECKING:
    from collections.abc import Callable

    from dagster_project.curation.checks.checks import Judgement
    from dagster_project.evaluation.paired.pairwise import Match

log = logging.getLogger("pedigree")

HTML = (".html", ".htm")

atexit.register(gc.freeze)  # before it ends, the interpreter searches all that the libraries hold for cycles: 1.5 s after a training


def check(options: argparse.Namespace) -> int:
    """Validate any data set, without a pipeline."""
    import tempfile

    from dagster_project.curation.check_files import check_paths, read_mapping, read_policy
    from dagster_project.curation.checks.checks import Rules
    from dagster_project.curation.checks.review import refuse_expired
    from dagster_project.curation.checks.token_counts import ESTIMATED, tokens_of
    from dagster_project.curation.write_checked import refuse_overwriting
    from dagster_project.lineage.history import files_at
    from dagster_project.views.data_quality import data_quality_page
    from dagster_project.views.data_quality_terminal import check_text
    from dagster_project.views.rendered_terminal import rendered_text

    if options.report:
        _require_suffix("--report", options.report, HTML)
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
    with tempfile.TemporaryDirectory() as folder:
        earlier = [] if options.since is None else files_at(options.since, [Path(path) for path in options.paths], Path(folder))
        document = check_paths(
            options.paths, options.format, options.against, rules, tokens, [*map(str, earlier)], options.since or "", options.thirteen_grams,
            mapping, outputs.get("--out"), outputs.get("--dropped"), show,
        )  # fmt: skip
    if options.report:
        _write("--report", Path(options.report), data_quality_page(document, document.get("changes")))
        log.info(f"report: {options.report}")
    for option, path in outputs.items():
        log.info(f"{option.lstrip('-')}: {path}, {document['kept'] if option == '--out' else document['rows'] - document['kept']} rows")
    columns = shutil.get_terminal_size((120, 24)).columns
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown = ["", rendered_text(document["shown"], color)] if show else []
    _print(options, document, lambda document: "\n".join([check_text(document, color, columns), *shown]), safe=True)
    return 1 if any(finding["severity"] == "error" and finding["count"] for finding in document["findings"]) else 0


def _show(options: argparse.Namespace) -> Callable[[Judgement], list[dict[str, Any]]] | None:
    """The function that renders the rows of --show or --show-rows; None without them."""
    if options.show is None and options.show_rows is None:
        if options.template is not None:
            raise InputError("--template requires --show or --show-rows", "add --show 3")
        return None
    from dagster_project.commands import show as module

    by = module.renderer(Path(options.project), Path(options.base_model) if options.base_model else None, options.template)
    return lambda judged: module.show(judged, module.select(judged, options.show, options.show_rows or ()), by)


def init(options: argparse.Namespace) -> int:
    """Make a project in a folder, with parameters that fit your data."""
    from dagster_project.commands.init import as_text
    from dagster_project.commands.init import init as make

    document = make(Path(options.folder or options.project), options.data, options.base_model, options.task, options.license)
    _print(options, document, as_text)
    return 0


def run(options: argparse.Namespace) -> int:
    """Run one stage (the command in dvc.yaml), or bring all stages up to date with --all."""
    if options.all:
        return _run_all(options)
    with lean_imports():
        from dagster_project.orchestration.run_stage import run_stage, streaming_to_dagster

    if not options.stage:
        raise InputError("STAGE or --all is required", "name a stage, or bring all stages up to date with --all")
    if options.force or options.jobs is not None:
        raise InputError("--jobs and --force require --all", f"`dvc repro --single-item --force {options.stage}` runs one stage again")
    with streaming_to_dagster():
        report = run_stage(_project(options), options.stage)
    if options.json:
        _print(options, report, str)
    return 0


def _run_all(options: argparse.Namespace) -> int:
    from dagster_project.commands.run_all import as_text, exit_code
    from dagster_project.orchestration.run_all import run_all
    from dagster_project.pipeline import validate

    if options.stage:
        raise InputError(
            f"--all cannot be combined with {options.stage}", f"`dvc repro {options.stage}` runs a stage and all stages that it depends on"
        )
    document = run_all(_project(options), options.jobs or 1, options.force, validate)
    _print(options, document, as_text)
    return exit_code(document)


def sweep(options: argparse.Namespace) -> int:
    """Run every combination of some parameter values as a DVC experiment, and compare parameters and metrics."""
    from dagster_project.commands import sweep as module
    from dagster_project.pipeline import VARIANTS_OF, validate

    document = module.sweep(
        _project(options), options.section, options.set, options.jobs, options.to, VARIANTS_OF, validate
    )  # fmt: skip
    _print(options, document, module.as_text)
    return 130 if document["interrupted"] else 0 if document["passed"] else 1


def upgrade(options: argparse.Namespace) -> int:
    """Record the code of the installed version in code.lock.yaml, and list the stages that become stale."""
    from dagster_project.commands.upgrade import as_text
    from dagster_project.commands.upgrade import upgrade as record

    _print(options, record(_project(options)), as_text)
    return 0


def pipeline(options: argparse.Namespace) -> int:
    """Write into dvc.yaml what each adapter reads, after an edit of params.yaml that merges adapters or adds one."""
    from dagster_project.commands.adapter_reads import as_text, write_reads

    _print(options, write_reads(_project(options)), as_text)
    return 0


def render(options: argparse.Namespace) -> int:
    """Draw pages again from the documents on disk, without running a stage."""
    from dagster_project.commands.render import as_text
    from dagster_project.commands.render import render as draw

    result = draw(_project(options), options.stage)
    _print(options, result, as_text)
    return 0


def sync(options: argparse.Namespace) -> int:
    """Report DVC's state to Dagster's event log."""
    from dagster_project.orchestration.last_sync import LastSync

    last = LastSync.read(_project(options), tuple(filter(None, options.key_prefix.split("/"))))
    lines: list[str] = []
    if not last.unchanged:
        with lean_imports():
            from dagster_project.orchestration.dagster.assets import open_instance
            from dagster_project.orchestration.dagster.sync import sync_after
        with open_instance(last.root, shared=bool(last.key_prefix)) as instance:
            lines = sync_after(last, instance)
    _print(options, {"reported": lines}, lambda _: "\n".join(lines) or "Dagster and DVC agree: nothing to report.")
    return 0


def share(options: argparse.Namespace) -> int:
    """Copy sources, outputs and past runs to a DVC remote, so that another clone restores stages instead of running them."""
    from dataclasses import asdict

    from dagster_project.orchestration.dvc_remote import push

    pushed = push(_project(options), options.remote)
    text = f"{pushed.remote}: {pushed.objects} new objects, {pushed.runs} past runs. In another clone, `dvc repro --pull` restores them."
    _print(options, asdict(pushed), lambda _: text)
    return 0


def plan(options: argparse.Namespace) -> int:
    """Predict tokens, steps, memory and time of each variant, before training."""
    from dagster_project.commands.plan import as_text, plan_model, plan_variants
    from dagster_project.core.params import Compute

    with lean_imports():
        if options.model:
            document = plan_model(
                Path(options.model),
                options.method or ["full", "lora", "qlora"],
                tokens=options.tokens_per_row,
                rows=options.batch,
                checkpointing=options.gradient_checkpointing,
                compute=Compute(dtype=options.dtype),
                device=options.device,
            )
        else:
            document = plan_variants(_project(options), options.variants)
    _print(options, document, as_text)
    return 0


def audit(options: argparse.Namespace) -> int:
    """Show the data, parameters and code behind a model, or the differences between two models."""
    from dagster_project.commands import papers
    from dagster_project.commands import where as module
    from dagster_project.lineage import lineage, registered
    from dagster_project.lineage.attribution import owners
    from dagster_project.lineage.diff import as_text, diff
    from dagster_project.lineage.index import Index
    from dagster_project.views.lineage import lineage_page

    if (code := _audit_exported(options)) is not None:
        return code
    root = _project(options)
    if options.diff:
        if options.model or options.html or options.records or options.where or options.as_of:
            raise InputError(
                "--diff cannot be combined with MODEL, --html, --records, --where or --as-of", "leave these out: --diff names both models"
            )
        before, after = options.diff
        _print(options, diff(root, before, after, options.rev, options.against_rev), as_text)
        return 0
    if not options.model or options.against_rev:
        raise InputError("no MODEL given" if not options.model else "--against-rev requires --diff", "see `pedigree audit --help`")
    for option, name, suffixes in (("--html", options.html, HTML), ("--records", options.records, (".csv", ".parquet"))):
        if name:
            _require_suffix(option, name, suffixes)
    subject = lineage.find(Index(root), options.model, options.rev)
    document = lineage.document(subject, options.as_of) | registered.of_model(root, subject.run.md5)
    if subject.run.address == "release" and subject.run.in_workspace and (note := papers.of_another_version(root, subject.run.md5)):
        log.warning(note)
    if options.json or options.html or options.records:
        records, _ = lineage.trained_on(subject)
        listed = lineage.listed(records) if options.json or options.html else []
        if options.records:
            lineage.write_trained_on(records, Path(options.records))
        if options.html:
            _write("--html", Path(options.html), lineage_page(document, listed))
        if options.json and document["records"]:
            document["records"]["list"] = listed
    if options.where:
        document["where"] = module.where(root, document["stages"])
    stores = owners.stores_of(root, subject)
    document |= {"gradients": stores} if stores else {}
    shown = [*owners.as_text(stores), *(module.as_text(document["where"]) if options.where else ())]
    _print(options, document, lambda found: "\n".join([lineage.as_text(found), *shown]))
    verdict = document["use_policy"] if options.as_of else {}
    return 1 if verdict.get("violations") and "waiver" not in verdict else 0


def _audit_exported(options: argparse.Namespace) -> int | None:
    """Audit a GGUF file or a folder that `export` wrote, in the project or without one; None if MODEL is anything else."""
    from dagster_project.commands.model_files import claim, claimed
    from dagster_project.lineage.history import path_exists

    path = Path(options.model or "")
    if not options.model or options.diff or not path_exists(path):
        return None
    has_project = (Path(options.project) / "dvc.yaml").is_file()
    if has_project and _is_recorded_here(_project(options), options.model):
        return None
    file = claim.read(path)
    if file is None:
        if not has_project and claim.is_model_file(path):
            raise InputError(f"{path}: its metadata does not say where it is from", "run the command in a project that may have it")
        return None
    if options.html or options.records or options.where or options.as_of or options.rev:
        raise InputError(
            "--html, --records, --where, --as-of and --rev are not for exported files", f"use them with the hash that {path} names"
        )
    document = claimed.examine(_project(options) if has_project else None, file)
    _print(options, document, claimed.as_text)
    return claimed.exit_code(document)


def _is_recorded_here(root: Path, model: str) -> bool:
    """Whether it is a stage, whatever folder has its name, or the path of an output: a base model may itself be a file that `export` wrote."""
    from dagster_project.lineage.history import Revision

    lock = Revision(root, None).lock()
    outputs = {(root / out["path"]).resolve() for stage in lock.values() for out in stage.get("outs", [])}
    return model in lock or Path(model).resolve() in outputs


def verify(options: argparse.Namespace) -> int:
    """Reproduce a stage in a scratch clone and compare the bytes, hash everything that dvc.lock refers to, or verify signatures."""
    if options.signatures:
        return _verify_signatures(options)
    from dagster_project.commands import verify as module
    from dagster_project.orchestration import integrity

    if options.key:
        raise InputError("verify: --key requires --signatures", "see `pedigree verify --help`")
    if options.integrity == bool(options.stage):
        raise InputError("verify: give either a stage or --integrity", "see `pedigree verify --help`")
    if ((options.deep or options.install) and options.integrity) or (options.all_revs and not options.integrity):
        raise InputError("verify: --deep and --install require a stage, --all-revs requires --integrity", "see `pedigree verify --help`")
    if options.integrity:
        document = integrity.examine(_project(options), options.rev, options.all_revs)
        _print(options, document, integrity.as_text)
        return {"intact": 0, "altered": 1, "incomplete": 2}[document["verdict"]]
    if options.install:
        from dagster_project.commands.verify_installed import verify_installed

        code = verify_installed(_project(options), options.stage, options.rev, options.deep, options.json)
        if code is not None:
            return code
    document = module.verify(_project(options), options.stage, options.rev, options.deep)
    _print(options, document, module.as_text)
    return 1 if document["verdict"] == "different" else 0


def _verify_signatures(options: argparse.Namespace) -> int:
    from dagster_project.commands.verify_signatures import as_text, verify_signatures

    others = ("rev", "deep", "install", "integrity", "all_revs")
    if not options.stage or any(getattr(options, name) for name in others):
        raise InputError("verify: --signatures requires a model, and no other option than --key", "see `pedigree verify --help`")
    document = verify_signatures(Path(options.project).resolve(), options.stage, options.key)
    _print(options, document, as_text)
    return 0 if document["verdict"] == "verified" else 1


def sign(options: argparse.Namespace) -> int:
    """Sign a model with a local key, in the form of OpenSSF Model Signing."""
    from dagster_project.commands.sign import sign as sign_model
    from dagster_project.commands.sign import sign_text

    _print(options, sign_model(Path(options.project).resolve(), options.model, options.key), sign_text)
    return 0


def attest(options: argparse.Namespace) -> int:
    """Sign how each stage of a model's lineage was run: in-toto statements with SLSA provenance."""
    from dagster_project.commands.sign import attest as attest_model
    from dagster_project.commands.sign import attest_text

    _print(options, attest_model(_project(options), options.model, options.key, options.remade), attest_text)
    return 0


def erase(options: argparse.Namespace) -> int:
    """Erase records: from the sources, and from everything that was made from them, with a certificate."""
    from dagster_project.commands import erase as module
    from dagster_project.pipeline import validate

    root = _project(options)
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
        _print(options, module.dry_run(root, request, options.also, options.declined, options.reason), module.dry_run_text)
        return 0
    document = module.erase(root, request, options.also, options.declined, options.reason, options.key, validate, options.verify)
    _print(options, document, module.as_text)
    return module.exit_code(document)


def why(options: argparse.Namespace) -> int:
    """Rank the training records of a model by their likeness to a question and its answer, or list those that fit the others the least."""
    if options.diff:
        return _why_diff(options)
    if not options.model:
        raise InputError("why: no MODEL given", "name a model, or two with --diff")
    if options.suspects:
        return _suspects(options)
    if options.prompt is None:
        return _index_gradients(options)
    with lean_imports():
        from dagster_project.commands import why as module
        from dagster_project.commands.why_question import Options

    if options.html:
        _require_suffix("--html", options.html, HTML)
    asked = Options(options.prompt, options.answer, options.span, options.system, options.top)
    document = module.answer_why(_project(options), options.model, asked, options.index, options.draws if options.prove else None)
    if options.html:
        from dagster_project.views.why import why_page

        _write_page(options, why_page(document))
    _print(options, document, module.as_text)
    return 1 if options.prove and not document["proof"]["supported"] else 0


QUESTION = ("prompt", "answer", "span", "system")
"""Options of `why` that belong to a question."""


def _index_gradients(options: argparse.Namespace) -> int:
    """Compute the gradients of a model alone."""
    from dagster_project.commands import why as module

    given = [name for name in (*QUESTION, "html") if getattr(options, name) is not None]
    if not options.index or given or options.prove:
        raise InputError("why: --prompt is required" + (f" with --{given[0]}" if given else ""), "see `pedigree why --help`")
    _print(options, module.index(_project(options), options.model), module.as_text)
    return 0


def _suspects(options: argparse.Namespace) -> int:
    """List the records whose gradients fit those of the others the least, and write them as a review queue."""
    from dagster_project.commands import why_suspects as module

    if given := [name for name in (*QUESTION, "prove") if getattr(options, name)]:
        raise InputError(f"why: --suspects is about all records: not with --{given[0]}", "leave it out")
    if options.html:
        _require_suffix("--html", options.html, HTML)
    document = module.suspects(_project(options), options.model, options.top, options.index)
    if options.html:
        from dagster_project.views.suspects import suspects_page

        _write_page(options, suspects_page(document))
    _print(options, document, module.as_text)
    return 0


def _why_diff(options: argparse.Namespace) -> int:
    """Rank the records of the difference between two versions of a model for each answer that changed."""
    from dagster_project.commands import why_diff as module

    if given := [name for name in (*QUESTION, "prove", "index", "suspects") if getattr(options, name)]:
        raise InputError(f"why: --diff compares recorded answers: not with --{given[0]}", "leave it out")
    if options.model:
        raise InputError(f"why: --diff names both models: not with {options.model}", "leave it out")
    if options.html:
        _require_suffix("--html", options.html, HTML)
    before, after = options.diff
    document = module.answer_diff(_project(options), before, after, options.top)
    if options.html:
        from dagster_project.views.why_diff import why_diff_page

        _write_page(options, why_diff_page(document))
    _print(options, document, module.as_text)
    return 0


def bisect(options: argparse.Namespace) -> int:
    """Find the first commit whose model no longer gives an expected answer, by binary search, and the rows of that commit that are most like it."""
    from dagster_project.commands import bisect as module

    if options.html:
        _require_suffix("--html", options.html, HTML)
    asked = module.Asked(options.prompt, options.expect, options.system)
    document = module.bisect(_project(options), options.model, asked, options.good, options.bad, options.train, options.top)
    if options.html:
        from dagster_project.views.bisect import bisect_page

        _write_page(options, bisect_page(document))
        document["page"] = options.html
    _print(options, document, module.as_text)
    return 0 if document["verdict"] == "found" else 1


def _write_page(options: argparse.Namespace, page: str) -> None:
    _write("--html", Path(options.html), page)
    log.info(f"page: {options.html}")


def compare(options: argparse.Namespace) -> int:
    """Show the comparison table: every variant, the baselines, which system to use, and the registered versions of models."""
    from dagster_project.core.documents import read_document
    from dagster_project.lineage import registered
    from dagster_project.lineage.export.answers import table

    root = _project(options)
    folder = root / "data" / "comparison"
    if not (folder / "comparison.json").is_file():
        raise InputError("data/comparison: there is no comparison yet", "run `dvc repro comparison`")
    hint = "restore it with `dvc checkout --force data/comparison`, or make it again with `dvc repro comparison`"
    document = read_document(folder / "comparison.json", "data/comparison/comparison.json", hint)
    versions = registered.table_rows(registered.registered(root))
    document |= {"registered": [dict(zip(registered.HEAD, row, strict=True)) for row in versions]} if versions else {}
    board = (folder / "board.md").read_text(encoding="utf-8", errors="replace").rstrip("\n")
    _print(options, document, lambda _: board + (f"\n\n## Registered versions\n\n{table(registered.HEAD, versions)}" if versions else ""))
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a model's lineage for other tools and readers, or the model itself for servers: GGUF, safetensors, an adapter."""
    from dagster_project.lineage.export.export import export as export_model

    if options.all is not None:
        return _export_all(options)
    if options.with_model or options.key:
        raise InputError("export: --with-model and --key require --all", "see `pedigree export --help`")
    if options.format in MODEL_FORMATS:
        return _export_model(options)
    if options.quantization:
        raise InputError("--quantization requires --format gguf", "leave it out")
    if options.format == "adapter":
        return _export_adapter(options)
    text = export_model(_project(options), options.model, options.format, options.rev, options.issued)
    if options.out:
        _write("--out", Path(options.out), text)
        log.info(f"{options.format}: {options.out}")
    document = {"format": options.format, "file": options.out, "text": text}
    _print(options, document, lambda _: "" if options.out else text.rstrip(), safe=not sys.stdout.isatty())
    return 0


def _export_adapter(options: argparse.Namespace) -> int:
    """Write a PEFT folder."""
    from dagster_project.commands import adapter_folder as module

    if options.rev or options.issued:
        raise InputError(
            "--format adapter: not with --rev or --issued: the adapter is that of the workspace", "check out the revision first"
        )
    document = module.write_adapter(_project(options), options.model, Path(options.out) if options.out else None)
    _print(options, document, module.as_text)
    return 0


def _export_model(options: argparse.Namespace) -> int:
    """Write the model itself for servers, with its pedigree in the metadata of its files."""
    from dagster_project.commands.model_files import export as module

    if options.rev or options.issued:
        raise InputError(
            f"--format {options.format}: not with --rev or --issued: the model is that of the workspace", "check out the revision first"
        )
    document = module.export(_project(options), options.model, options.format, options.quantization, options.out)
    _print(options, document, module.as_text)
    return 0


def _export_all(options: argparse.Namespace) -> int:
    """Write all formats, and a page that lists them."""
    from dagster_project.commands import papers

    if options.quantization:
        raise InputError("--quantization requires --format gguf", "leave it out")
    if options.out:
        raise InputError("--out cannot be combined with --all", "leave it out: --all names the folder")
    if options.all == "":
        raise InputError("--all: the name of the folder is empty", "name a folder, or none to write beside the files of the release")
    in_place = options.all is True or papers.is_release(_project(options), options.model, options.all)
    if options.key and not options.with_model and not in_place:
        raise InputError("--key requires --with-model", "`pedigree sign FOLDER --key FILE` signs a folder of exports alone")
    if in_place and options.with_model:
        raise InputError(
            "--with-model: without another folder, papers are written beside the files of the release", "leave it out, or name a new folder"
        )
    if (options.with_model or in_place) and options.rev:
        option = "--with-model" if options.with_model else "--all without a folder"
        raise InputError(f"--rev cannot be combined with {option}: the model is that of the workspace", "check out the revision first")
    given = (_project(options), options.model)
    if in_place:
        document = papers.write_in_place(*given, options.issued, options.key)
    elif options.with_model:
        document = papers.hand_over(*given, Path(options.all), options.issued, options.key)
    else:
        document = papers.write_exports(*given, Path(options.all), options.rev, options.issued)
    _print(options, document, papers.as_text)
    return 0


def push(options: argparse.Namespace) -> int:
    """Upload a release with its card, license and papers to the Hugging Face Hub, in one commit."""
    from dagster_project.commands import push as module

    to = module.destination(options.repo, options.private, options.dry_run)
    module.progress_bars()
    document = module.push(_project(options), options.model, to, options.dry_run, options.key, options.issued)
    _print(options, document, module.as_text)
    return 0


def mlflow(options: argparse.Namespace) -> int:
    """Register a model in MLflow, with its lineage as tags and its data as inputs of a run."""
    from dagster_project.commands.mlflow_registry import as_text, register

    document = register(_project(options), options.model, options.name, options.experiment, options.tracking_uri, options.upload)
    _print(options, document, as_text)
    return 0


def impact(options: argparse.Namespace) -> int:
    """List every model in history that was trained on a record, a text, a source or a file."""
    from dagster_project.lineage import impact as module

    query = {
        "record": options.record,
        "text": options.text,
        "source": options.source,
        "content": options.hash,
        "containing": options.containing,
    }
    document = module.impact(_project(options), **query, near=options.near, regex=options.regex)
    _print(options, document, module.as_text)
    return {"yes": 0, "no": 1, "cannot tell": 2}[document["verdict"]]


def export_ballot(options: argparse.Namespace) -> int:
    """Write a page for blind votes between the answers of two systems."""
    from dagster_project.evaluation.ballots import document, export_text
    from dagster_project.views.ballot import ballot_page

    ballot = _match(options)
    out = Path(options.out or _project(options) / "data" / "pages" / "ballots" / f"{ballot.id}.html")
    _require_suffix("--out", str(out), HTML)
    _write("--out", out, ballot_page(document(ballot, options.n)))
    pairs = {"pairs": min(options.n, len(ballot.pairs)), "of": len(ballot.pairs), "identical": ballot.identical}
    _print(options, {"ballot": ballot.id, "systems": ballot.systems, "seed": ballot.seed, **pairs, "file": str(out)}, export_text)
    return 0


def import_votes(options: argparse.Namespace) -> int:
    """Count the votes that raters saved."""
    from dagster_project.evaluation.ballots import preferences, read_votes, result, votes_text

    ballot, votes = read_votes(_project(options), [Path(file) for file in options.votes], _seed(options), options.partial)
    if options.preferences:
        rows = preferences(ballot, votes)
        _write("--preferences", Path(options.preferences), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        log.info(f"preferences: {options.preferences}, {len(rows)} pairs")
    _print(options, result(ballot, votes), votes_text)
    return 0


def judge(options: argparse.Namespace) -> int:
    """Compare the answers of two systems by a language model, in both orders, or by the reward model."""
    from dagster_project.core import params
    from dagster_project.evaluation import judge as module

    if options.reward_model == bool(options.endpoint and options.model):
        raise InputError("judge: requires exactly one judge", "give either --endpoint and --model, or --reward-model")
    if options.reward_model:
        if "reward_model" not in params.read(_project(options)):  # a folder that was left behind is not the project's
            raise InputError("params.yaml has no section reward_model", "give --endpoint and --model")
        document = module.by_reward(_match(options), options.n, _project(options) / "data" / "reward_model")
        _print(options, document, module.by_reward_text)
        return 1 if document["alarm"] else 0
    if options.price and not all(0 <= price < float("inf") for price in options.price):
        raise InputError(
            f"--price {options.price[0]:g} {options.price[1]:g}: a price cannot be negative or infinite", "give two numbers from 0"
        )
    endpoint = module.Endpoint(options.endpoint, options.model, options.key_env)
    document = module.judge(_match(options), options.n, endpoint, options.price)
    _print(options, document, module.judge_text)
    return 1 if document["alarm"] else 0


def chat(options: argparse.Namespace) -> int:
    """Talk to a model in the terminal, or ask it one question."""
    from dagster_project.commands import chat as module

    if options.json and options.once is None:
        raise InputError("--json: only for one question", "add --once TEXT")
    if not 0 <= options.temperature < float("inf"):
        raise InputError(f"--temperature {options.temperature:g}: cannot be negative or infinite", "0 gives the most likely answer")
    asked = module.Options(
        [options.model, *([options.compare] if options.compare else [])],
        options.system,
        module.read_tools(options.tools and Path(options.tools)),
        module.Decoding(options.max_new_tokens, options.temperature, options.seed),
    )
    root = _project(options)
    if options.once is None:
        module.talk(root, asked)
    else:
        _print(options, module.once(root, asked, options.once), module.once_text)
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve a model on loopback, OpenAI-compatible, by a server that is installed."""
    from dagster_project.commands import serve as module

    def announce(document: dict[str, Any]) -> None:
        log.info(module.as_text(document))
        if options.json:
            _print(options, document, str)

    module.serve(_project(options), options.model, options.port, options.engine, announce)
    return 0


def ui(options: argparse.Namespace) -> int:
    """Serve the Dagster UI and the project's pages on this machine's loopback address."""
    from dagster_project.orchestration.dagster import pages
    from dagster_project.orchestration.dagster.ui import serve

    root = _project(options)
    port = pages.port_of(root) if options.pages_port is None else options.pages_port
    addresses = {"url": f"http://{options.host}:{options.port}", "pages": f"http://{pages.HOST}:{port}/"}
    _print(options, addresses, lambda found: f"Dagster UI: {found['url']}  (stop with Ctrl-C)\nPages: {found['pages']}")
    sys.stdout.flush()
    serve(root, options.host, options.port, port)


def _project(options: argparse.Namespace) -> Path:
    from dagster_project.orchestration.special_files import refuse_special_files

    root = Path(options.project).resolve()
    refuse_special_files(root)
    if not (root / "dvc.yaml").is_file():
        raise InputError(f"no dvc.yaml in {root}", "run the command from the project's folder, or give --project FOLDER")
    return root


def _match(options: argparse.Namespace) -> Match:
    """Pairs of answers of the two systems given, by default of the best variant and the best prompted baseline.

    Raises:
        InputError: one system or more than two are given, or no pair of answers differs.
    """
    from dagster_project.evaluation.paired.pairwise import contenders, match

    root = _project(options)
    if len(options.systems) not in {0, 2}:
        raise InputError(f"{len(options.systems)} system(s) given", "give two, or none for the best variant and the best prompted baseline")
    matched = match(root, tuple(options.systems) or contenders(root), _seed(options))
    if not matched.pairs:
        raise InputError(
            f"{' and '.join(matched.systems)}: no test prompt that both answered differently ({matched.identical} with the same answer)",
            "give two other systems",
        )
    return matched


def _seed(options: argparse.Namespace) -> int:
    from dagster_project.core import params

    if options.seed is not None:
        return int(options.seed)
    return int(params.parse(params.Compute, params.read(_project(options)).get("compute"), "compute").seed)


def _require_suffix(option: str, name: str, suffixes: tuple[str, ...]) -> None:
    if Path(name).suffix.lower() not in suffixes:
        raise InputError(f"{option} {name}: its name must end in {' or '.join(suffixes)}", "name a new file: an existing one is replaced")


def _write(option: str, path: Path, text: str) -> None:
    from dagster_project.core.records import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}", "name a writable file") from None


def _print(options: argparse.Namespace, document: Any, as_text: Any, safe: bool = False) -> None:
    """Print a document as JSON or as text. Names and values in it come from data, and may contain control characters: they are written out.

    Args:
        safe: whether the text needs no escapes, as they were made earlier, or it is not for a terminal.
    """
    from dagster_project.core.text import visible, visible_json

    encoding = sys.stdout.encoding or "utf-8"
    if options.json:
        text = visible_json(json.dumps(document, ensure_ascii=False))
    else:
        text = as_text(document) if safe else visible(as_text(document))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # the terminal's encoding is not UTF-8, or a file name is not valid UTF-8
        text = json.dumps(document) if options.json else text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, e.g. `head`, closed the pipe; the exit code is kept
        ending.discard(sys.stdout)
    except OSError as error:
        ending.discard(sys.stdout)
        raise PedigreeError(f"standard output: {error.strerror}", "free some space on its disk, or write elsewhere") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, _visible(f"error: {message}\nhint: see `{self.prog} --help`\n"))


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _visible(super().format(record))


def _visible(text: str) -> str:
    """Text that is safe to print: names come from data, and may contain control characters or be very long."""
    from dagster_project.core.text import visible

    return "\n".join(line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..." for line in visible(text).split("\n"))


MAX_LINE = 2_000
"""Characters of a line that are shown on stderr."""


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _rows(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of row numbers such as 3,17")
    return [int(part) for part in parts]


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-01-31") from None


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    whole = _Parser(
        prog="pedigree",
        description="LLM fine-tuning with record-level lineage.",
        epilog="Exit codes: 0 success, 1 a check failed or the result is negative, 2 bad input or usage.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_check(commands)
    _add_init(commands)
    _add_pipeline_commands(commands)
    _add_lineage_commands(commands)
    _add_erase(commands)
    _add_why(commands)
    _add_bisect(commands)
    _add_evaluation_commands(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_push(commands)
    _add_mlflow(commands)
    _add_ui(commands)
    return whole


def _add_command(commands: Any, function: Any, name: str = "") -> argparse.ArgumentParser:
    """Add a command; its help is the docstring of its function."""
    command = commands.add_parser(name or function.__name__, help=function.__doc__, description=function.__doc__)
    command.set_defaults(function=function)
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    command.add_argument("--project", default=".", metavar="FOLDER", help="folder of the project (default: the current folder)")
    return command


def _add_check(commands: Any) -> None:
    command = _add_command(commands, check)
    add = command.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help="examples, preference pairs or benchmark questions: files, folders, hub:ORG/NAME@REVISION:SPLIT, s3://BUCKET/PREFIX",
    )
    add("--format", default="auto", help="alpaca, messages, sharegpt, dolly, dpo, hh, ...; default: detected from the keys")
    add("--mapping", metavar="FIELD=COLUMN,...", help="for other columns: prompt=q,response=a or prompt=q,chosen=a,rejected=b")
    add("--out", metavar="CLEAN.jsonl", help="write the rows that would be kept, repaired where the policy is `fix`")
    add("--dropped", metavar="DROPPED.jsonl", help="write the other rows, each with its source row and all reasons")
    add("--against", nargs="+", default=[], metavar="PATH", help="held-out files that must not overlap with PATH")
    add("--policy", metavar="FILE", help="YAML with policy, limits and waivers: the keys of `instructions` in params.yaml")
    add("--report", metavar="FILE.html", help="also write one self-contained page")
    add("--since", metavar="PATH|REV", help="list the changes since another version: a path, or a git revision of the same paths")
    add("--base-model", metavar="FOLDER", help="model whose tokenizer and chat template are used (default: data/base_model, if it exists)")
    add("--thirteen-grams", action="store_true", help="also list what the common rule, any 13 shared words, would report as leakage")
    rows = command.add_mutually_exclusive_group()
    rows.add_argument(
        "--show", type=_count, metavar="N", help="also print the first N rows as rendered, with what is trained on highlighted"
    )
    rows.add_argument("--show-rows", type=_rows, metavar="ROW,...", help="the same for some rows, by the numbers of the findings: 3,17")
    add(
        "--template",
        metavar="NAME|FILE",
        help="with --show: chatml, hermes, alpaca or a Jinja file (default: the base model's chat template)",
    )


def _add_init(commands: Any) -> None:
    add = _add_command(commands, init).add_argument
    add("folder", nargs="?", metavar="FOLDER", help="an empty or new folder (default: the current folder)")
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="as for `check`; files are copied to data/sources/, others are read where they are",
    )
    add("--base-model", metavar="MODEL", help="org/name@REVISION on the Hub, or a folder (default: the small model of the sample project)")
    add("--task", choices=("auto", "labels", "json", "text"), default="auto", help="what answers are (default: detected)")
    add("--license", default="unknown", metavar="SPDX", help="license of the data (default: %(default)s)")


def _add_pipeline_commands(commands: Any) -> None:
    add = _add_command(commands, run).add_argument
    add("stage", nargs="?", metavar="STAGE[@VARIANT]", help="a stage of dvc.yaml, e.g. splits or adapter@lora")
    add("--all", action="store_true", help="bring all stages up to date, as `dvc repro` does")
    add("--jobs", type=_count, metavar="N", help="with --all: up to N independent stages at once (default: 1)")
    add("--force", action="store_true", help="with --all: also run stages that are up to date")
    add = _add_command(commands, sweep).add_argument
    add("section", metavar="SECTION", help="section of params.yaml, e.g. adapter.lora or splits")
    add(
        "-S", dest="set", action="append", default=[], metavar="KEY=VALUE,...", help="a parameter of the section and its values; repeatable"
    )
    add("--jobs", type=_count, default=1, metavar="N", help="trials at once (default: %(default)s)")
    add("--to", metavar="STAGE[@VARIANT]", help="stage at which each trial ends (default: the stage of the section)")
    _add_command(commands, render).add_argument("stage", nargs="?", metavar="STAGE[@VARIANT]", help="default: all stages that have pages")
    _add_command(commands, upgrade)
    _add_command(commands, pipeline)
    _add_command(commands, sync).add_argument(
        "--key-prefix", default="", metavar="PREFIX", help="of the project's asset keys in an instance with other assets, e.g. ml/support"
    )
    _add_command(commands, share).add_argument("--remote", metavar="NAME", help="a remote of .dvc/config (default: the default remote)")
    add = _add_command(commands, plan).add_argument
    add("variants", nargs="*", metavar="VARIANT", help="variants of params.yaml (default: all)")
    add("--model", metavar="CONFIG", help="plan for any model instead, from its folder or its config.json only")
    add("--method", action="append", help="with --model; can be repeated (default: full, lora and qlora)")
    add("--tokens-per-row", type=int, default=2048, metavar="N", help="with --model (default: %(default)s)")
    add("--batch", type=int, default=1, metavar="N", help="with --model: rows in a forward pass (default: %(default)s)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="with --model (default: on)")
    add("--dtype", default="auto", help="with --model: bfloat16 or float32 (default: bfloat16 if the device supports it)")
    add("--device", default="cuda", help="with --model: cuda or cpu; it need not be on this machine (default: %(default)s)")


def _add_lineage_commands(commands: Any) -> None:
    from dagster_project.lineage.export.registry import formats

    workspace = "git revision (default: the workspace)"
    add = _add_command(commands, audit).add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="name of a stage, path (also of a copied folder, or of an exported file), content hash, or REV:one of these",
    )
    add("--rev", help=workspace)
    add("--html", metavar="FILE.html", help="also write one self-contained page")
    add("--records", metavar="FILE", help="also write every record the model was trained on, with step and epoch: .csv or .parquet")
    add(
        "--as-of",
        type=_date,
        metavar="YYYY-MM-DD",
        help="judge the use policy for this day instead of its own, and end with exit code 1 if it is violated and not waived",
    )
    add("--where", action="store_true", help="also show where each stage ran on a cluster: node, resources, times and cost")
    add("--diff", nargs=2, metavar=("A", "B"), help="instead: differences between two models, each as MODEL or REV:MODEL")
    add("--against-rev", metavar="REV", help="with --diff: the revision of B, as --rev is that of A")
    command = _add_command(commands, impact)
    query = command.add_mutually_exclusive_group(required=True)
    query.add_argument("--record", metavar="ID", help="a record, by its example_id or the id that a release gives it")
    query.add_argument("--text", help="the text of one of its messages; case and white space are ignored")
    query.add_argument("--source", metavar="PATH", help="every record of a source: a file, or a folder with all its files")
    query.add_argument("--hash", help="md5 or sha256 (or its beginning) of a source, an output, or a file in one")
    query.add_argument("--containing", metavar="TEXT", help="part of a message, such as a name, between word boundaries")
    command.add_argument("--near", action="store_true", help="with --record or --text: its near-copies too")
    command.add_argument(
        "--regex",
        action="store_true",
        help="with --containing: it is a regular expression (no look-around, no back-references), ignoring case",
    )
    add = _add_command(commands, verify).add_argument
    add(
        "stage",
        nargs="?",
        metavar="STAGE[@VARIANT]",
        help="name of a stage, path of its output, or content hash; with --signatures also a folder",
    )
    add("--rev", help="git revision (default: the workspace, including uncommitted changes)")
    add("--deep", action="store_true", help="start from the sources: reproduce all upstream stages first")
    add("--install", action="store_true", help="if another version made it: install that one in a scratch environment, and verify there")
    add("--integrity", action="store_true", help="instead hash everything that dvc.lock refers to, in the cache and the workspace")
    add("--all-revs", action="store_true", help="with --integrity: also at every commit that changed dvc.lock")
    add(
        "--signatures",
        action="store_true",
        help="instead verify the signature and the attestations of a model, or of a folder that has them",
    )
    add("--key", metavar="PUB", help="with --signatures: the public key to trust (default: the one beside the signatures)")
    _add_signing_commands(commands)
    command = _add_command(commands, export)
    add = command.add_argument
    add("model", metavar="MODEL", help="path, name of a stage, or content hash")
    form = command.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--format",
        choices=[*formats(), *MODEL_FORMATS, "adapter"],
        help="gguf and safetensors write the model itself, adapter a folder for PEFT and vLLM, the others describe the model",
    )
    form.add_argument(
        "--all",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="write all formats to a folder, with papers.html, which lists them (default, of a release: beside its files, signed if there is a key)",
    )
    add("--quantization", choices=QUANTIZATIONS, help="with --format gguf: its number format (default: f16)")
    add(
        "--out",
        "--output",
        metavar="FILE",
        help="with --format (default: standard output); of gguf and safetensors a new folder (default: in build/), of an adapter too (default: here)",
    )
    add("--with-model", action="store_true", help="with --all: also copy the files of the release, and sign the folder if there is a key")
    add(
        "--key",
        metavar="FILE",
        help="with --with-model, or --all without FOLDER: private key in PEM, Ed25519 or P-256 (default: the text in PEDIGREE_SIGNING_KEY)",
    )
    add("--rev", help=workspace)
    add("--issued", type=_date, metavar="YYYY-MM-DD", help="default: the date of the commit that recorded the model")


def _add_push(commands: Any) -> None:
    add = _add_command(commands, push).add_argument
    add("model", metavar="MODEL", help="release, its path or content hash")
    add("repo", metavar="REPO_ID", help="repository on the Hub, OWNER/NAME; it is created if it does not exist")
    add("--private", action="store_true", help="create the repository as a private one; refused if it exists and is public")
    add("--dry-run", action="store_true", help="check, and list what would be uploaded; needs neither network nor token")
    add("--key", metavar="FILE", help="sign the files with this private key in PEM (default: the text in PEDIGREE_SIGNING_KEY)")
    add("--issued", type=_date, metavar="YYYY-MM-DD", help="of the papers (default: the date of the commit that recorded the model)")


def _add_mlflow(commands: Any) -> None:
    add = _add_command(commands, mlflow).add_argument
    add("model", metavar="MODEL", help="release, merged@VARIANT, adapter@VARIANT, ... as for `audit`")
    add("--tracking-uri", metavar="URI", help="e.g. sqlite:///mlflow.db or http://127.0.0.1:5000 (default: MLFLOW_TRACKING_URI)")
    add("--name", help="of the registered model (default: the stage, with - in place of @)")
    add("--experiment", default="pedigree", help="of the run (default: %(default)s)")
    add("--upload", action="store_true", help="also store the model's files in MLflow")


def _add_signing_commands(commands: Any) -> None:
    for function in (sign, attest):
        add = _add_command(commands, function).add_argument
        add("model", metavar="MODEL", help="name of a stage, path, or content hash" + ("; or any folder" if function is sign else ""))
        add("--key", metavar="FILE", help="private key in PEM, Ed25519 or P-256 (default: the text in PEDIGREE_SIGNING_KEY)")
        if function is attest:
            add(
                "--remade",
                action="store_true",
                help="first make all stages again from the sources, as `verify --deep`, and state the result",
            )


def _add_erase(commands: Any) -> None:
    from dagster_project.lineage.erasure.kinds import KINDS

    command = _add_command(commands, erase)
    query = command.add_mutually_exclusive_group(required=True)
    query.add_argument("--record", metavar="ID", help="a record, by its example_id or the id that a release gives it")
    query.add_argument(
        "--containing", metavar="TEXT", help="every record with this part of a message, such as a name, between word boundaries"
    )
    query.add_argument("--source", metavar="PATH[:ROW]", help="a row of a source, or all rows of a file or folder")
    query.add_argument("--file", metavar="REQUEST.csv", help="several requests, in columns record, containing and source")
    query.add_argument("--resume", action="store_true", help="go on with an interrupted erasure; give --key and --verify again")
    add = command.add_argument
    add("--dry-run", action="store_true", help="print the plan: rows, relatives, places, models and cost; change nothing")
    kinds = "; ".join(f"{kind}: {about}" for kind, about in KINDS.items())
    add("--also", action="append", default=[], choices=[*KINDS], metavar="KIND", help=f"erase these relatives too; repeatable. {kinds}")
    add("--not", dest="declined", action="append", default=[], choices=[*KINDS], metavar="KIND",
        help="leave these relatives; repeatable (default: near)")  # fmt: skip
    add("--reason", default="", help="why, for the certificate and the tombstones, as given; it must not repeat the text")
    add("--key", metavar="FILE", help="sign the certificate with this private key (PEM)")
    add(
        "--verify",
        action="store_true",
        help="afterwards make every model again from the sources, as `verify --deep`, and compare the bytes",
    )


def _add_evaluation_commands(commands: Any) -> None:
    _add_command(commands, compare)
    ballots = commands.add_parser("ballots", help="Collect blind votes of people between two systems.")
    parts = ballots.add_subparsers(dest="part", required=True, metavar="COMMAND")
    command = _add_command(parts, export_ballot, "export")
    _add_systems(command)
    command.add_argument("--out", metavar="FILE.html", help="the page (default: data/pages/ballots/<ballot>.html)")
    add = _add_command(parts, import_votes, "import").add_argument
    add("votes", nargs="+", metavar="VOTES.json", help="files saved from one ballot, one for each rater")
    add("--preferences", metavar="OUT.jsonl", help="also write the majority votes as preference pairs")
    add("--partial", action="store_true", help="count files with missing votes")
    add("--seed", type=int, help="seed of the export (default: compute.seed)")
    command = _add_command(commands, judge)
    _add_systems(command)
    add = command.add_argument
    add("--reward-model", action="store_true", help="use the project's reward model as the judge")
    add("--endpoint", metavar="URL", help="OpenAI-compatible, up to /v1: /chat/completions is appended")
    add("--model", metavar="NAME", help="name of the model at the endpoint")
    add("--key-env", metavar="NAME", help="environment variable with the key (default: the endpoint requires no key)")
    add("--price", nargs=2, type=float, metavar=("IN", "OUT"), help="price of a million prompt and completion tokens, to report the cost")


def _add_systems(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("systems", nargs="*", metavar="SYSTEM", help="variants or baselines (default: the best variant and the best prompted baseline)")
    add("--n", type=_count, default=40, help="maximum number of pairs (default: %(default)s)")
    add("--seed", type=int, help="for the choice and the order of the pairs and the answers (default: compute.seed)")


def _add_why(commands: Any) -> None:
    add = _add_command(commands, why).add_argument
    add("model", nargs="?", metavar="MODEL", help="adapter@VARIANT, merged@VARIANT, release, ... as for `audit`")
    add(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="instead: for answers in which two versions differ, each as MODEL or REV:MODEL, the records of their difference",
    )
    add("--index", action="store_true", help="compute the gradients of all its training records, which questions need, once per training")
    add("--suspects", action="store_true", help="list records whose gradients fit those of the others the least, as a review queue")
    add("--prompt", metavar="TEXT", help="the question")
    add("--answer", metavar="TEXT", help="the answer to explain (default: the model's own most likely answer)")
    add("--span", metavar="TEXT", help="only this part of the answer, wherever it occurs in it (default: the whole answer)")
    add("--system", metavar="TEXT", help="system prompt; '' for none (default: that of the training records, if all have the same)")
    add(
        "--top",
        type=_count,
        default=10,
        metavar="N",
        help="records to show, or to queue, and to leave out with --prove (default: %(default)s)",
    )
    add("--prove", action="store_true", help="train again without these records, and without as many random ones, and compare")
    add("--draws", type=_count, default=3, metavar="N", help="with --prove: sets of random records (default: %(default)s)")
    add("--html", metavar="FILE.html", help="also write one self-contained page")


def _add_bisect(commands: Any) -> None:
    add = _add_command(commands, bisect).add_argument
    add("model", metavar="MODEL", help="adapter@VARIANT, merged@VARIANT, release, ... as for `why`")
    add("--prompt", required=True, metavar="TEXT", help="the question")
    add("--expect", required=True, metavar="TEXT", help="a text that the right answer contains")
    add("--system", metavar="TEXT", help="system prompt (default: none)")
    add("--good", metavar="REV", help="a commit that is known to give the right answer (default: the oldest with the model)")
    add("--bad", metavar="REV", help="a commit that is known not to (default: HEAD)")
    add("--train", action="store_true", help="make models that are not in the cache again, in a scratch clone, as `verify` does")
    add("--top", type=_count, default=10, metavar="N", help="rows to show (default: %(default)s)")
    add("--html", metavar="FILE.html", help="also write one self-contained page")


def _add_chat(commands: Any) -> None:
    add = _add_command(commands, chat).add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="release, merged@VARIANT, ... or a folder (default: the release, else the recommended variant, else the base model)",
    )
    add("--compare", metavar="OTHER", help="another model that answers the same questions")
    add("--system", metavar="TEXT", help="system prompt; '' for none (default: that of the training records, if all have the same)")
    add("--tools", metavar="FILE.json", help="functions to offer, as OpenAI writes them; calls are shown, not executed")
    add("--once", metavar="TEXT", help="ask this, print the answer and end")
    add("--max-new-tokens", type=_count, default=256, metavar="N", help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0, the most likely answer, as in evaluation)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: %(default)s)")


def _add_serve(commands: Any) -> None:
    add = _add_command(commands, serve).add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="as for `chat` (default: the release, else the recommended variant, else the base model), or a GGUF file",
    )
    add("--port", type=_count, default=8000, help="on 127.0.0.1 (default: %(default)s)")
    add(
        "--engine",
        choices=("vllm", "transformers", "llama.cpp"),
        help="the server (default: llama.cpp for a GGUF file, vllm where it is installed and there is a GPU, else transformers)",
    )


def _add_ui(commands: Any) -> None:
    add = _add_command(commands, ui).add_argument
    add("--host", default="127.0.0.1", help="address to listen on; Dagster's UI has no authentication (default: %(default)s)")
    add("--port", type=int, default=3000, help="default: %(default)s")
    add("--pages-port", type=int, metavar="PORT", help="port of the pages on 127.0.0.1 (default: the latest one, initially 3100)")


def _run(options: argparse.Namespace) -> int:
    """The command's exit code. It runs again if the index of audits was damaged, which is a cache."""
    try:
        return int(options.function(options))
    except DamagedIndex as error:
        log.warning(f"{error.what}, and made anew")
        return int(options.function(options))


def main(arguments: list[str] | None = None) -> int:
    ending.replace_closed_streams()
    if arguments is None:
        own_process.prepare(sys.argv[1:])
    try:
        with ending.interrupts() as interrupts:
            return _main(arguments, interrupts)
    except KeyboardInterrupt:  # before or after the command
        print(ending.INTERRUPTED, file=sys.stderr)
        return ending.EXIT_CODE
    finally:
        ending.flush()


def _main(arguments: list[str] | None, interrupts: ending.Interrupts) -> int:
    options = parser().parse_args(arguments)
    handler = ending.LogHandler(sys.stderr)
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    for chatty in ("bitsandbytes", "httpx"):  # notices about features that are not used here
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return _run(options)
    except SystemExit:
        raise
    except BaseException as error:  # also what is no Exception: Ctrl-C, and the end of a library in Rust
        explained = ending.explained(error, interrupts, options.command, Path(getattr(options, "project", ".")).absolute())
        if explained is None:
            raise
        if not (isinstance(error, KeyboardInterrupt) and INNER in os.environ):
            message = str(explained).replace("\t", "\\t")  # a tab moves the cursor, and is not seen in a name
            log.error(message if isinstance(explained, Interrupted) else f"error: {message}")
        return explained.exit_code
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
