"""The command line: one thin function per command. `--json` prints one document on stdout; logs go to stderr."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dagster_project.core.errors import InputError, PedigreeError

if TYPE_CHECKING:
    from dagster_project.evaluation.paired.pairwise import Match

log = logging.getLogger("pedigree")


def check(options: argparse.Namespace) -> int:
    """validate any data set without a pipeline"""
    import tempfile

    from dagster_project.curation.check_files import check_paths, read_mapping, read_policy
    from dagster_project.curation.checks.checks import Rules
    from dagster_project.curation.checks.review import refuse_expired
    from dagster_project.curation.checks.token_counts import ESTIMATED, tokens_of
    from dagster_project.curation.write_checked import refuse_overwriting
    from dagster_project.lineage.history import files_at
    from dagster_project.views.data_quality import data_quality_page
    from dagster_project.views.data_quality_terminal import check_text

    if options.report and Path(options.report).suffix.lower() not in {".html", ".htm"}:
        raise InputError(f"--report {options.report}: the name of a page ends in .html", "name a new file: what stood in it is replaced")
    if options.thirteen_grams and not options.against:
        raise InputError("--thirteen-grams compares with what is held out", "name that with --against")
    outputs = {f"--{name}": Path(path) for name in ("out", "dropped") if (path := getattr(options, name))}
    inputs = [*options.paths, *options.against, *filter(None, (options.policy, options.base_model, options.since))]
    refuse_overwriting(outputs, [Path(path) for path in inputs], Path(options.report) if options.report else None)
    mapping = None if options.mapping is None else read_mapping(options.mapping)
    rules = read_policy(Path(options.policy)) if options.policy else Rules()
    refuse_expired(rules.waivers, f"{options.policy}: waivers", date.today())
    base_model = Path(options.base_model or Path(options.project) / "data" / "base_model")
    if options.base_model and not (base_model / "tokenizer.json").is_file():
        raise InputError(f"{base_model}: no tokenizer.json in it", "name the folder of a model")
    tokens = tokens_of(base_model) if (base_model / "tokenizer.json").is_file() else ESTIMATED
    with tempfile.TemporaryDirectory() as folder:
        since = [] if options.since is None else files_at(options.since, [Path(path) for path in options.paths], Path(folder))
        found = check_paths(
            options.paths, options.format, options.against, rules, tokens, [*map(str, since)], options.since or "", options.thirteen_grams,
            mapping, outputs.get("--out"), outputs.get("--dropped"),
        )  # fmt: skip
    if options.report:
        _write("--report", Path(options.report), data_quality_page(found, found.get("changes")))
        log.info(f"report: {options.report}")
    for option, path in outputs.items():
        log.info(f"{option.lstrip('-')}: {path}, {found['kept'] if option == '--out' else found['rows'] - found['kept']} rows")
    wide = shutil.get_terminal_size((120, 24)).columns
    _print(options, found, lambda document: check_text(document, sys.stdout.isatty(), wide))
    return 1 if any(finding["severity"] == "error" and finding["count"] for finding in found["findings"]) else 0


def run(options: argparse.Namespace) -> int:
    """run one stage; what dvc.yaml calls"""
    from dagster_project.orchestration.run_stage import run_stage, streaming_to_dagster

    with streaming_to_dagster():
        report = run_stage(_project(options), options.stage)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
    return 0


def render(options: argparse.Namespace) -> int:
    """draw pages again from the documents on disk, without running anything"""
    from dagster_project.commands.render import as_text
    from dagster_project.commands.render import render as draw

    result = draw(_project(options), options.stage)
    _print(options, result, as_text)
    return 0


def sync(options: argparse.Namespace) -> int:
    """mirror what DVC did into Dagster's event log"""
    from dagster_project.orchestration.dagster.assets import open_instance
    from dagster_project.orchestration.dagster.dead_runs import reap
    from dagster_project.orchestration.dagster.sync import sync as mirror

    root = _project(options)
    with open_instance(root) as instance:
        lines = reap(instance) + mirror(root, instance)
    _print(options, {"reported": lines}, lambda _: "\n".join(lines) or "Dagster and DVC agree; nothing to report.")
    return 0


