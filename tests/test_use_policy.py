"""The use policy: each rule allows and refuses, names sources and rows, warns
where sources are read, and blocks a release unless it is waived."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.history import Project, md5
from builders.small_pipeline import PIPELINE, published
from conftest import dvc, pedigree
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.context import StageContext
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.params import Compute, parse
from dagster_project.core.records import Report, write_json
from dagster_project.curation.sources import use_policy
from dagster_project.curation.sources.use_policy import Policy, allows, judge
from dagster_project.lineage.lineage import as_text, audit
from dagster_project.orchestration.dagster.metadata import check_metadata
from dagster_project.orchestration.dvc import ALWAYS, read_stages
from dagster_project.orchestration.run_stage import _refuse_outdated, run_stage
from dagster_project.pipeline import PEDIGREE
from dagster_project.stages import raw_examples, release
from dagster_project.stages.release import Waiver
from dagster_project.views.lineage import lineage_page

pytestmark = pytest.mark.usefixtures("warm_small")

A, B, PAIRS = "data/sources/a.jsonl", "data/sources/b.jsonl", "data/sources/pairs.jsonl"
KEY = bytes(range(32))


def policy(**rules: Any) -> Policy:
    return parse(Policy, rules, "raw_examples.use_policy")


def source(rows: int = 10, license: str = "MIT", **declared: Any) -> dict[str, Any]:
    return {
        "rows": rows,
        "format": "messages",
        "license": license,
        "sha256": "0" * 64,
        **({"declared": declared} if declared else {}),
    }


def refused(rules: dict[str, Any], *sources: dict[str, Any], base: str = "Apache-2.0") -> list[tuple[str, int, str]]:
    """Name, rows and rule of each violation; the sources are named by their index."""
    reports = [
        {"origin": "org/base", "license": base, "sha256": {}},
        {"sources": {str(i): one for i, one in enumerate(sources)}},
    ]
    return [(one["source"], one["rows"], one["rule"]) for one in judge(policy(**rules), reports)["violations"]]


@pytest.mark.parametrize(
    ("license", "allowed", "expected"),
    [
        ("MIT", ["MIT"], True),
        ("mit", ["MIT"], True),
        ("apache-2.0", ["MIT"], False),
        ("MIT OR GPL-3.0-only", ["MIT"], True),
        ("MIT AND GPL-3.0-only", ["MIT"], False),
        ("MIT AND GPL-3.0-only", ["GPL-3.0-only", "MIT"], True),
        ("(MIT OR Apache-2.0) AND CC-BY-4.0", ["Apache-2.0", "CC-BY-4.0"], True),
        ("(MIT OR Apache-2.0) AND CC-BY-4.0", ["Apache-2.0", "MIT"], False),
        ("MIT AND (GPL-3.0-only OR CC0-1.0)", ["MIT", "CC0-1.0"], True),
        ("GPL-2.0", ["GPL-2.0-only"], True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only WITH Classpath-exception-2.0"], True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only"], False),
        ("GPL-2.0-only", ["GPL-2.0-only WITH Classpath-exception-2.0"], False),
        ("MIT AND GPL-3.0-only", ["GPL-3.0-only AND MIT"], True),
        ("MIT", ["GPL-3.0-only AND MIT"], False),
        ("LicenseRef-ours", ["LicenseRef-ours"], True),
        ("LicenseRef-theirs", ["LicenseRef-ours"], False),
        ("unknown", ["MIT"], False),
        ("", ["MIT"], False),
        ("proprietary", ["MIT"], False),
        ("MIT or so", ["MIT"], False),
        ("MIT AND", ["MIT"], False),
        ("MIT, GPL-3.0-only", ["MIT"], False),
        ("(" * 5000 + "MIT" + ")" * 5000, ["MIT"], False),
        ("(" * 400 + "MIT" + ")" * 400, ["MIT"], True),
        ("MIT", [], False),
    ],
)
def test_a_license_is_allowed_if_its_expression_is_satisfied(license: str, allowed: list[str], expected: bool) -> None:
    assert allows(allowed, license) is expected
    for rule, place in (("licenses", "0"), ("base_licenses", "base model")):
        found = refused({rule: allowed}, source(license=license if place == "0" else "MIT"), base=license)
        assert found == ([] if expected else [(place, 10 if place == "0" else 0, rule)])


NAMES = ["MIT", "Apache-2.0", "CC-BY-4.0", "GPL-3.0-only"]
trees = st.recursive(
    st.sampled_from(NAMES), lambda inner: st.tuples(st.sampled_from(["AND", "OR"]), inner, inner), max_leaves=6
)


@given(trees, st.sets(st.sampled_from(NAMES)))
@settings(max_examples=60, deadline=None)
def test_expressions_are_read_as_their_truth_tables(tree: Any, allowed: set[str]) -> None:
    def text(one: Any) -> str:
        return one if isinstance(one, str) else f"({text(one[1])} {one[0]} {text(one[2])})"

    def true(one: Any) -> bool:
        if isinstance(one, str):
            return one in allowed
        return all(map(true, one[1:])) if one[0] == "AND" else any(map(true, one[1:]))

    assert allows(sorted(allowed), text(tree)) is true(tree)


@pytest.mark.parametrize(
    ("rules", "declared", "rule"),
    [
        ({"require_permission": True}, {"permission": "contract 17"}, None),
        ({"require_permission": True}, {}, "require_permission"),
        ({"require_permission": False}, {}, None),
        ({"purposes": ["support"]}, {"purposes": ["evaluation", "support"]}, None),
        ({"purposes": ["support", "sales"]}, {"purposes": ["support"]}, "purposes"),
        ({"purposes": ["support"]}, {"purposes": []}, "purposes"),
        ({"purposes": ["support"]}, {}, "purposes"),
        ({"purposes": []}, {}, None),
        ({"as_of": "2027-01-30"}, {"retain_until": "2027-01-31"}, None),
        ({"as_of": "2027-01-31"}, {"retain_until": "2027-01-31"}, None),
        ({"as_of": "2027-02-01"}, {"retain_until": "2027-01-31"}, "retain_until"),
        ({}, {"retain_until": "2999-01-01"}, "retain_until"),
        ({"as_of": "2999-01-01"}, {}, None),
        ({"max_synthetic": 0.0}, {"category": "synthetic"}, "max_synthetic"),
        ({"max_synthetic": 0.0}, {"category": "public", "generator": "Some model"}, "max_synthetic"),
        ({"max_synthetic": 0.0}, {"category": "public"}, None),
        ({"max_synthetic": 0.0}, {}, "max_synthetic"),
        ({"max_synthetic": 1.0}, {"category": "synthetic"}, None),
        ({}, {}, None),
    ],
)
def test_each_rule_allows_and_refuses(rules: dict[str, Any], declared: dict[str, Any], rule: str | None) -> None:
    assert refused(rules, source(**declared)) == ([("0", 10, rule)] if rule else [])


@pytest.mark.parametrize("seed", range(20))
def test_rows_and_shares_are_those_of_an_independent_count(seed: int) -> None:
    dice = random.Random(seed)
    kinds = [("synthetic", True), ("public", False), (None, True), ("user", False)]
    chosen = [(dice.randint(0, 50), *dice.choice(kinds), dice.choice(["MIT", "GPL-3.0-only"])) for _ in range(12)]
    sources = [
        source(rows, license, **({"category": category} if category else {})) for rows, category, _, license in chosen
    ]
    total, artificial = sum(rows for rows, *_ in chosen), sum(rows for rows, _, counts, _ in chosen if counts)
    reports = [{"sources": {str(i): one}} for i, one in enumerate(sources)]
    for percent in (0, 29, 50, 100, round(100 * artificial / total)):
        verdict = judge(policy(licenses=["MIT"], max_synthetic=percent / 100), reports)
        too_many = Fraction(artificial) > Fraction(percent, 100) * total
        violating = [
            i
            for i, (rows, _, counts, license) in enumerate(chosen)
            if license != "MIT" or (too_many and counts and rows)
        ]
        assert {int(one["source"]) for one in verdict["violations"]} == set(violating)
        assert (verdict["rows"], verdict["refused_rows"]) == (total, sum(chosen[i][0] for i in violating))
        assert verdict["synthetic"]["rows"] + verdict["synthetic"]["unknown"] == artificial


def test_the_share_at_the_border_is_exact() -> None:
    sources = source(29, category="synthetic"), source(71, category="user")
    assert refused({"max_synthetic": 0.29}, *sources) == []  # 0.29 * 100 < 29 in floating point
    assert refused({"max_synthetic": 0.28}, *sources) == [("0", 29, "max_synthetic")]


def test_a_verdict_names_only_what_is_violated_and_counts_synthetic_rows() -> None:
    rules = policy(licenses=["MIT"], base_licenses=["MIT"])
    for base, license, words in (
        ("GPL-3.0-only", "MIT", "the base model is not allowed"),
        ("MIT", "GPL-3.0-only", "sources with 10 of 10 rows are not allowed"),
        ("GPL-3.0-only", "GPL-3.0-only", "sources with 10 of 10 rows and the base model are not allowed"),
    ):
        verdict = judge(
            rules, [{"origin": "org/base", "sha256": {}, "license": base}, {"sources": {A: source(10, license)}}]
        )
        assert use_policy.lines(verdict)[0] == f"not passed: {words}"
    [violation] = judge(policy(max_synthetic=0.1), [{"sources": {A: source(10)}}])["violations"]
    assert (
        violation["why"]
        == "of unknown category, which counts as synthetic: 10 of 10 rows count as synthetic, at most 10 % are allowed"
    )


def test_a_source_that_two_stages_read_is_judged_by_what_each_declares_and_its_rows_count_twice() -> None:
    reports = [{"sources": {A: source(10, "GPL-3.0-only")}}, {"sources": {A: source(4, "MIT")}}]
    for order in (reports, reports[::-1]):
        verdict = judge(policy(licenses=["MIT"]), order)
        assert [(one["source"], one["rows"]) for one in verdict["violations"]] == [(A, 10)]
        assert (verdict["rows"], verdict["refused_rows"]) == (14, 10)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"license": ["MIT"]}, "raw_examples.use_policy.license: unknown key"),
        (
            {"licenses": ["Apache 2"]},
            "raw_examples.use_policy.licenses.0: not an SPDX license or expression; for"
            " terms of your own write LicenseRef-NAME",
        ),
        ({"base_licenses": ["MIT AND"]}, "raw_examples.use_policy.base_licenses.0: not an SPDX license or expression"),
        ({"licenses": "MIT"}, "raw_examples.use_policy.licenses: Input should be a valid list"),
        ({"max_synthetic": 1.5}, "raw_examples.use_policy.max_synthetic: Input should be less than or equal to 1"),
        ({"as_of": "today"}, "raw_examples.use_policy.as_of: not a date: write YYYY-MM-DD, in quotes"),
        (
            {"as_of": date(2027, 1, 1)},
            'raw_examples.use_policy.as_of: DVC cannot parse YAML dates: quote the value: "2027-01-01"',
        ),
        ({"require_permission": "yes"}, "raw_examples.use_policy.require_permission: Input should be a valid boolean"),
    ],
)
def test_a_mistake_in_the_policy_names_the_key_and_what_is_allowed(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as wrong:
        parse(raw_examples.Params, {"sources": [{"path": A}], "use_policy": rules}, "raw_examples")
    assert message in wrong.value.what and wrong.value.hint
    if "license" in rules:
        assert all(name in wrong.value.hint for name in Policy.model_fields)


def read(root: Path, **section: Any) -> Report:
    sources = [{"path": A, "license": "MIT"}, {"path": B, "license": "GPL-3.0-only"}]
    return raw_examples.produce(
        root, parse(raw_examples.Params, {"sources": sources, **section}, "raw_examples"), root / "out"
    )


def test_reading_warns_names_sources_and_rows_and_changes_no_row(tmp_path: Path) -> None:
    jsonl(tmp_path / A, *[{"prompt": f"Hi {i}", "completion": "Hello"} for i in range(3)])
    jsonl(tmp_path / B, *[{"prompt": f"Ho {i}", "completion": "Hey"} for i in range(5)])
    plain = read(tmp_path)
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    check = plain.checks[-1]
    assert (check.name, check.passed, check.note) == (
        "use_policy",
        True,
        "no use policy is given (raw_examples.use_policy)",
    )
    assert set(plain.metrics) == {"sources"}
    report = read(tmp_path, use_policy={"licenses": ["MIT"], "base_licenses": ["MIT"], "as_of": "2027-01-01"})
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    check = report.checks[-1]
    assert (check.passed, check.severity, check.blocking, check.count) == (
        False,
        "warn",
        False,
        5,
    ) and not report.failures
    assert check.note == f"{B} (5 rows): license GPL-3.0-only is not allowed"
    rules = {"licenses": ["MIT"], "base_licenses": ["MIT"], "as_of": "2027-01-01"}
    assert report.metrics == {**plain.metrics, "use_policy": rules}
    passed = read(tmp_path, use_policy={"licenses": ["MIT", "GPL-3.0-only"], "as_of": "2027-01-01"}).checks[-1]
    assert (passed.passed, passed.count, passed.note) == (True, 0, "2 sources with 8 rows, as of 2027-01-01")
    [row] = check_metadata(tmp_path, "raw_examples", report.document()["checks"]["use_policy"])["violations"].records
    assert row.data == {"source": B, "rows": 5, "rule": "licenses", "why": "license GPL-3.0-only is not allowed"}


def board(variant: str) -> dict[str, Any]:
    against = {"few_shot": {"macro_f1": {"difference": 0.2, "interval": [0.1, 0.3]}}}
    compared = {"to": against, "retention": {"overall": {"questions": 60, "accuracy": {"difference": 0.0}}}}
    return {
        "test": {"examples": 90, "answered": 90, "seen": 0},
        "shown": ["macro_f1"],
        "scores": {variant: {"n": 90, "macro_f1": 0.8}},
        "costs": {variant: {"bytes": 7}},
        "compared": {variant: compared},
        "recommended": {"variant": variant, "sure": True, "instead": "few_shot", "why": "It is better."},
    }


def reports(rules: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Of all stages before `release`: `lora` is tuned, `dpo` is also aligned to pairs."""
    stated = {} if rules is None else {"use_policy": policy(**rules).given}
    return {
        "base_model": {"origin": "org/base", "license": "Apache-2.0", "sha256": {}},
        "raw_examples": {
            "sources": {A: source(12, "MIT"), B: source(30, "Apache-2.0", category="synthetic")},
            **stated,
        },
        "splits": {"sources": {"data/sources/paraphrases/p.jsonl": source(5, "Apache-2.0")}},
        "adapter@lora": {"environment": {}},
        "raw_preferences": {"sources": {PAIRS: source(7, "CC-BY-NC-4.0")}},
        "aligned@dpo": {"environment": {}, "adapter": "lora", "method": "dpo"},
    }


