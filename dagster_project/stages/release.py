"""comparison + merged@X -> release.

The selected model, if it passes the promotion gate: better than baselines, knowledge kept, unseen test split, loadable.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Compute, Section
from dagster_project.core.published_ids import CREATE, is_own, published_table, read_key
from dagster_project.core.records import CheckResult, Report, read_arrow, write_json, write_text
from dagster_project.core.rendering import render
from dagster_project.core.text import NAMES
from dagster_project.curation.checks.review import Exemption, check_waivers
from dagster_project.curation.sources import use_policy
from dagster_project.evaluation.comparison import counted_once, gain
from dagster_project.evaluation.paired.bootstrap import FEWEST
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.export.summary import from_reports

CHECK_DESCRIPTIONS = {
    "better_than_baselines": "The variant is significantly better than the best alternative to tuning.",
    "kept_its_knowledge": "Benchmark accuracy is at most `max_forgetting` below the base model's.",
    "test_is_unseen": "No example of the test split, nor a near-copy of one, was trained on.",
    "loads_in_transformers": (
        "Plain transformers loads the folder from safetensors only, and its output equals the merged model's."
    ),
    use_policy.NAME: use_policy.DESCRIPTION,
    "own_key": (
        "The key of published record ids is the project's own: the sample project's is public, and protects only the"
        " sample's own data."
    ),
}

AUTO = "auto"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"}
"""File extensions of weights in other formats."""
TRAINING, EXAMPLES = "training.json", "examples.parquet"
"""Training evidence next to the weights: resolved settings and trained weights; every record with its training steps.
"""
TABLES = "*.parquet"
"""Tables of records and texts next to the weights of a model that stands alone. They are not released as they are."""
NEW_TOKENS = 24
PROBES = ("What is the capital of France?", "My parcel arrived damaged. What can I do?", "Write one line of JSON.")


class Waiver(Exemption):
    """An exemption of a check, with a reason."""

    check: Literal[
        "better_than_baselines", "kept_its_knowledge", "test_is_unseen", "loads_in_transformers", "use_policy"
    ]
    """Name of the check."""


class Params(Section):
    """Which variant is released, and what it must fulfill. See docs/checks.md and docs/evaluation.md."""

    variant: str = AUTO
    """The variant to release, by name. `auto`: the one that `comparison` recommends."""
    max_forgetting: float = Field(default=0.05, ge=0, le=1)
    """Largest allowed loss of accuracy on the benchmarks, compared with the base model."""
    waivers: list[Waiver] = []
    """Checks that may fail, each with a reason and an expiry date. See docs/checks.md."""


def validate(params: Params, ctx: ValidationContext) -> None:
    check_waivers(params.waivers, ctx)
    read_key(ctx.root)
    known = [*ctx.values["adapter"], *ctx.values["aligned"]]
    if params.variant not in {AUTO, *known}:
        problem = f"params.yaml: release.variant: no variant {params.variant!r}"
        raise InputError(problem, f"{AUTO}, or one of {', '.join(known)}")


def run(ctx: StageContext) -> Report:
    merged: dict[str, Path] = {}
    trained: dict[str, Path] = {}
    for stage, folder in (("adapter", "merged"), ("aligned", "merged_aligned")):
        for name in ctx.values[stage]:
            merged[name] = ctx.outputs_of(folder) / name
            trained[f"{stage}@{name}"] = ctx.outputs_of(stage) / name
    trained["reward_model"] = ctx.output_of("reward_model")
    if "reward_model" not in ctx.values:
        ctx = replace(ctx, earlier=tuple(stage for stage in ctx.earlier if stage != "reward_model"))
    params, comparison, key = ctx.params("release", Params), ctx.output_of("comparison"), read_key(ctx.root)
    return produce(params, ctx.compute, comparison, merged, trained, ctx.reports(), key, ctx.out)


def produce(
    params: Params,
    compute: Compute,
    comparison: Path,
    merged: Mapping[str, Path],
    trained: Mapping[str, Path],
    reports: Mapping[str, Mapping[str, Any]],
    key: bytes,
    out: Path,
) -> Report:
    """Copy the selected model and run the promotion checks.

    Args:
        merged: variant -> folder of its complete model.
        trained: training stage (adapter@lora) -> its output.
        reports: every earlier stage -> its report, in flow order.
        key: the project's secret for the ids of records (core/published_ids.py).
    """
    board = json.loads((comparison / "comparison.json").read_text(encoding="utf-8"))
    recommended = board["recommended"]
    variant = recommended["variant"] if params.variant == AUTO else params.variant
    if variant is None:
        remedy = "To release one anyway, name it in release.variant"
        note = f"comparison recommends no variant: {recommended['why']} {remedy}"
        return Report(checks=[CheckResult("better_than_baselines", passed=False, blocking=True, count=1, note=note)])
    shutil.copytree(merged[variant], out, ignore=shutil.ignore_patterns(TABLES), dirs_exist_ok=True)
    waivers = [waiver.model_dump(mode="json") for waiver in params.waivers]
    provenance = from_reports("release", reports, variant, waivers)
    compared = board["compared"][variant]
    outcomes = {
        "better_than_baselines": _better(board["shown"][0], compared, board["test"]),
        "kept_its_knowledge": _kept_knowledge(compared.get("retention", {}), params.max_forgetting),
        "test_is_unseen": _unseen(board["test"]),
        "loads_in_transformers": _loads(out, merged[variant], compute),
    }
    if verdict := provenance.get(use_policy.NAME):
        outcomes[use_policy.NAME] = _keeps_to_policy(verdict)
    checks = [_as_check_result(name, outcome, params) for name, outcome in outcomes.items()]
    checks += [] if verdict else [use_policy.check(None)]
    checks.append(_own_key(key, provenance["sources"]))
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    document = {
        "variant": variant,
        "recommended": recommended,
        "checks": {check.name: {"passed": check.passed, "note": check.note} for check in checks},
        "waivers": waivers,
        "scores": board["scores"].get(variant, {}),
        "costs": board["costs"][variant],
        "files": {str(path.relative_to(out)): sha256_of_file(path) for path in files},
    }
    write_json(out / "release.json", document)
    _write_provenance(provenance, trained, key, out)
    shown = {name: document["scores"][name] for name in board["shown"] if name in document["scores"]}
    exempted = [waiver.check for waiver in params.waivers]
    waived = [check.name for check in checks if not check.passed and check.name in exempted]
    return Report(metrics={"variant": variant, **shown, "waived": waived, "files": document["files"]}, checks=checks)


def _write_provenance(provenance: Mapping[str, Any], trained: Mapping[str, Path], key: bytes, out: Path) -> None:
    """Write the model card and, under audit/, the lineage of the model and the evidence of each training.

    Tables have published ids of records.
    """
    import pyarrow.parquet as pq

    write_text(out / "README.md", model_card(provenance))
    write_json(out / "audit" / "audit.json", provenance)
    for name in (name for name in provenance["stages"] if name in trained):
        target = out / "audit" / name.replace("@", "_")
        target.mkdir(parents=True)
        if (source := trained[name] / TRAINING).is_file():
            shutil.copyfile(source, target / TRAINING)
        if (source := trained[name] / EXAMPLES).is_file():
            table = published_table(key, read_arrow(source))
            pq.write_table(table, target / EXAMPLES, compression="zstd", store_schema=True)


def _own_key(key: bytes, sources: Mapping[str, Mapping[str, Any]]) -> CheckResult:
    if is_own(key, sources.values()):
        return CheckResult("own_key", passed=True, severity="warn")
    problem = "the key is the sample project's, which is public: a guessed text can be confirmed from the published ids"
    return CheckResult("own_key", passed=False, severity="warn", count=1, note=f"{problem}; `{CREATE}`")


@dataclass(frozen=True)
class _CheckOutcome:
    """Outcome of a check, with a remedy if it failed."""

    passed: bool
    note: str
    remedy: str = ""
    count: int = 1
    violations: list[dict[str, Any]] = field(default_factory=list)
    """Of the use policy."""


def _as_check_result(name: str, outcome: _CheckOutcome, params: Params) -> CheckResult:
    """A failed check blocks the release, unless it is waived: then it is a warning."""
    if outcome.passed:
        return CheckResult(name, passed=True, blocking=True, note=outcome.note)
    failed = CheckResult(name, passed=False, count=outcome.count, violations=outcome.violations)
    waiver = next((waiver for waiver in params.waivers if waiver.check == name), None)
    if waiver:
        note = f"{outcome.note}; waived until {waiver.expires}: {waiver.reason}"
        return replace(failed, severity="warn", waived=outcome.count, note=note)
    note = f"{outcome.note}; {outcome.remedy}, or waive the check in release.waivers"
    return replace(failed, blocking=True, note=note)


def _better(decides: str, compared: Mapping[str, Any], test: Mapping[str, int]) -> _CheckOutcome:
    result = gain(decides, compared, test)
    if result is None:
        note = "nothing was compared: it has neither answers nor a perplexity"
        return _CheckOutcome(False, note, "name test examples that can be answered")
    if not result.enough:
        examples = f"{result.examples} test examples{counted_once(test)}"
        note = f"nothing can be concluded from {examples}, {FEWEST} are needed: {result.words}"
        return _CheckOutcome(False, note, "add examples, or raise splits.test or evaluation.max_examples")
    if failed := compared.get("failed_checks"):
        note = f"its checks failed: {'; '.join(failed)}; {result.words}"
        return _CheckOutcome(False, note, "see what the checks say")
    if result.sure:
        return _CheckOutcome(True, result.words)
    rival = NAMES.get(result.rival, "the base model")
    return _CheckOutcome(False, f"not surely better: {result.words}", f"use {rival}, improve the variant")


def _kept_knowledge(retention: Mapping[str, Any], max_forgetting: float) -> _CheckOutcome:
    """Without benchmarks the check fails."""
    if not retention:
        return _CheckOutcome(False, "not measured", "name a benchmark in evaluation.benchmarks")
    questions, change = retention["overall"]["questions"], retention["overall"]["accuracy"]["difference"]
    most = f"and at most {100 * max_forgetting:.1f} may be lost"
    note = f"{100 * change:+.1f} points on {questions} benchmark questions, {most}"
    remedy = "lower the learning rate, the epochs or the rank, or replay general examples (tokenized.replay)"
    return _CheckOutcome(change >= -max_forgetting, note, remedy)


def _unseen(test: Mapping[str, int]) -> _CheckOutcome:
    note = f"{test['seen']} of {test['examples']} test examples have a near-copy in what was trained on"
    return _CheckOutcome(test["examples"] > 0 and not test["seen"], note, "split again")


def _keeps_to_policy(verdict: Mapping[str, Any]) -> _CheckOutcome:
    """Evaluates the verdict on the reports of the runs that the released model was made from."""
    violations, rows = verdict["violations"], max(1, verdict["refused_rows"])
    remedy = "use other sources or another base model, or declare what is missing if it is true (docs/sources.md)"
    return _CheckOutcome(not violations, use_policy.in_words(verdict), remedy, rows, violations)


def _loads(folder: Path, merged: Path, compute: Compute) -> _CheckOutcome:
    """Compare greedy tokens of the released folder and of the merged model.

    The former is loaded with plain transformers, the latter as in `evaluation`.
    """
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.methods.load import load

    prepare(compute)  # first, because it imports torch and transformers in less time
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    another = "name another variant in release.variant"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return _CheckOutcome(False, f"weights in another format than safetensors: {', '.join(pickled)}", another)
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        note = "it does not stand alone: it is an adapter that was not merged, or a classifier's head"
        return _CheckOutcome(False, note, another)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
    except (OSError, ValueError) as error:
        return _CheckOutcome(False, f"transformers does not load it: {' '.join(str(error).split())[:300]}", another)

    def generated(one: Any) -> list[list[int]]:
        texts = (_prompt(tokenizer, text) for text in PROBES)
        prompts = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
        with torch.inference_mode():
            return [one.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist() for ids in prompts]

    tokens = generated(model)
    del model
    if tokens == generated(load(merged, None, torch.device("cpu"), torch.float32)):
        return _CheckOutcome(True, "the same greedy tokens as merged")
    return _CheckOutcome(False, "its greedy tokens are not those of merged", another)


def _prompt(tokenizer: Any, text: str) -> str:
    """A question as the chat template writes it; as it is if there is no template, or it refuses a question alone."""
    try:
        return render(tokenizer, [{"role": "user", "content": text}], True)
    except InputError:
        return text