def plan(options: argparse.Namespace) -> int:
    """tokens, steps, memory and time of each variant, before training"""
    from dagster_project.commands.plan import as_text, plan_model, plan_variants
    from dagster_project.core.params import Compute

    if options.model:
        found = plan_model(
            Path(options.model),
            options.method or ["full", "lora", "qlora"],
            tokens=options.tokens_per_row,
            rows=options.batch,
            checkpointing=options.gradient_checkpointing,
            compute=Compute(dtype=options.dtype),
            device=options.device,
        )
    else:
        found = plan_variants(_project(options), options.variants)
    _print(options, found, as_text)
    return 0


def audit(options: argparse.Namespace) -> int:
    """which data, parameters and code made a model, or what differs between two"""
    from dagster_project.lineage import lineage
    from dagster_project.lineage.diff import as_text, diff
    from dagster_project.lineage.index import Index
    from dagster_project.views.lineage import lineage_page

    root = _project(options)
    if options.diff:
        if options.model or options.html or options.records:
            raise InputError("--diff names two models itself", "leave out MODEL, --html and --records")
        before, after = options.diff
        _print(options, diff(root, before, after, options.rev, options.against_rev), as_text)
        return 0
    if not options.model or options.against_rev:
        raise InputError("no MODEL named" if not options.model else "--against-rev belongs to --diff", "see `pedigree audit --help`")
    for option, name, endings in (("--html", options.html, (".html", ".htm")), ("--records", options.records, (".csv", ".parquet"))):
        if name and not name.lower().endswith(endings):
            raise InputError(
                f"{option} {name}: its name must end in {' or '.join(endings)}", "name a new file: what stood in it is replaced"
            )
    subject = lineage.find(Index(root), options.model, options.rev)
    found = lineage.document(subject)
    if options.json or options.html or options.records:
        records, _ = lineage.trained_on(subject)
        listed = lineage.listed(records) if options.json or options.html else []
        if options.records:
            lineage.write_trained_on(records, Path(options.records))
        if options.html:
            _write("--html", Path(options.html), lineage_page(found, listed))
        if options.json and found["records"]:
            found["records"]["list"] = listed
    _print(options, found, lineage.as_text)
    return 0


def verify(options: argparse.Namespace) -> int:
    """re-make a stage in a scratch clone and compare the bytes, or hash everything"""
    from dagster_project.commands import verify as proof
    from dagster_project.orchestration import integrity

    if options.integrity == bool(options.stage):
        raise InputError("verify: name a stage, or --integrity alone", "see `pedigree verify --help`")
    if (options.deep and options.integrity) or (options.all_revs and not options.integrity):
        raise InputError("verify: --deep goes with a stage, --all-revs with --integrity", "see `pedigree verify --help`")
    if options.integrity:
        found = integrity.examine(_project(options), options.rev, options.all_revs)
        _print(options, found, integrity.as_text)
        return {"intact": 0, "altered": 1, "incomplete": 2}[found["verdict"]]
    found = proof.verify(_project(options), options.stage, options.rev, options.deep)
    _print(options, found, proof.as_text)
    return 0 if found["verdict"] == "identical" else 1


def compare(options: argparse.Namespace) -> int:
    """the board: every variant beside what tuning competes with, and which to use"""
    folder = _project(options) / "data" / "comparison"
    if not (folder / "comparison.json").is_file():
        raise InputError("data/comparison: nothing was compared yet", "run `dvc repro comparison`")
    document = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    _print(options, document, lambda _: (folder / "board.md").read_text(encoding="utf-8").rstrip("\n"))
    return 0


def export(options: argparse.Namespace) -> int:
    """write a model's lineage for other tools: model card, bill of materials, lineage events"""
    from dagster_project.lineage.export.export import export as export_model

    text = export_model(_project(options), options.model, options.format, options.rev, options.issued)
    if options.out:
        _write("--out", Path(options.out), text)
        log.info(f"{options.format}: {options.out}")
    _print(options, {"format": options.format, "file": options.out, "text": text}, lambda found: "" if options.out else text.rstrip())
    return 0


def impact(options: argparse.Namespace) -> int:
    """every model in history that saw a record, a text, a source or a file"""
    from dagster_project.lineage import impact as module

    asked = {"record": options.record, "text": options.text, "source": options.source, "content": options.hash}
    found = module.impact(_project(options), **asked, near=options.near)
    _print(options, found, module.as_text)
    return 0 if found["models"] else 1


