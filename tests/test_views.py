"""Pages are drawn from documents: an edit of a page or of the memory prediction makes nothing stale, and pages can be drawn again without a run."""

from __future__ import annotations

import json
from pathlib import Path

import grimp
import pytest
from conftest import ROOT, pedigree
from street import changed_in_dvc

from dagster_project import pipeline
from dagster_project.training.trainers.checkpoint import code_of

PACKAGE = ROOT / "dagster_project"
DRAWN_OR_PLANNED = [*sorted((PACKAGE / "views").rglob("*")), *sorted((PACKAGE / "training" / "planning").iterdir())]
FILES = [path.relative_to(ROOT) for path in DRAWN_OR_PLANNED if path.is_file() and path.suffix != ".pyc"]


@pytest.mark.parametrize("stage", list(pipeline.STAGES))
def test_a_stage_reaches_no_view_and_no_planner_by_its_imports(stage: str) -> None:
    graph = grimp.build_graph("dagster_project")
    reached = graph.find_upstream_modules(pipeline.module_of(stage).__name__)
    assert [m for m in reached if m.startswith(("dagster_project.views", "dagster_project.training.planning"))] == []


def test_an_edit_of_any_view_or_planner_leaves_dvc_clean_and_the_identity_of_a_checkpoint_as_it_was(finished: Path) -> None:
    assert changed_in_dvc(finished) == set()
    package = finished / "dagster_project"

    def identities() -> list[list[bytes]]:
        return [
            [path.read_bytes() for path in code_of(package / "stages" / f"{stage}.py", package)]
            for stage in ("adapter", "reward_model", "aligned")
        ]

    before = identities()
    for file in FILES:
        comment = {".css": "/* edited */", ".js": "/* edited */", ".jinja": "{# edited #}"}.get(file.suffix, "# edited")
        with (finished / file).open("a") as opened:
            opened.write(f"\n{comment}\n")
    assert identities() == before
    assert changed_in_dvc(finished) == set()


def test_pages_are_drawn_again_without_running_anything(finished: Path) -> None:
    pages = sorted((finished / "data/pages").rglob("*.html"))
    names = {
        str(page.relative_to(finished / "data/pages")) for page in pages if page.name != "audit.html" and "data_docs" not in page.parts
    }
    expected = {
        "instructions/report.html", "preferences/report.html", "adapter/lora/training.html", "aligned/dpo/alignment.html",
        "comparison/comparison.html",
    }  # fmt: skip
    assert names == expected
    before = {name: (finished / "data/pages" / name).read_bytes() for name in names}
    for name in names:
        (finished / "data/pages" / name).unlink()
    lock = (finished / "dvc.lock").read_bytes()
    done = pedigree(finished, "render", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["pages"]) == {f"data/pages/{name}" for name in names} and result["skipped"] == {}
    assert {name: (finished / "data/pages" / name).read_bytes() for name in names} == before
    assert (finished / "dvc.lock").read_bytes() == lock and changed_in_dvc(finished) == set()


def test_rendering_names_what_it_cannot_draw(finished: Path) -> None:
    (finished / "data/pages/comparison/samples.json").unlink()
    done = pedigree(finished, "render", "comparison", "--json")
    assert done.returncode == 0
    assert "not on this machine" in json.loads(done.stdout)["skipped"]["comparison"]
    for stage, message in (("splits", "splits has no pages"), ("nothing", "nothing is not a stage of dvc.yaml")):
        refused = pedigree(finished, "render", stage)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
