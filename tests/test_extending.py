"""docs/extending.md is correct: the files it names exist, and its skeletons run in their modules."""

from __future__ import annotations

import re
import textwrap
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from builders.records import said, stored, user
from conftest import ROOT
from ruamel.yaml import YAML

from dagster_project.core.context import StageContext
from dagster_project.core.records import write_records
from dagster_project.curation.checks import content, row_checks
from dagster_project.curation.sources import layouts
from dagster_project.evaluation import metrics
from dagster_project.training.trainers.alignment import preference

PAGE = (ROOT / "docs/extending.md").read_text()


def skeleton(title: str, module: ModuleType | None = None) -> tuple[dict[str, Any], list[Any]]:
    """The Python of a section: the names it defines, run in a module's namespace, and the entries it adds to tables."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    names, entries = dict(vars(module)) if module else {"__name__": "skeleton"}, []
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        if block.startswith((" ", "Check(", "ContentCheck(")):
            entry = textwrap.dedent(block)
            found = eval(f"{{{entry}}}" if entry.startswith('"') else f"[{entry}]", names)
            entries += found.items() if isinstance(found, dict) else found
        else:
            exec(block, names)
    return names, entries


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:dagster_project|docs|tests)/[\w/.]+)`", PAGE))))
def test_every_file_that_the_page_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_row_check_finds_a_bad_row() -> None:
    _, [check] = skeleton("A row check", row_checks)
    assert check.column(SimpleNamespace(prompts=["WHERE?", "Where?"]), check.name) == [False, True]


def test_the_content_check_finds_a_bad_answer() -> None:
    _, [check] = skeleton("A content check", content)
    assert [check.find(content.Exchange("Hi", said, [], 1)) for said in ("No!!", "No!")] == [
        ("exclamation marks", "!!"),
        None,
    ]


def test_the_layout_reads_a_row() -> None:
    _, [(_, layout)] = skeleton("A source layout", layouts)
    row = {"subject": "Kite", "body": "Where is it?", "reply": "Here.", "system": "Be brief."}
    assert [message["content"] for message in layout.messages(row)] == ["Be brief.", "Kite\n\nWhere is it?", "Here."]
    assert layout.used == row.keys()


def test_the_alignment_method_is_listed_and_has_a_trainer() -> None:
    names, _ = skeleton("An alignment method", preference)
    method = names["METHODS"]["ipo"](beta=0.2)
    assert method.trainer_spec(SimpleNamespace()).arguments == {"beta": 0.2, "loss_type": ["ipo"], "max_length": None}
    assert set(names["METHODS"]) - {"ipo"} == set(preference.METHODS)


def test_the_metric_scores_answers() -> None:
    _, [(name, measure)] = skeleton("A metric", metrics)
    assert metrics.score({name: measure}, ["a b"], ["a b"])[name] == 1.0 and name not in metrics.measures(None, {})


def test_the_export_format_writes_a_text() -> None:
    names, _ = skeleton("An export format")
    summary = {
        "model": {"stage": "merged@lora"},
        "stages": {"splits": {"rows_in": 2, "rows_out": 2}, "merged@lora": {}},
    }
    text = "# merged@lora, issued 2026-01-31\nstage,rows_in,rows_out\nsplits,2,2\nmerged@lora,,\n"
    assert names["flow"](summary, date(2026, 1, 31)) == text


def test_the_stage_runs_and_its_entry_is_like_the_others(tmp_path: Path) -> None:
    names, _ = skeleton("A stage")
    row = stored(user("Hi"), said("Hello you"))
    for split in ("train", "validation", "test"):
        write_records(tmp_path / "data/splits" / split, [row])
    ctx = StageContext(tmp_path, "word_counts", None, tmp_path / "scratch", {})
    report = names["run"](ctx)
    assert report.metrics["words"] == {"train": 2, "validation": 2, "test": 2} and not report.failures
    assert [check.name for check in report.checks] == list(names["CHECK_DESCRIPTIONS"])
    [entry] = YAML(typ="safe").load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]).values()
    assert list(entry) == list(YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]["tokenized"])
