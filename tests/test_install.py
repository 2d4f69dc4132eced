"""The wheel with the core's dependencies alone: six commands work without
torch, transformers, Dagster and DVC; all others name their extra."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from builders.files import jsonl
from builders.history import Project, entry, identity, messages
from builders.wheel import environment, installed
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dagster_project.commands.extras import CORE, PACKAGES, missing_extra

ABSENT = (
    "pyarrow",
    "pandas",
    "torch",
    "transformers",
    "datasets",
    "numba",
    "sklearn",
    "matplotlib",
    "dagster",
    "dvc",
    "great_expectations",
    "ray",
)
MEGABYTES = 400
"""Limit of the installed core, with pip. polars takes 175 of it, numpy 60."""


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment outside the clone with the wheel and what it requires, in the locked versions."""
    folder = tmp_path_factory.mktemp("core")
    if not os.environ.get("PEDIGREE_REQUIRE_INDEX"):
        probe = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--retries",
            "0",
            "--dest",
            str(folder),
            "packaging",
        ]
        if subprocess.run(probe, cwd="/", capture_output=True, check=False).returncode:
            pytest.skip("the package index is not reachable")
    installed(sys.executable, "-m", "venv", folder / "env")
    python = folder / "env" / "bin" / "python"
    with_uv = (shutil.which("uv"), "pip", "install", "--quiet", "--python", python)
    with_pip = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    installed(*(with_uv if with_uv[0] else with_pip), "--constraint", ROOT / "requirements.lock", wheel)
    return python