def export_ballot(options: argparse.Namespace) -> int:
    """write a page on which people vote blindly between two systems' answers"""
    from dagster_project.evaluation.ballots import document, export_text
    from dagster_project.views.ballot import ballot_page

    ballot = _match(options)
    out = Path(options.out or _project(options) / "data" / "pages" / "ballots" / f"{ballot.id}.html")
    if out.suffix.lower() not in {".html", ".htm"}:
        raise InputError(f"--out {out}: the name of a page ends in .html", "name a new file: what stood in it is replaced")
    _write("--out", out, ballot_page(document(ballot, options.n)))
    pairs = {"pairs": min(options.n, len(ballot.pairs)), "of": len(ballot.pairs), "identical": ballot.identical}
    _print(options, {"ballot": ballot.id, "systems": ballot.systems, "seed": ballot.seed, **pairs, "file": str(out)}, export_text)
    return 0


def import_votes(options: argparse.Namespace) -> int:
    """count the votes that raters saved"""
    from dagster_project.evaluation.ballots import preferences, read_votes, result, votes_text

    ballot, votes = read_votes(_project(options), [Path(file) for file in options.votes], _seed(options), options.partial)
    if options.preferences:
        rows = preferences(ballot, votes)
        _write("--preferences", Path(options.preferences), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        log.info(f"preferences: {options.preferences}, {len(rows)} pairs")
    _print(options, result(ballot, votes), votes_text)
    return 0


def judge(options: argparse.Namespace) -> int:
    """let a language model compare two systems' answers, in both orders, or the reward model"""
    from dagster_project.evaluation import judge as module

    if options.reward_model == bool(options.endpoint and options.model):
        raise InputError("who is to judge?", "give --endpoint and --model, or --reward-model")
    if options.reward_model:
        found = module.by_reward(_match(options), options.n, _project(options) / "data" / "reward_model")
        _print(options, found, module.by_reward_text)
        return 0
    if options.price and not all(0 <= price < float("inf") for price in options.price):
        raise InputError(f"--price {options.price[0]:g} {options.price[1]:g}: no prices", "name two numbers from 0")
    endpoint = module.Endpoint(options.endpoint, options.model, options.key_env)
    _print(options, module.judge(_match(options), options.n, endpoint, options.price), module.judge_text)
    return 0


def ui(options: argparse.Namespace) -> int:
    """open the Dagster UI on this machine's loopback address, and the project's pages beside it"""
    from dagster_project.orchestration.dagster import pages
    from dagster_project.orchestration.dagster.ui import serve

    root = _project(options)
    port = pages.port_of(root) if options.pages_port is None else options.pages_port
    found = {"url": f"http://{options.host}:{options.port}", "pages": f"http://{pages.HOST}:{port}/"}
    _print(options, found, lambda found: f"Dagster UI: {found['url']}  (stop with Ctrl-C)\nPages: {found['pages']}")
    sys.stdout.flush()
    serve(root, options.host, options.port, port)


def _project(options: argparse.Namespace) -> Path:
    root = Path(options.project).resolve()
    if not (root / "dvc.yaml").is_file():
        raise InputError(f"no dvc.yaml in {root}", "run the command from the project's folder, or give --project FOLDER")
    return root


def _match(options: argparse.Namespace) -> Match:
    """The pairs of the two systems named, or of those that one would ask about first."""
    from dagster_project.evaluation.paired.pairwise import contenders, match

    root = _project(options)
    if len(options.systems) not in {0, 2}:
        raise InputError(f"{len(options.systems)} system(s) named", "name two, or none for the best variant and the best prompted baseline")
    found = match(root, tuple(options.systems) or contenders(root), _seed(options))
    if not found.pairs:
        raise InputError(
            f"{' and '.join(found.systems)}: no test prompt that both answered differently ({found.identical} with the same answer)",
            "name two other systems",
        )
    return found


def _seed(options: argparse.Namespace) -> int:
    from dagster_project.core import params

    return (
        int(params.parse(params.Compute, params.read(_project(options)).get("compute"), "compute").seed)
        if options.seed is None
        else options.seed
    )


def _write(option: str, path: Path, text: str) -> None:
    from dagster_project.core.records import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}", "name a file that can be written") from None