def promote(out: Path, model: Path, rules: dict[str, Any] | None, variant: str = "lora", **section: Any) -> Report:
    write_json(out.parent / "comparison" / "comparison.json", board(variant))
    return release.produce(
        release.Params(**section),
        Compute(threads=1),
        out.parent / "comparison",
        {variant: model},
        {},
        reports(rules),
        KEY,
        out,
    )


LICENSES = ["MIT", "Apache-2.0"]


def test_a_violation_blocks_the_release_unless_it_is_waived_with_reason_and_expiry(
    tiny_model: Path, tmp_path: Path
) -> None:
    rules = {"licenses": ["MIT"], "as_of": "2027-01-31"}
    report = promote(tmp_path / "a" / "out", tiny_model, rules)
    [failed] = report.failures
    assert (failed.name, failed.count) == ("use_policy", 35) and failed.note.startswith(
        f"{B} (30 rows): license Apache-2.0 is not allowed; data/sources/paraphrases/p.jsonl (5 rows): license"
        " Apache-2.0 is not allowed; use other"
    )
    assert (
        "- data/sources/b.jsonl (30 rows): license Apache-2.0 is not allowed"
        in (tmp_path / "a/out/README.md").read_text()
    )
    waiver = Waiver(check="use_policy", reason="asked the owners", expires="2027-01-31")  # type: ignore[arg-type]
    report = promote(tmp_path / "b" / "out", tiny_model, rules, waivers=[waiver])
    [waived] = [check for check in report.checks if not check.passed and check.name == "use_policy"]
    assert (
        not report.failures
        and (waived.severity, waived.waived) == ("warn", 35)
        and "use_policy" in report.metrics["waived"]
    )
    assert "- waived until 2027-01-31: asked the owners" in (tmp_path / "b/out/README.md").read_text()
    provenance = json.loads((tmp_path / "b/out/audit/audit.json").read_text())["use_policy"]
    assert (
        provenance["policy"] == rules
        and provenance["waiver"]["reason"] == "asked the owners"
        and provenance["refused_rows"] == 35
    )
    record = json.loads((tmp_path / "b/out/release.json").read_text())
    assert record["checks"]["use_policy"]["passed"] is False and record["waivers"][0]["check"] == "use_policy"