def outside(core: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the installed package, in a folder that is not the clone."""
    return subprocess.run(
        [core.parent / "pedigree", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_has_pages_schema_types_and_license(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = {name.removeprefix("dagster_project/") for name in names if name.startswith("dagster_project/")}
    expected = {
        str(path.relative_to(ROOT / "dagster_project"))
        for path in (ROOT / "dagster_project").rglob("*")
        if path.is_file()
    }
    assert package == {name for name in expected if "__pycache__" not in name}
    assert {"py.typed", "params.schema.json", "views/html.css", "views/templates/base.jinja"} <= package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_core_is_light(core: Path) -> None:
    names = ("dagster_project", "polars", *ABSENT)
    code = f"import importlib.util as u; print(*[name for name in {names!r} if u.find_spec(name)])"
    found = subprocess.run(
        [core, "-c", code], cwd="/", env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert found.split() == ["dagster_project", "polars"]
    [packages] = core.parent.parent.glob("lib/python*/site-packages")
    assert sum(path.stat().st_blocks * 512 for path in packages.rglob("*")) < MEGABYTES * 1e6  # on disk, as `du` counts


def test_help_and_check_work_in_the_core(core: Path, tmp_path: Path) -> None:
    assert "audit" in outside(core, "--help", folder=tmp_path).stdout
    text = "the kite that we ordered for her birthday and that went to the pub on Mill Row"
    texts = [text, text, text.replace("that went", "which went"), *(f"{name} tea" for name in "abcdefg")]
    file = jsonl(tmp_path / "rows.jsonl", *({"messages": messages(one)} for one in texts))
    done = outside(core, "check", str(file), "--json", "--report", "page.html", folder=tmp_path)
    assert done.returncode in {0, 1}, done.stderr
    document = json.loads(done.stdout)
    assert document["rows"] == 10
    assert {finding["check"] for finding in document["findings"] if finding["count"]} >= {
        "exact_duplicates",
        "near_duplicates",
    }
    assert "<html" in (tmp_path / "page.html").read_text()


def test_init_works_in_the_core_and_says_what_is_missing(core: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", *({"messages": messages(name)} for name in ("kites", "pubs", "gulls")))
    done = outside(core, "init", "project", "--data", "rows.jsonl", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["missing"] == ["dvc", "dagster", "torch"]
    assert (tmp_path / "project/data/sources/rows.jsonl").is_file()


@pytest.mark.long
def test_audit_impact_and_export_work_in_the_core(core: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.commit(project.lock([("kites", "train", "a.jsonl"), ("pubs", "test", "a.jsonl")]))

    def answer(*arguments: str) -> tuple[int, str]:
        done = outside(core, *arguments, folder=project.root)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    code, text = answer("audit", "merged@lora", "--json")
    assert code == 0 and json.loads(text)["records"]["learnt_by"]["adapter@lora"]["records"] == 1
    for about in (
        ("--record", identity("kites")),
        ("--text", "What of kites?"),
        ("--containing", "kites"),
        ("--containing", "KIT.s", "--regex"),
    ):
        code, text = answer("impact", *about, "--json")
        assert code == 0 and json.loads(text)["verdict"] == "yes", about
    assert answer("audit", "merged@lora", "--records", "records.csv") == answer(
        "audit", "merged@lora", "--records", "records.parquet"
    )
    rows = [*csv.reader((project.root / "records.csv").read_text().splitlines())]
    written = pq.read_table(project.root / "records.parquet").to_pydict()
    assert [row[rows[0].index("example_id")] for row in rows[1:]] == written["example_id"] == [identity("kites")]
    for name in ("cyclonedx", "openlineage", "model-card"):
        code, text = answer("export", "merged@lora", "--format", name)
        assert code == 0 and "merged" in text


def test_a_model_leaves_as_safetensors_and_its_copy_is_audited_in_the_core(core: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    lock = project.lock([("kites", "train", "a.jsonl"), ("pubs", "test", "a.jsonl")])
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   '
    weights = len(header).to_bytes(8, "little") + header + bytes(8)
    [inputs] = lock["merged@lora"]["deps"]
    files = {"config.json": b"{}", "model.safetensors": weights}
    lock["merged@lora"] = entry("merged@lora", {inputs["path"]: inputs["md5"]}, project.put(files))
    (project.root / "data/merged/lora").mkdir(parents=True)
    for name, content in files.items():
        (project.root / "data/merged/lora" / name).write_bytes(content)
    project.commit(lock)
    done = outside(
        core, "export", "merged@lora", "--format", "safetensors", "--out", str(tmp_path / "copy"), folder=project.root
    )
    assert done.returncode == 0, done.stderr
    done = outside(core, "audit", str(tmp_path / "copy"), "--json", folder=project.root)
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"] == "verified"
    done = outside(core, "audit", str(tmp_path / "copy"), "--json", folder=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"] == "unverified"


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("run splits", "pipeline"),
        ("ui", "pipeline"),
        ("sync", "pipeline"),
        ("upgrade", "pipeline"),
        ("plan --model config.json", "train"),
        ("sign config.json --key config.json", "trust"),
        ("export merged@lora --format gguf", "gguf"),
        ("mlflow merged@lora", "mlflow"),
    ],
)
def test_any_other_command_names_the_extra_that_it_needs(core: Path, tmp_path: Path, command: str, extra: str) -> None:
    project = Project(tmp_path / "project")
    (project.root / "config.json").write_text('{"model_type": "llama"}')
    done = outside(core, *command.split(), folder=project.root)
    assert (done.returncode, done.stdout) == (2, "")
    first, hint = done.stderr.splitlines()
    assert (named := re.fullmatch(r"error: `pedigree (\w+)` requires (\w+), which is not installed", first)), first
    assert named[1] == command.split()[0] and named[2] in PACKAGES[extra]
    assert f"`pip install 'pedigree-llm[{extra}]'` installs it" in hint


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_check_of_a_table_names_the_extra_that_reads_it(core: Path, tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"rows{suffix}").write_bytes(b"PAR1")
    done = outside(core, "check", f"rows{suffix}", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    first, hint = done.stderr.splitlines()
    assert (
        first == "error: `pedigree check` requires pyarrow, which is not installed"
        and "`pip install 'pedigree-llm[arrow]'`" in hint
    )


def test_a_missing_library_of_the_core_is_named() -> None:
    """An installation that was interrupted, or `pip uninstall`: commands ended in a traceback."""
    found = missing_extra(ModuleNotFoundError("x", name="ruamel.yaml"), "check")
    assert found and str(found).splitlines() == [
        "`pedigree check` requires ruamel, which is not installed",
        "hint: `pip install pedigree-llm` installs what is missing",
    ]


def test_every_package_of_a_required_library_is_named() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {canonicalize_name(Requirement(one).name) for one in required}
    packages = {
        package for package, owners in packages_distributions().items() if names & {*map(canonicalize_name, owners)}
    }
    assert {package for package in packages if not package.startswith("_")} <= CORE


def test_a_missing_module_of_no_extra_is_a_fault() -> None:
    assert missing_extra(ModuleNotFoundError("x", name="dagster_project.core.missing"), "run") is None
    assert missing_extra(ModuleNotFoundError("x"), "run") is None
