"""params.yaml is validated on input: every mistake is reported with its place, all at once."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, inside, parse
from dagster_project.core.text import NAMES
from dagster_project.curation.sources.reading import locate
from dagster_project.evaluation.evaluator import BASE
from dagster_project.pipeline import validate
from dagster_project.stages import raw_examples, raw_preferences, splits, tokenized
from dagster_project.training.trainers.harness.params import AdapterParams


def refused(call: Any, *arguments: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return caught.value


def test_an_absent_section_means_all_defaults() -> None:
    assert parse(Compute, None, "compute") == Compute()


def test_a_valid_section_is_taken_as_written() -> None:
    assert parse(Compute, {"seed": 3, "threads": 1}, "compute") == Compute(seed=3, threads=1)


def test_an_unknown_key_is_refused_and_the_known_ones_listed() -> None:
    error = refused(parse, Compute, {"sead": 3}, "compute")
    assert (error.what, error.hint) == (
        "params.yaml: compute.sead: unknown key",
        "keys of compute: seed, threads, dtype, processes",
    )


def test_a_nested_unknown_key_is_refused_with_the_valid_keys() -> None:
    error = refused(parse, raw_examples.Params, {"sources": [{"path": "a.jsonl", "licens": "MIT"}]}, "raw_examples")
    assert error.what == "params.yaml: raw_examples.sources.0.licens: unknown key"
    assert "license" in error.hint


def test_the_old_spelling_of_license_is_accepted_with_one_hint(caplog: pytest.LogCaptureFixture) -> None:
    params._hint_at_license.cache_clear()
    sources = [{"path": f"{name}.jsonl", "licence": "MIT"} for name in "ab"]
    found = parse(raw_examples.Params, {"sources": sources}, "raw_examples")
    assert [source.license for source in found.sources] == ["MIT", "MIT"]
    assert [record.getMessage() for record in caplog.records] == [
        "params.yaml: the key `licence` is deprecated: write `license`"
    ]


def test_both_spellings_of_license_at_once_are_refused() -> None:
    both = {"sources": [{"path": "a.jsonl", "licence": "MIT", "license": "CC0-1.0"}]}
    assert "licence: unknown key" in refused(parse, raw_examples.Params, both, "raw_examples").what


@pytest.mark.parametrize("value", ["3", 3.5, None, True, [3]])
def test_a_wrong_type_is_refused_and_never_converted(value: Any) -> None:
    error = refused(parse, Compute, {"seed": value}, "compute")
    assert error.what == f"params.yaml: compute.seed: Input should be a valid integer (got {value!r})"


def test_a_missing_key_is_named() -> None:
    assert refused(parse, raw_examples.Params, {}, "raw_examples").what == "params.yaml: raw_examples.sources: missing"


def test_a_rule_across_keys_has_its_own_message() -> None:
    what = refused(parse, splits.Params, {"test": 0.6, "validation": 0.5}, "splits").what
    assert what.startswith("params.yaml: splits: test 0.6 and validation 0.5 leave nothing to train on")


def test_all_mistakes_are_reported_at_once() -> None:
    what = refused(parse, Compute, {"seed": "x", "threads": "y", "sead": 3}, "compute").what
    assert what.splitlines() == [
        "params.yaml: compute.seed: Input should be a valid integer (got 'x')",
        "params.yaml: compute.threads: Input should be a valid integer (got 'y')",
        "params.yaml: compute.sead: unknown key",
    ]


def test_a_section_that_is_not_a_mapping_is_refused() -> None:
    assert refused(parse, Compute, [1], "compute").what.startswith(
        "params.yaml: compute: Input should be a valid dictionary"
    )


def test_a_source_named_twice_is_refused() -> None:
    twice = {"sources": [{"path": "a.jsonl"}, {"path": "a.jsonl"}]}
    assert "a.jsonl is named twice" in refused(parse, raw_examples.Params, twice, "raw_examples").what


@pytest.mark.parametrize(
    ("module", "layout"),
    [(raw_examples, "alpacca"), (raw_examples, "kto"), (raw_preferences, "alpaca"), (raw_preferences, "mapping")],
)
def test_a_format_that_is_none_of_the_layouts_is_refused_before_the_stage_runs(module: ModuleType, layout: str) -> None:
    section = {"sources": [{"path": "a.jsonl", "format": layout}]}
    assert f"unknown format {layout!r}" in refused(parse, module.Params, section, "raw").what
    section = {"sources": [{"path": "a.jsonl", "format": "sharegpt", "mapping": {"prompt": "q", "response": "a"}}]}
    assert "both a format (sharegpt) and a mapping" in refused(parse, raw_examples.Params, section, "raw").what


def test_the_file_is_read_as_plain_data(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("compute: {seed: 3}\nsplits:\n")
    assert params.read(tmp_path) == {"compute": {"seed": 3}, "splits": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no params.yaml in "),
        (b"compute: {seed: 3", "params.yaml is not valid YAML: "),
        (b"seed: 1\nseed: 2\n", "params.yaml is not valid YAML: "),
        (b"- compute\n", "params.yaml must be a mapping of sections"),
        (b"", "params.yaml must be a mapping of sections"),
        (b"compute: {dtype: caf\xe9}\n", "params.yaml is not valid YAML: "),
    ],
    ids=["missing", "unclosed", "key twice", "list", "empty", "not UTF-8"],
)
def test_a_file_without_sections_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "params.yaml").write_bytes(content)
    assert refused(params.read, tmp_path).what.startswith(message)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with one source, beside a file that is none of its business."""
    (tmp_path / "secret.jsonl").write_text("{}")
    sources = tmp_path / "project" / "data" / "sources"
    sources.mkdir(parents=True)
    (sources / "rows.jsonl").write_text("{}")
    return tmp_path / "project"