def test_only_what_the_released_model_learned_from_counts(tiny_model: Path, tmp_path: Path) -> None:
    assert not promote(tmp_path / "a" / "out", tiny_model, {"licenses": LICENSES}).failures, "lora learned from no pair"
    [failed] = promote(tmp_path / "b" / "out", tiny_model, {"licenses": LICENSES}, "dpo").failures
    assert failed.note.startswith(f"{PAIRS} (7 rows): license CC-BY-NC-4.0 is not allowed; use other")
    check = next(one for one in promote(tmp_path / "c" / "out", tiny_model, None).checks if one.name == "use_policy")
    assert (
        check.passed
        and check.note == use_policy.NO_POLICY
        and "use policy" not in (tmp_path / "c/out/README.md").read_text()
    )


@pytest.fixture
def gate(root: Path, tiny_model: Path) -> Callable[[dict[str, Any]], None]:
    """Runs the last stage of the small pipeline as `release` runs, with a policy."""

    def run(rules: dict[str, Any]) -> None:
        def as_release(ctx: StageContext) -> Report:
            return promote(ctx.out, tiny_model, rules)

        run_stage(root, "cmp", replace(PIPELINE, stages={**PIPELINE.stages, "cmp": as_release}))

    return run


def test_the_gate_publishes_no_release_that_the_policy_refuses(
    root: Path, gate: Callable[[dict[str, Any]], None]
) -> None:
    before = published(root, "cmp")
    with pytest.raises(
        CheckFailed,
        match=rf"1 blocking check\(s\) failed. use_policy: {B} \(30 rows\): license Apache-2.0 is not allowed",
    ):
        gate({"licenses": ["MIT"]})
    after = published(root, "cmp")
    report = json.loads(after.pop("data/reports/cmp.json"))
    assert report["passed"] is False and report["checks"]["use_policy"]["blocking"] is True
    before.pop("data/reports/cmp.json")
    assert after == before
    gate({"licenses": LICENSES})
    assert "data/cmp/release.json" in published(root, "cmp")


