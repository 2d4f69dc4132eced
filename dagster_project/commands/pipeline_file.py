"""dvc.yaml of a project with an installed package, written from that of the
clone: stages depend on their entries of code.lock.yaml instead of on files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from dagster_project import __version__
from dagster_project.commands.adapter_reads import listed, write_with_its_line_ends
from dagster_project.core import params
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.layout import is_code
from dagster_project.lineage import code_lock
from dagster_project.lineage.code_lock import CodeLock
from dagster_project.optional_stages import OPTIONAL

KEEP = ".gitkeep"
"""File by which git keeps an empty folder."""
HEADER = """\
# The pipeline, written by `pedigree init`. `dvc repro` runs what has changed; Dagster's assets are derived from it.
# Stages depend on their entries of code.lock.yaml, i.e. on the code of the installed package that they use.
# `pedigree upgrade` updates both files.

"""


def pipeline_text(without: Collection[str] = ()) -> str:
    """Content of dvc.yaml.

    Args:
        without: stages to leave out, of `OPTIONAL`.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    yaml = YAML()
    yaml.width = 120
    template = code_lock.TEMPLATE.read_text(encoding="utf-8")
    document = yaml.load(template[template.index("\nplots:") + 1 :])
    for name in without:
        _leave_out(document, name)
    for name, body in document["stages"].items():
        stage = body.get("do", body)
        for index in reversed([i for i, dep in enumerate(stage["deps"]) if is_code(dep)]):
            del stage["deps"][index]
        if not stage["deps"]:
            del stage["deps"]
        entry = CommentedMap({code_lock.FILE: CommentedSeq([name])})
        entry.fa.set_flow_style()
        entry[code_lock.FILE].fa.set_flow_style()
        stage["params"].append(entry)
    text = StringIO()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(document, text)
    return HEADER + text.getvalue()


def _leave_out(document: Any, name: str) -> None:
    """Remove a stage, and what names its output and report, from the content of dvc.yaml."""
    gone = {f"data/{name}", f"data/reports/{name}.json"}
    del document["stages"][name]
    for key in [key for key, model in document["artifacts"].items() if model["path"] in gone]:
        del document["artifacts"][key]
    for body in document["stages"].values():
        deps = body.get("do", body).get("deps", [])
        for index in reversed([i for i, dep in enumerate(deps) if dep in gone]):
            del deps[index]


def left_out(root: Path) -> list[str]:
    """Stages of `OPTIONAL` that params.yaml has no section for."""
    values = params.read(root) if (root / "params.yaml").is_file() else {}
    return sorted(OPTIONAL - values.keys()) if values else []


def folders() -> tuple[list[str], list[str]]:
    """Folders of the stages' outputs, and folders that stages read and none writes."""
    stages = code_lock.template_stages().values()
    outputs = [str(path).partition("/${")[0] for stage in stages for path in stage["outs"]]
    deps = {
        dep
        for stage in stages
        for dep in stage["deps"]
        if dep.startswith("data/") and not dep.startswith("data/reports/") and "$" not in dep
    }
    return outputs, sorted(dep for dep in deps if not any(dep == out or dep.startswith(f"{out}/") for out in outputs))


def current_lock(text: str = "") -> CodeLock:
    """code.lock.yaml for the installed package.

    Args:
        text: content of dvc.yaml; empty: that with all stages.
    """
    return CodeLock(__version__, code_lock.installed(), sha256_of_text(text or pipeline_text()))


@dataclass(frozen=True)
class Update:
    """What became of a project's dvc.yaml in an upgrade."""

    lock: CodeLock
    """The new content of code.lock.yaml."""
    redefined: list[str]
    """Stages with another command, other dependencies, parameters or outputs than before."""
    edited: list[str]
    """Stages whose definition in an edited dvc.yaml, which is kept, is not that of this version."""
    written: list[str]
    """Files that were written, by their paths in the project."""


def update_pipeline(root: Path, recorded: CodeLock) -> Update:
    """Write dvc.yaml of this version over that of an earlier one, unless it was edited since: without stages that
    params.yaml leaves out, and with what each adapter reads."""
    adapters, path = params.read(root).get("adapter"), root / "dvc.yaml"
    text = listed(pipeline_text(left_out(root)), adapters if isinstance(adapters, dict) else {})
    lock = current_lock(text)
    present, written = path.read_text(encoding="utf-8"), list[str]()
    if sha256_of_text(present) == recorded.pipeline or present == text:  # the latter after an interrupted upgrade
        if present != text:
            for name in folders()[1]:
                if not (root / name).exists():  # this version reads it, the earlier one did not
                    (root / name).mkdir(parents=True)
                    (root / name / KEEP).touch()
                    written.append(f"{name}/{KEEP}")
            write_with_its_line_ends(path, text)  # last: an interrupted upgrade is done again as a whole
            written.append("dvc.yaml")
        return Update(lock, _differing(*(_without_notes(_stages(one)) for one in (present, text))), [], written)
    return Update(replace(lock, pipeline=recorded.pipeline), [], _differing(_stages(present), _stages(text)), [])


def _stages(text: str) -> dict[str, Any]:
    from ruamel.yaml import YAML

    return dict((YAML(typ="safe").load(text) or {}).get("stages") or {})


def _without_notes(stages: dict[str, Any]) -> dict[str, Any]:
    """The stages without what makes no stage stale."""
    return {
        name: {key: value for key, value in body.get("do", body).items() if key not in {"desc", "meta"}}
        for name, body in stages.items()
    }


def _differing(present: dict[str, Any], template: dict[str, Any]) -> list[str]:
    return [name for name, body in template.items() if present.get(name) != body]