def _print(options: argparse.Namespace, found: Any, as_text: Any) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    text = json.dumps(found, ensure_ascii=False) if options.json else as_text(found)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # a terminal that is not UTF-8, or a file's name that is not
        text = json.dumps(found) if options.json else text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough; the exit code stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, _visible(f"error: {message}\nhint: see `{self.prog} --help`\n"))


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _visible(super().format(record))


def _visible(text: str) -> str:
    """For a terminal: names come from data, so none may steer it, or fill it."""
    from dagster_project.core.text import visible

    return "\n".join(line if len(line) <= LINE else f"{line[:LINE]} ..." for line in visible(text).split("\n"))


LINE = 2_000
"""Characters shown of a line on stderr."""


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2026-01-31") from None


def parser() -> argparse.ArgumentParser:
    from dagster_project.lineage.export.registry import formats

    whole = _Parser(
        prog="pedigree",
        description="LLM fine-tuning in which every model knows its data.",
        epilog="Exit codes: 0 fine, 1 a check failed or the answer is no, 2 bad input or usage.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Any, name: str = "", among: Any = commands) -> argparse.ArgumentParser:
        one = among.add_parser(name or function.__name__, help=function.__doc__, description=function.__doc__)
        one.set_defaults(function=function)
        one.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
        one.add_argument("--project", default=".", metavar="FOLDER", help="the project's folder (default: here)")
        return one

    def compared(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "systems", nargs="*", metavar="SYSTEM", help="variants or baselines (default: the best variant and the best prompted baseline)"
        )
        one.add_argument("--n", type=_count, default=40, help="pairs, if there are so many (default: %(default)s)")
        one.add_argument("--seed", type=int, help="which pairs, in which order and places (default: compute.seed)")

    one = command(check)
    one.add_argument("paths", nargs="+", metavar="PATH", help="files or folders of examples, preference pairs or benchmark questions")
    one.add_argument("--format", default="auto", help="alpaca, messages, sharegpt, dolly, dpo, hh, ...; default: told from the keys")
    one.add_argument(
        "--mapping", metavar="FIELD=COLUMN,...", help="for columns of your own: prompt=q,response=a or prompt=q,chosen=a,rejected=b"
    )
    one.add_argument("--out", metavar="CLEAN.jsonl", help="write the rows that would be kept, repaired where the policy is `fix`")
    one.add_argument("--dropped", metavar="DROPPED.jsonl", help="write the other rows, each with its source row and all reasons")
    one.add_argument("--against", nargs="+", default=[], metavar="PATH", help="held-out files that PATH must not overlap")
    one.add_argument("--policy", metavar="FILE", help="YAML with policy, limits and waivers: the keys of `instructions` in params.yaml")
    one.add_argument("--report", metavar="FILE.html", help="also write one self-contained page")
    one.add_argument(
        "--since", metavar="PATH|REV", help="say what changed since another version: a path, or a git revision of the same paths"
    )
    one.add_argument("--base-model", metavar="FOLDER", help="whose tokenizer and chat template count (default: data/base_model, if made)")
    one.add_argument(
        "--thirteen-grams", action="store_true", help="also say what the usual rule, any 13 words in common, would call leakage"
    )
    command(run).add_argument("stage", metavar="STAGE[@VARIANT]", help="a stage of dvc.yaml, e.g. splits or adapter@lora")
    command(render).add_argument("stage", nargs="?", metavar="STAGE[@VARIANT]", help="default: all stages that have pages")
    command(sync)
    one = command(plan)
    one.add_argument("variants", nargs="*", metavar="VARIANT", help="variants of params.yaml (default: all)")
    one.add_argument("--model", metavar="CONFIG", help="plan for any model instead, from its folder or config.json alone")
    one.add_argument("--method", action="append", help="with --model, and may be repeated (default: full, lora and qlora)")
    one.add_argument("--tokens-per-row", type=int, default=2048, metavar="N", help="with --model (default: %(default)s)")
    one.add_argument("--batch", type=int, default=1, metavar="N", help="with --model: rows in a forward pass (default: %(default)s)")
    one.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="with --model (default: on)")
    one.add_argument("--dtype", default="auto", help="with --model: bfloat16 or float32 (default: bfloat16 where the device has it)")
    one.add_argument("--device", default="cuda", help="with --model: cuda or cpu; it need not be here (default: %(default)s)")
    one = command(audit)
    one.add_argument(
        "model", nargs="?", metavar="MODEL", help="a stage's name, a path (a copied folder too), a content hash, or REV:one of them"
    )
    one.add_argument("--rev", help="git revision to look at (default: the workspace)")
    one.add_argument("--html", metavar="FILE.html", help="also write one self-contained page")
    one.add_argument("--records", metavar="FILE", help="also write every record it learnt from, with step and epoch: .csv or .parquet")
    one.add_argument("--diff", nargs=2, metavar=("A", "B"), help="instead: what differs between two models, each as MODEL or REV:MODEL")
    one.add_argument("--against-rev", metavar="REV", help="with --diff: the revision of B, as --rev is that of A")
    one = command(impact)
    asked = one.add_mutually_exclusive_group(required=True)
    asked.add_argument("--record", metavar="ID", help="a record, by its example_id")
    asked.add_argument("--text", help="what one of its messages says, but for case and white space")
    asked.add_argument("--source", metavar="PATH", help="every record of a source: a file, or a folder and all in it")
    asked.add_argument("--hash", help="md5 or sha256 (or its beginning) of a source, an output, or a file of one")
    one.add_argument("--near", action="store_true", help="with --record or --text: near-copies of it too")
    one = command(verify)
    one.add_argument("stage", nargs="?", metavar="STAGE[@VARIANT]", help="a stage's name, the path of its output or a content hash")
    one.add_argument("--rev", help="git revision to look at (default: the workspace, uncommitted work included)")
    one.add_argument("--deep", action="store_true", help="go back to the sources: re-make every stage above it first")
    one.add_argument("--integrity", action="store_true", help="instead hash everything that dvc.lock reaches, in cache and workspace")
    one.add_argument("--all-revs", action="store_true", help="with --integrity: every commit that changed dvc.lock, too")
    command(compare)
    one = command(export)
    one.add_argument("model", metavar="MODEL", help="a path, a stage's name or a content hash")
    one.add_argument("--format", required=True, choices=formats())
    one.add_argument("--out", metavar="FILE", help="default: print it")
    one.add_argument("--rev", help="git revision to look at (default: the workspace)")
    one.add_argument("--issued", type=_date, metavar="YYYY-MM-DD", help="default: the date of the commit that recorded the model")
    ballots = commands.add_parser("ballots", help="let people compare two systems, blindly").add_subparsers(
        dest="part", required=True, metavar="COMMAND"
    )
    one = command(export_ballot, "export", ballots)
    compared(one)
    one.add_argument("--out", metavar="FILE.html", help="the page (default: data/pages/ballots/<ballot>.html)")
    one = command(import_votes, "import", ballots)
    one.add_argument("votes", nargs="+", metavar="VOTES.json", help="files saved from one ballot, one for each rater")
    one.add_argument("--preferences", metavar="OUT.jsonl", help="also write what most raters preferred as preference pairs")
    one.add_argument("--partial", action="store_true", help="count files in which votes are missing")
    one.add_argument("--seed", type=int, help="that of the export (default: compute.seed)")
    one = command(judge)
    compared(one)
    one.add_argument("--reward-model", action="store_true", help="let the project's own reward model judge")
    one.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, up to /v1: /chat/completions is appended")
    one.add_argument("--model", metavar="NAME", help="the judge, as the endpoint calls it")
    one.add_argument("--key-env", metavar="NAME", help="environment variable that holds the key (default: the endpoint wants none)")
    one.add_argument(
        "--price", nargs=2, type=float, metavar=("IN", "OUT"), help="of a million prompt and completion tokens, to tell the cost"
    )
    one = command(ui)
    one.add_argument("--host", default="127.0.0.1", help="address to listen on; Dagster's UI has no authentication (default: %(default)s)")
    one.add_argument("--port", type=int, default=3000, help="default: %(default)s")
    one.add_argument(
        "--pages-port",
        type=int,
        metavar="PORT",
        help="port of the project's pages on 127.0.0.1 (default: the one used last, at first 3100)",
    )
    return whole


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
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