@pytest.mark.long
def test_with_a_policy_the_release_waits_for_all_stages_before_it(root: Path) -> None:
    """Else it would judge reports on other data than the model was made from."""
    assert (
        PEDIGREE.rests_on_all == {"release": "raw_examples.use_policy"}
        and "use_policy" in raw_examples.Params.model_fields
    )
    script = root / "small_pipeline.py"
    loose = script.read_text()
    script.write_text(loose.replace("    _values,\n)", '    _values,\n    rests_on_all={"cmp": "testseed"},\n)'))
    assert script.read_text() != loose
    (root / "code/cmp.py").write_text("V = 1\n")
    assert dvc(root, "repro", "--single-item", "cmp").returncode == 0, "all stages before it are up to date"
    before = published(root, "cmp")
    (root / "data/sources/g.txt").write_text("r1")
    (root / "code/cmp.py").write_text("V = 2\n")
    assert dvc(root, "repro", "--single-item", "raw").returncode == 0
    refused = dvc(root, "repro", "--single-item", "cmp")
    assert (
        refused.returncode
        and "not up to date:\ninst: data/raw changed" in refused.stderr
        and "run `dvc repro cmp`" in refused.stderr
    )
    assert published(root, "cmp") == before
    assert dvc(root, "repro", "cmp").returncode == 0 and published(root, "cmp") != before
    (root / "data/sources/g.txt").write_text("r2")
    script.write_text(loose.replace("    _values,\n)", '    _values,\n    rests_on_all={"cmp": "use_policy"},\n)'))
    (root / "code/cmp.py").write_text("V = 3\n")
    assert dvc(root, "repro", "--single-item", "cmp").returncode == 0, "without a policy nothing changes"


