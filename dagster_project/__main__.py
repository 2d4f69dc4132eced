"""The command line: one thin function per command. `--json` prints one document on stdout; logs go to stderr."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from dagster_project.errors import InputError, PedigreeError

log = logging.getLogger("pedigree")


def check(options: argparse.Namespace) -> int:
    """validate any data set without a pipeline"""
    from dagster_project.curation.validate import check_paths, check_text

    found = check_paths([Path(path) for path in options.paths], options.format, [Path(path) for path in options.against])
    _print(options, found, check_text)
    return 1 if any(finding["severity"] == "error" and finding["count"] for finding in found["findings"]) else 0


def run(options: argparse.Namespace) -> int:
    """run one stage; what dvc.yaml calls"""
    from dagster_project.doors.run import run_stage, streaming_to_dagster

    with streaming_to_dagster():
        report = run_stage(_project(options), options.stage)
    if options.json:
        print(json.dumps(report.document(), ensure_ascii=False))
    return 0


def sync(options: argparse.Namespace) -> int:
    """mirror what DVC did into Dagster's event log"""
    from dagster_project.doors.dagster_assets import open_instance
    from dagster_project.doors.runs import reap
    from dagster_project.doors.sync import sync as mirror

    root = _project(options)
    with open_instance(root) as instance:
        said = reap(instance) + mirror(root, instance)
    _print(options, {"reported": said}, lambda _: "\n".join(said) or "Dagster and DVC agree; nothing to report.")
    return 0


def plan(options: argparse.Namespace) -> int:
    """tokens and steps of each variant, before training"""
    from dagster_project.doors.plan import as_text, plan_variants

    found = plan_variants(_project(options), options.variants)
    _print(options, found, as_text)
    return 0


def audit(options: argparse.Namespace) -> int:
    """which data, parameters and code made a model"""
    from dagster_project.audit import lineage

    _print(options, lineage.audit(_project(options), options.model, options.rev), lineage.as_text)
    return 0


def ui(options: argparse.Namespace) -> int:
    """open the Dagster UI on this machine's loopback address"""
    from dagster_project.doors.ui import serve

    _print(options, {"url": f"http://{options.host}:{options.port}"}, lambda found: f"Dagster UI: {found['url']}  (stop with Ctrl-C)")
    sys.stdout.flush()
    serve(_project(options), options.host, options.port)


def _project(options: argparse.Namespace) -> Path:
    root = Path(options.project).resolve()
    if not (root / "dvc.yaml").is_file():
        raise InputError(f"no dvc.yaml in {root}", "run the command from the project's folder, or give --project FOLDER")
    return root


def _print(options: argparse.Namespace, found: Any, as_text: Any) -> None:
    print(json.dumps(found, ensure_ascii=False) if options.json else as_text(found))


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="pedigree",
        description="LLM fine-tuning in which every model knows its data.",
        epilog="Exit codes: 0 fine, 1 a check failed or the answer is no, 2 bad input or usage.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Any) -> argparse.ArgumentParser:
        one = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        one.set_defaults(function=function)
        one.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
        one.add_argument("--project", default=".", metavar="FOLDER", help="the project's folder (default: here)")
        return one

    one = command(check)
    one.add_argument("paths", nargs="+", metavar="PATH", help="files of examples (.json, .jsonl, .jsonl.gz)")
    one.add_argument(
        "--format",
        default="auto",
        help="alpaca, messages, sharegpt, dolly, prompt_completion, question_answer; default: told from the keys",
    )
    one.add_argument("--against", nargs="+", default=[], metavar="PATH", help="held-out files that PATH must not overlap")
    command(run).add_argument("stage", metavar="STAGE[@VARIANT]", help="a stage of dvc.yaml, e.g. splits or adapter@lora")
    command(sync)
    command(plan).add_argument("variants", nargs="*", metavar="VARIANT", help="variants of params.yaml (default: all)")
    one = command(audit)
    one.add_argument("model", metavar="MODEL", help="a path, a stage's name or a content hash")
    one.add_argument("--rev", help="git revision to look at (default: the workspace)")
    one = command(ui)
    one.add_argument("--host", default="127.0.0.1", help="address to listen on; Dagster's UI has no authentication (default: %(default)s)")
    one.add_argument("--port", type=int, default=3000, help="default: %(default)s")
    return whole


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    for chatty in ("bitsandbytes", "httpx"):  # notices about parts that are not used here
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return int(options.function(options))
    except PedigreeError as error:
        log.error(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; nothing was recorded")
        return 130
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
