"""comparison + merged@X -> release. The chosen stand-alone model, if it passes the promotion gate: better, nothing forgotten, fairly tested, loadable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import CheckResult, Report, write_json, write_text
from dagster_project.core.text import NAMES
from dagster_project.curation.checks.review import Exemption, check_waivers
from dagster_project.evaluation.comparison import FEWEST, gain
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.export.summary import from_reports

CHECK_DESCRIPTIONS = {
    "better_than_baselines": "The variant is better than the best alternative to tuning, beyond chance.",
    "kept_its_knowledge": "The variant answers no fewer benchmark questions rightly than the base model, but for `max_forgetting`.",
    "test_is_unseen": "No example of the test split, nor a near-copy of one, was trained on.",
    "loads_in_transformers": "Plain transformers loads the folder, from safetensors alone, and it says what the merged model says.",
}

AUTO = "auto"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"}
"""Endings of weights in other formats."""
EVIDENCE = ("training.json", "examples.parquet")
"""What a training leaves beside its weights: settings as resolved and what learnt; each record with the steps that saw it."""
NEW_TOKENS = 24
PROBES = ("What is the capital of France?", "My parcel arrived damaged. What can I do?", "Write one line of JSON.")


class Waiver(Exemption):
    """A check that may fail, because somebody says why."""

    check: Literal["better_than_baselines", "kept_its_knowledge", "test_is_unseen", "loads_in_transformers"]
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
    known = [*ctx.values["adapter"], *ctx.values["aligned"]]
    if params.variant not in {AUTO, *known}:
        raise InputError(f"params.yaml: release.variant: no variant {params.variant!r}", f"{AUTO}, or one of {', '.join(known)}")


def run(ctx: StageContext) -> Report:
    merged = {
        name: ctx.outputs_of(folder) / name
        for section, folder in (("adapter", "merged"), ("aligned", "merged_aligned"))
        for name in ctx.values[section]
    }
    trained = {f"{name}@{variant}": ctx.outputs_of(name) / variant for name in ("adapter", "aligned") for variant in ctx.values[name]}
    trained["reward_model"] = ctx.output_of("reward_model")
    return produce(ctx.params("release", Params), ctx.compute, ctx.output_of("comparison"), merged, trained, ctx.reports(), out=ctx.out)


def produce(
    params: Params,
    compute: Compute,
    comparison: Path,
    merged: Mapping[str, Path],
    trained: Mapping[str, Path],
    reports: Mapping[str, Mapping[str, Any]],
    out: Path,
) -> Report:
    """Args:
    merged: variant -> the folder of its stand-alone model.
    trained: stage that trains (adapter@lora) -> its output.
    reports: every stage before this one -> its report, in flow order.
    """
    board = json.loads((comparison / "comparison.json").read_text(encoding="utf-8"))
    recommended = board["recommended"]
    variant = recommended["variant"] if params.variant == AUTO else params.variant
    if variant is None:
        note = f"comparison recommends no variant: {recommended['why']} To release one anyway, name it in release.variant"
        return Report(checks=[CheckResult("better_than_baselines", passed=False, blocking=True, count=1, note=note)])
    shutil.copytree(merged[variant], out, dirs_exist_ok=True)
    compared = board["compared"][variant]
    found = {
        "better_than_baselines": _better(board["shown"][0], compared, board["test"]),
        "kept_its_knowledge": _kept(compared.get("retention", {}), params.max_forgetting),
        "test_is_unseen": _unseen(board["test"]),
        "loads_in_transformers": _loads(out, merged[variant], compute),
    }
    checks = [_judged(name, what, params) for name, what in found.items()]
    names = [waiver.check for waiver in params.waivers]
    document = {
        "variant": variant,
        "recommended": recommended,
        "checks": {check.name: {"passed": check.passed, "note": check.note} for check in checks},
        "waivers": [waiver.model_dump(mode="json") for waiver in params.waivers],
        "scores": board["scores"].get(variant, {}),
        "costs": board["costs"][variant],
        "files": {str(path.relative_to(out)): sha256_of_file(path) for path in sorted(out.rglob("*")) if path.is_file()},
    }
    write_json(out / "release.json", document)
    _papers(variant, trained, reports, out)
    shown = {name: document["scores"][name] for name in board["shown"] if name in document["scores"]}
    waived = [check.name for check in checks if not check.passed and check.name in names]
    return Report(metrics={"variant": variant, **shown, "waived": waived, "files": document["files"]}, checks=checks)


def _papers(variant: str, trained: Mapping[str, Path], reports: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """The model card, and under audit/ what the model was made from: the record, and of each training the records it took, in the order seen."""
    found = from_reports("release", reports, variant)
    write_text(out / "README.md", model_card(found))
    write_json(out / "audit" / "audit.json", found)
    for name in (name for name in found["stages"] if name in trained):
        for file in EVIDENCE:
            if (source := trained[name] / file).is_file():
                target = out / "audit" / name.replace("@", "_") / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


@dataclass(frozen=True)
class _Found:
    """What a check saw, and what mends it where it failed."""

    passed: bool
    note: str
    mend: str = ""


def _judged(name: str, found: _Found, params: Params) -> CheckResult:
    """It blocks where it fails, unless somebody has said why it may: then it is a warning that says so."""
    if found.passed:
        return CheckResult(name, passed=True, blocking=True, note=found.note)
    waiver = next((waiver for waiver in params.waivers if waiver.check == name), None)
    if waiver:
        note = f"{found.note}; waived until {waiver.expires}: {waiver.reason}"
        return CheckResult(name, passed=False, severity="warn", count=1, waived=1, note=note)
    note = f"{found.note}; {found.mend}, or waive the check in release.waivers"
    return CheckResult(name, passed=False, blocking=True, count=1, note=note)


def _better(decides: str, compared: Mapping[str, Any], test: Mapping[str, int]) -> _Found:
    gained = gain(decides, compared, test)
    if gained is None:
        return _Found(False, "nothing was compared: it has neither answers nor a perplexity", "name test examples that can be answered")
    if not gained.enough:
        words = f"nothing can be concluded from {gained.examples} test examples, {FEWEST} are needed: {gained.words}"
        return _Found(False, words, "add examples, or raise splits.test or evaluation.max_examples")
    if gained.sure:
        return _Found(True, gained.words)
    instead = NAMES.get(gained.rival, "the base model")
    return _Found(False, f"not surely better: {gained.words}", f"use {instead}, improve the variant")


def _kept(retention: Mapping[str, Any], most: float) -> _Found:
    """Nothing measured is nothing shown."""
    if not retention:
        return _Found(False, "not measured", "name a benchmark in evaluation.benchmarks")
    questions, gained = retention["overall"]["questions"], retention["overall"]["accuracy"]["difference"]
    words = f"{100 * gained:+.1f} points on {questions} benchmark questions, and at most {100 * most:.1f} may be lost"
    return _Found(gained >= -most, words, "lower the learning rate, the epochs or the rank, or replay general examples (tokenized.replay)")


def _unseen(test: Mapping[str, int]) -> _Found:
    words = f"{test['seen']} of {test['examples']} test examples have a near-copy in what was trained on"
    return _Found(test["examples"] > 0 and not test["seen"], words, "split again")


def _loads(folder: Path, merged: Path, compute: Compute) -> _Found:
    """Greedy tokens of the released folder, loaded as anybody would, beside those of the merged model, loaded as `evaluation` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.methods.load import load

    prepare(compute)
    another = "name another variant in release.variant"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return _Found(False, f"weights that are no safetensors: {', '.join(pickled)}", another)
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return _Found(False, "it does not stand alone: it is an adapter that was not merged, or a classifier's head", another)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        return _Found(False, f"transformers does not load it: {' '.join(str(error).split())[:300]}", another)

    def said(asked: Any) -> list[list[int]]:
        prompts = [[{"role": "user", "content": text}] for text in PROBES]
        ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_tensors="pt", return_dict=True) for p in prompts]
        with torch.inference_mode():
            return [asked.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist() for one in ids]

    found = said(model)
    del model
    if found == said(load(merged, None, torch.device("cpu"), torch.float32)):
        return _Found(True, "the same greedy tokens as merged")
    return _Found(False, "its greedy tokens are not those of merged", another)