def test_a_release_does_not_wait_for_a_stage_that_dvc_runs_each_time(root: Path) -> None:
    """Its output is as recorded, and `dvc repro` could not bring it further up to date."""
    pipeline = json.loads((root / "dvc.yaml").read_text())
    pipeline["stages"]["raw"]["always_changed"] = True
    (root / "dvc.yaml").write_text(json.dumps(pipeline))
    assert read_stages(root)["raw"].changed == [ALWAYS]
    _refuse_outdated(root, "cmp")
    (root / "data/sources/g.txt").write_text("r3")
    with pytest.raises(CheckFailed, match=r"raw: always changed; data/sources/g\.txt changed"):
        _refuse_outdated(root, "cmp")


def judged_history(tmp_path: Path) -> Project:
    """A model whose `instructions` read two sources, one until the end of
    January 2027, with a policy as of the first."""
    made = Project(tmp_path / "project")
    lock = made.curated([("cats", "train", A), ("dogs", "train", B)])
    path = made.root / "data/reports/instructions.json"
    report = json.loads(path.read_text())
    report["sources"][B]["declared"] = {"retain_until": "2027-01-31"}
    report["use_policy"] = {"as_of": "2027-01-01", "licenses": ["MIT"]}
    path.write_text(json.dumps(report))
    lock["instructions"]["outs"][1]["md5"] = md5(path.read_bytes())
    made.commit(made.trained(lock, ["cats", "dogs"]))
    return made


