"""dvc.yaml, the code and the docs describe the same pipeline."""

from __future__ import annotations

import grimp
import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from dagster_project import pipeline
from dagster_project.orchestration import dvc

GRAPH = grimp.build_graph(
    "dagster_project", exclude_type_checking_imports=True, cache_dir=None
)  # what is imported for types never runs
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def test_dvc_yaml_has_exactly_the_stages_of_the_pipeline_in_flow_order() -> None:
    assert list(STAGES) == list(pipeline.STAGES)


def test_stages_with_variants_are_the_foreach_stages() -> None:
    assert {name: body["foreach"] for name, body in STAGES.items() if "foreach" in body} == {
        name: f"${{{section}}}" for name, section in pipeline.VARIANTS_OF.items()
    }


@pytest.mark.parametrize("name", list(STAGES))
def test_code_dependencies_cover_every_module_the_stage_imports(name: str) -> None:
    module = pipeline.module_of(name).__name__
    packages = {"dagster_project", *(m for m in GRAPH.modules if GRAPH.find_children(m))}
    imported = {f"{m.replace('.', '/')}.py" for m in (GRAPH.find_upstream_modules(module) | {module}) - packages}
    declared = [dep for dep in STAGES[name].get("do", STAGES[name])["deps"] if dvc.is_code(dep)]
    covered = {
        entry: {path for path in imported if path == entry or path.startswith(f"{entry}/")} for entry in declared
    }
    assert imported - set().union(*covered.values()) == set(), "imported, and not covered by dvc.yaml"
    assert [entry for entry, paths in covered.items() if not paths] == [], "in dvc.yaml, and not imported"
    assert not [one for one in declared for other in declared if one.startswith(f"{other}/")], "covered twice"
    assert len(declared) <= 8


def test_dvc_yaml_and_the_registry_of_stages_stay_short() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 300
    assert len((ROOT / "dagster_project" / "pipeline.py").read_text().splitlines()) <= 120


def test_every_stage_has_one_output_and_one_report_in_the_folders_named_after_it() -> None:
    for name, body in STAGES.items():
        stage = body.get("do", body)
        place = f"{name}/${{key}}" if "foreach" in body else name
        assert stage["outs"] == [f"data/{place}"]
        assert stage["metrics"] == [{f"data/reports/{place}.json": {"cache": False}}]


def test_the_readme_names_every_stage_and_every_check() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "checks.md").read_text()
    names = [
        *pipeline.STAGES,
        *(check for stage in pipeline.STAGES for check in pipeline.PEDIGREE.check_descriptions(stage)),
    ]
    assert [name for name in names if f"`{name}" not in text] == []