def test_a_path_inside_the_project_is_resolved(root: Path) -> None:
    assert inside(root, "data/sources/../sources/rows.jsonl", "here") == (root / "data/sources/rows.jsonl").resolve()


def test_a_path_outside_the_project_is_refused(root: Path) -> None:
    for path in ("../secret.jsonl", str(root.parent / "secret.jsonl"), "data/../../secret.jsonl"):
        assert refused(inside, root, path, "here").what == f"params.yaml: here: {path} is outside the project"


def test_a_link_to_a_target_outside_the_project_is_refused(root: Path) -> None:
    (root / "data/sources/link.jsonl").symlink_to(root.parent / "secret.jsonl")
    (root / "data/sources/folder").symlink_to(root.parent)
    for path in ("data/sources/link.jsonl", "data/sources/folder/secret.jsonl"):
        assert refused(inside, root, path, "here").what == f"params.yaml: here: {path} is outside the project"


def test_a_folder_that_merely_begins_with_the_same_name_is_outside(root: Path) -> None:
    (root.parent / "project-old").mkdir()
    assert "is outside" in refused(inside, root, "../project-old", "here").what


def test_a_missing_path_is_refused(root: Path) -> None:
    error = refused(inside, root, "data/sources/none.jsonl", "here")
    assert error.what == "params.yaml: here: data/sources/none.jsonl does not exist"
    assert error.hint


def test_a_source_must_be_a_file_in_the_tracked_folder(root: Path) -> None:
    (root / "data/rows.jsonl").write_text("{}")
    here = ("here", "data/sources")
    assert locate(root, "data/sources/rows.jsonl", *here).name == "rows.jsonl"
    assert "data/rows.jsonl is not inside data/sources/" in refused(locate, root, "data/rows.jsonl", *here).what
    assert "data/sources is a folder" in refused(locate, root, "data/sources", *here).what


@pytest.mark.parametrize("content", ["expires: 2027-02-30", "n: !!int a", "a: [1"])
def test_an_invalid_yaml_value_is_one_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(InputError, match=r"params\.yaml is not valid YAML"):
        params.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "adapter: {16: {}}",
            "adapter: YAML reads the key 16 as int, not as text\nhint: write it in quotes, or rename it",
        ),
        ("adapter: {lora: {null: 1}}", "adapter.lora: YAML reads the key none as NoneType"),
        ("a: [{true: 1}]", "a: YAML reads the key true as bool"),
        ("1: 2", "top level: YAML reads the key 1 as int"),
        ('a: !!int ""', "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
        ("? {a: 1}\n: 2", "is not valid YAML"),
        ("a: &x [1, *x]", "a: an alias contains itself"),
        (f"a: {{b: 0x{'f' * 5000}}}", "a.b: an integer of 20000 bits"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            "params.yaml has 1,234,567,900 values with its aliases written out",
        ),
    ],
    ids=[
        "number",
        "null",
        "truth value",
        "top",
        "empty number",
        "brackets",
        "mapping as key",
        "endless",
        "bits",
        "many",
    ],
)
def test_what_yaml_reads_otherwise_than_meant_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        params.read(tmp_path)
    assert message in str(refused.value) and len(str(refused.value)) < 2_000


def test_an_alias_may_be_used_twice(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: &x {b: 1}\nc: [*x, *x]\n")
    assert params.read(tmp_path) == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_a_wrong_value_is_shortened_in_the_message() -> None:
    nested: Any = [0] * 100
    for _ in range(8):
        nested = [nested] * 100
    with pytest.raises(InputError, match="seed") as refused:
        params.parse(params.Compute, {"seed": nested}, "compute")
    assert len(str(refused.value)) < 100_000


@pytest.mark.parametrize("path", ["loop", "x" * 300, "x/" * 3000, "a\0b"])
def test_a_path_that_cannot_be_one_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(
        InputError, match=r"params.yaml: here: .* is not a path: |here: loop does not exist"
    ):  # a loop, by Python 3.13
        params.inside(tmp_path, path, "here")


@pytest.mark.parametrize("values", [{"threads": 0}, {"threads": -1}, {"seed": -1}, {"seed": 2**32}, {"dtype": "fp16"}])
def test_values_that_would_fail_hours_later_are_refused_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"compute.{next(iter(values))}: Input should be"):
        params.parse(params.Compute, values, "compute")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_are_finite(value: float) -> None:
    """JSON has no others, and a training with one would diverge."""
    with pytest.raises(InputError, match=r"adapter\.x\.(learning_rate|weight_decay): Input should be a finite number"):
        params.parse(AdapterParams, {"method": "lora", "learning_rate": value, "weight_decay": value}, "adapter.x")
    with pytest.raises(InputError, match=r"tokenized\.field_weights\.category: Input should be a finite number"):
        params.parse(tokenized.Params, {"field_weights": {"category": value}}, "tokenized")
    values = params.read(ROOT)
    values["adapter"] = {**values["adapter"], "x": {"method": "lora", "peft": {"lora_dropout": value}}}
    with pytest.raises(InputError, match=r"adapter\.x\.peft\.lora_dropout: Input should be a finite number"):
        validate(ROOT, values)


@pytest.mark.parametrize("section", ["adapter", "aligned"])
@pytest.mark.parametrize("name", [*NAMES, BASE])
def test_a_variant_has_no_name_of_a_system_that_it_is_compared_with(section: str, name: str) -> None:
    """Tables of results name systems: the answers of both would be those of one, and scores of others relative to it
    would be wrong."""
    values = params.read(ROOT)
    values[section] = {**values[section], name: next(iter(values[section].values()))}
    with pytest.raises(InputError, match=rf"params\.yaml: {section}\.{name}: results use this name for .*\n.*rename"):
        validate(ROOT, values)