def test_an_audit_judges_the_models_own_runs_and_for_another_day_if_asked(tmp_path: Path) -> None:
    made = judged_history(tmp_path)
    (made.root / "data/reports/instructions.json").write_text("{}")
    document = audit(made.root, "merged@lora")
    assert document["use_policy"][
        "violations"
    ] == [] and "use policy passed: 2 sources with 2 rows, as of 2027-01-01" in as_text(document)
    assert "passed, as of 2027-01-01" in lineage_page(document, [])
    for day, code in (("2027-01-31", 0), ("2027-02-01", 1)):
        done = pedigree(made.root, "audit", "merged@lora", "--as-of", day, "--json")
        [*violations] = json.loads(done.stdout)["use_policy"]["violations"]
        assert (done.returncode, [one["source"] for one in violations]) == (code, [B] * code)
    text = pedigree(made.root, "audit", "merged@lora", "--as-of", "2027-02-01").stdout
    assert f"use policy {B} (1 row): may be used until 2027-01-31, and the policy is judged as of 2027-02-01" in text


def test_a_day_without_a_policy_is_refused(tmp_path: Path) -> None:
    made = Project(tmp_path / "project")
    made.commit(made.trained(made.curated([("cats", "train", A)]), ["cats"]))
    done = pedigree(made.root, "audit", "merged@lora", "--as-of", "2027-02-01")
    assert (
        done.returncode == 2
        and "its data was read without a use policy" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_waiver_counts_until_its_last_day() -> None:
    stated = [{"sources": {A: source(license="GPL-3.0-only")}, "use_policy": {"licenses": ["MIT"]}}]
    waivers = [
        {"check": "use_policy", "reason": "asked", "expires": "2027-01-31"},
        {"check": "pii", "reason": "x", "expires": "2999-01-01"},
    ]
    stated[0]["use_policy"]["as_of"] = (
        "2027-06-01"  # the gate takes a waiver until its own last day, whatever the policy is judged for
    )
    days = {None: True, date(2027, 1, 31): True, date(2027, 2, 1): False}
    assert {day: "waiver" in use_policy.judged(stated, waivers, day)["use_policy"] for day in days} == days
    assert use_policy.judged([{"sources": {}}], waivers) == {}
