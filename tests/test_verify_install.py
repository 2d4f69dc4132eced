"""`pedigree verify --install`: the recorded version is installed from wheels,
compared with the record before it runs, and gives the answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pytest
from builders.installed import install, installed, pedigree_in
from builders.servers import free_port
from builders.small_pipeline import commit
from conftest import ROOT, run
from packaging.requirements import Requirement

from dagster_project.__main__ import main
from dagster_project.commands import verify_installed as module
from dagster_project.commands.installer import command_of, explained
from dagster_project.commands.requirements import Wheel
from dagster_project.commands.verify_installed import Build, _environment, _recorded, verify_installed
from dagster_project.core.errors import InputError
from dagster_project.core.layout import report_of
from dagster_project.core.records import write_json
from dagster_project.lineage import code_lock, history
from dagster_project.orchestration.processes import is_running

ROWS = [{"instruction": f"Name number {i}.", "output": f"It is {i}."} for i in range(5)]
STAGE = "stages/raw_examples.py"


def build(source: Path, out: Path, version: str, *requirements: str) -> Path:
    """A wheel of a copy of the package, which requires what pyproject.toml names and more."""
    text = (ROOT / "pyproject.toml").read_text().replace('version = "0.2.0"', f'version = "{version}"', 1)
    more = "".join(f'    "{one}",\n' for one in requirements)
    (source / "pyproject.toml").write_text(text.replace("dependencies = [\n", f"dependencies = [\n{more}", 1))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
        str(source),
    ]
    done = run(pip, source)
    assert done.returncode == 0, done.stderr
    return next(out.glob(f"pedigree_llm-{version}-*.whl"))


def tiny_wheel(folder: Path, name: str, version: str, module: str) -> Path:
    """A wheel with one module."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", module)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def change(site: Path, module: str, text: str, other: str) -> None:
    path = site / "dagster_project" / module
    assert path.read_text().count(text) == 1
    path.write_text(path.read_text().replace(text, other))


@dataclass(frozen=True)
class Made:
    """A project whose raw_examples were made by version 1.0, and upgraded to 2.0, which is installed."""

    project: Path
    site: Path
    """With version 2.0, whose raw_examples gives other bytes."""
    wheels: Path
    """A local index with both versions, and a library that only 1.0 requires."""
    rev: str
    """The commit of 1.0."""

    def verify(self, *options: str, wheels: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        index = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels or self.wheels),
            "PIP_CACHE_DIR": str(self.wheels / "cache"),
            **environment,
        }
        return installed(
            self.site,
            self.project,
            "-m",
            "dagster_project",
            "verify",
            "raw_examples",
            "--rev",
            self.rev,
            *options,
            **index,
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("versions")
    old = install(base / "old", "1.0")
    new = install(base / "new", "2.0")
    wheels = base / "wheels"
    project = base / "project"
    change(old, STAGE, '{"sources": sources}', '{"sources": sources, "by": __import__("only_in_one").NAME}')
    change(old, "commands/verify.py", 'f"reproducing {name}"', 'f"version 1.0 is reproducing {name}"')
    for version in ("1.4", "1.5"):
        tiny_wheel(wheels, "only_in_one", version, 'NAME = "one"\n')
    tiny_wheel(wheels, "only_in_one", "2.0", 'NAME = "two"\n')
    (old / "only_in_one.py").write_text('NAME = "one"\n')
    (base / "mine.json").write_text(json.dumps(ROWS))
    assert pedigree_in(old, base, "init", str(project), "--data", "mine.json", "--license", "MIT").returncode == 0
    done = installed(old, project, "-m", "dvc", "repro", "raw_examples")
    assert done.returncode == 0, done.stderr
    (old / "only_in_one.py").unlink()
    rev = commit(project)
    build(old, wheels, "1.0", "only-in-one<2")
    build(new, wheels, "2.0")
    assert pedigree_in(new, project, "upgrade").returncode == 0
    commit(project, "upgrade")
    return Made(project, new, wheels, rev)


@pytest.mark.long
def test_the_recorded_version_and_what_it_requires_are_installed_and_give_the_answer(
    made: Made, tmp_path: Path
) -> None:
    refused = made.verify()
    assert refused.returncode == 2 and "pip install pedigree-llm==1.0`; --install does both" in refused.stderr
    before = run(["git", "status", "--porcelain"], made.project).stdout
    done = made.verify("--install", "--json", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["stage"], document["rev"], document["verdict"]) == ("raw_examples", made.rev, "identical")
    assert json.loads((made.project / "data/reports/raw_examples.json").read_text())["by"] == "one", (
        "2.0 would write another report"
    )
    assert "version 1.0 is reproducing raw_examples" in done.stderr, "1.0 compares, too"
    assert "installing only-in-one<2" in done.stderr and "torch" not in done.stderr
    assert not list(tmp_path.iterdir()), "the environment was removed"
    assert run(["git", "status", "--porcelain"], made.project).stdout == before
    assert run([sys.executable, "-m", "pip", "show", "only-in-one"], made.project).returncode, (
        "this environment has nothing new"
    )


@pytest.mark.long
def test_an_answer_that_is_negative_has_its_exit_code(made: Made, tmp_path: Path) -> None:
    project = Path(shutil.copytree(made.project, tmp_path / "project", symlinks=True))
    run(["git", "checkout", "-q", made.rev], project)
    lock = (project / "dvc.lock").read_text()
    md5 = history.stages_of(lock)["raw_examples"]["outs"][0]["md5"]
    (project / "dvc.lock").write_text(lock.replace(md5, f"{'0' * 32}.dir"))
    done = replace(made, project=project, rev=commit(project, "another record")).verify("--install", "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["verdict"] == "different" and "version 1.0" in done.stderr


def refusal(made: Made, monkeypatch: pytest.MonkeyPatch, **environment: str) -> InputError:
    """Of this process, whose code is not that of 1.0 either."""
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CACHE_DIR": str(made.wheels / "cache"), **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        verify_installed(made.project, "raw_examples", made.rev, False, False)
    return caught.value


@pytest.mark.long
def test_another_build_of_the_version_is_refused_before_it_runs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever Python would begin to run it."""
    mark, [right] = tmp_path / "ran", made.wheels.glob("pedigree_llm-1.0-*")
    (tmp_path / "other").mkdir()
    with zipfile.ZipFile(right) as source, zipfile.ZipFile(tmp_path / "other" / right.name, "w") as target:
        for name in source.namelist():
            touch = (
                f"\nopen({str(mark)!r}, 'a').close()\n"
                if name in {f"dagster_project/{STAGE}", "dagster_project/__init__.py"}
                else ""
            )
            target.writestr(name, source.read(name) + touch.encode())
    error = refusal(made, monkeypatch, PIP_FIND_LINKS=str(tmp_path / "other"))
    assert error.what.startswith(
        "pedigree-llm 1.0 from the package index has other code for raw_examples than the records of this project"
    )
    assert "it was not run" in error.what and not mark.exists()


def test_a_version_that_no_index_has_and_an_index_that_does_not_answer_are_told_apart(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(next(made.wheels.glob("pedigree_llm-2.0-*")), tmp_path)
    (tmp_path / "pedigree_llm-1.0.tar.gz").touch()  # no wheel: it would be built, which runs its code
    error = refusal(made, monkeypatch, PIP_FIND_LINKS=str(tmp_path))
    assert error.what == "pedigree-llm==1.0: the package index has no such wheel for this Python and platform"
    assert "PIP_INDEX_URL or PIP_FIND_LINKS" in error.hint
    address = f"http://user:secret@127.0.0.1:{free_port()}/simple"
    nowhere = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "0",
        "PIP_FIND_LINKS": "",
        "PIP_INDEX_URL": address,
        "PIP_RETRIES": "1",
    }
    error = refusal(made, monkeypatch, **nowhere)
    assert error.what == "pedigree-llm==1.0: the package index does not answer" and "secret" not in str(error)


def test_libraries_that_a_training_records_have_its_versions_and_others_are_those_of_this_environment(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_CACHE_DIR": str(made.wheels / "cache"),
        "PIP_FIND_LINKS": str(made.wheels),
    }.items():
        monkeypatch.setenv(name, value)
    code = code_lock.recorded_in(history.Revision(made.project, made.rev).lock()["raw_examples"])
    here = {"torch": metadata.version("torch"), "dvc": metadata.version("dvc")}
    python = _environment(
        tmp_path, Build("1.0", code, {"python": "3.0.1", "only-in-one": "1.4", "torch": here["torch"]})
    )
    script = (
        "import json, sys; from importlib.metadata import version; print(json.dumps([version(name) for name in"
        " sys.argv[1:]]))"
    )
    found = run([python, "-P", "-c", script, "only-in-one", "pedigree-llm", "torch", "dvc"], tmp_path, PYTHONPATH="")
    assert json.loads(found.stdout) == ["1.4", "1.0", here["torch"], here["dvc"]], found.stderr
    assert not list(tmp_path.glob("lib/*/site-packages/torch*")), "no copy of what is here"
    assert "made with Python 3.0.1" in caplog.text


def test_failures_of_uv_are_explained_as_those_of_pip() -> None:
    """As uv 0.9 writes them."""
    absent = (
        "Because there is no version of pedigree-llm==1.0 and you require pedigree-llm==1.0, we can conclude that ..."
    )
    assert (
        "has no such wheel" in explained("x", True, absent)[0] and "UV_DEFAULT_INDEX" in explained("x", True, absent)[1]
    )
    assert (
        "has no such wheel"
        in explained("x", True, "Because pedigree-llm was not found in the package registry and you require")[0]
    )
    assert (
        "does not answer"
        in explained("x", True, "Failed to fetch: ...\n cause: error sending request for url (http://127.0.0.1:9/)")[0]
    )
    assert "secret" not in explained("x", True, "error: https://user:se@secret@index.example/simple")[0]
    other = explained("x", True, "error: invalid peer certificate: https://user:secret@index.example/simple")[0]
    assert other == "x cannot be installed: error: invalid peer certificate: https://index.example/simple"


def test_uv_is_used_where_it_is_present_unless_only_pip_has_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_of("python", {})[:6] == [sys.executable, "-P", "-m", "pip", "--python", "python"]
    (tmp_path / "uv").touch(mode=0o755)
    assert command_of("python", {})[0] == str(tmp_path / "uv")
    assert command_of("python", {"PIP_INDEX_URL": "x"})[0] == sys.executable
    assert command_of("python", {"PIP_INDEX_URL": "x", "UV_FIND_LINKS": "y"})[0] == str(tmp_path / "uv")
    (tmp_path / "uv").unlink()
    monkeypatch.setattr("dagster_project.commands.installer.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs uv or pip"):
        command_of("python", {})


def test_only_what_the_environment_does_not_meet_is_installed() -> None:
    lines = [
        "polars>=1",
        'torch>=2.9; extra == "train"',
        'trl<1.16; extra == "train"',
        'dvc>=3; extra == "pipeline"',
        'ray==2; extra == "ray"',
        'pedigree-llm[train]; extra == "all"',
        'tomli>=9; python_version < "3"',
        'moto>=9; extra == "dev"',
    ]
    wheel = Wheel("pedigree-llm", [Requirement(line) for line in lines])
    present = {"polars": "1.5", "torch": "2.13.0+cpu", "trl": "1.16.1", "moto": "5", "numpy": "2.4"}
    assert wheel.needed(present, {}) == ["trl<1.16", "dvc>=3"], "of [ray] nothing is here, and [dev] is not for a stage"
    assert wheel.needed(present, {"torch": "2.12.0", "trl": "1.15.2", "numpy": "2.4"}) == [
        "torch==2.12.0",
        "trl==1.15.2",
        "dvc>=3",
    ]
    assert wheel.needed({**present, "trl": "1.15", "dvc": "3.1"}, {"torch": "2.13.0+cpu"}) == []
    assert wheel.constraints(present, ["trl<1.16"]) == ["polars==1.5", "torch==2.13.0+cpu", "moto==5", "numpy==2.4"]


def recorded(folder: Path, **stages: tuple[str, str | None]) -> Path:
    """A project in which each stage has the hash of its code, and a report with the version of torch."""
    entries = {}
    for name, (sha256, torch) in stages.items():
        deps = [{"path": f"data/{one}", "md5": one} for one in list(stages)[: list(stages).index(name)]]
        outs = [{"path": f"data/{name}", "md5": name}]
        entries[name] = {"deps": deps, "outs": outs, "params": {"code.lock.yaml": {name: sha256}}}
        write_json(folder / report_of(name), {"environment": {"python": "3.11.0", "torch": torch}} if torch else {})
    write_json(folder / "dvc.lock", {"stages": entries})
    write_json(folder / "code.lock.yaml", {"version": "1.0", **{name: sha256 for name, (sha256, _) in stages.items()}})
    run(["git", "init", "-q"], folder)
    return folder


def test_nothing_is_installed_if_the_installed_code_is_the_recorded_one(tmp_path: Path) -> None:
    now = code_lock.installed(["splits"])["splits"]
    assert verify_installed(recorded(tmp_path, splits=(now, None)), "splits", None, False, False) is None


def test_an_interrupt_ends_all_processes_of_the_recorded_version_and_removes_their_copies_of_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\nsleep 300 &\necho $! $(mktemp -d) > {tmp_path}/writing\nmv {tmp_path}/writing"
        f" {tmp_path}/found\nwait\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(module, "_recorded", lambda *_: Build("1.0", {}, {}))
    monkeypatch.setattr(module, "_environment", lambda *_: str(python))

    class Interrupted(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if self.returncode is None and not (tmp_path / "asked").exists():
                (tmp_path / "asked").touch()
                while not (tmp_path / "found").exists():
                    time.sleep(0.05)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(module.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify_installed(tmp_path, "splits", None, False, False)
    pid, folder = (tmp_path / "found").read_text().split()
    assert not is_running(int(pid)) and not Path(folder).exists()


def test_a_build_is_what_all_stages_to_be_reproduced_were_made_with(tmp_path: Path) -> None:
    root = recorded(tmp_path, splits=("1" * 64, None), adapter=("2" * 64, "2.12"), merged=("3" * 64, None))
    build = _recorded(history.Revision(root, None), "merged", True)
    assert build == Build(
        "1.0", {"splits": "1" * 64, "adapter": "2" * 64, "merged": "3" * 64}, {"python": "3.11.0", "torch": "2.12"}
    )
    assert _recorded(history.Revision(root, None), "merged", False) == Build("1.0", {"merged": "3" * 64}, {})


def test_stages_of_several_versions_or_of_an_unknown_one_are_refused(tmp_path: Path) -> None:
    root = recorded(tmp_path, splits=("1" * 64, None), adapter=("2" * 64, "2.12"), reward_model=("3" * 64, "2.13"))
    with pytest.raises(InputError, match=r"made with torch 2\.12 and 2\.13"):
        verify_installed(root, "reward_model", None, True, False)
    report = root / report_of("adapter")
    intact = report.read_text()
    report.write_text(intact.replace('"torch"', '"torch @ http://127.0.0.1/x.whl#"'))
    with pytest.raises(InputError, match="is not a version of a library"):
        verify_installed(root, "reward_model", None, True, False)
    report.write_text("<<<<<<< HEAD\n" + intact)
    assert _recorded(history.Revision(root, None), "adapter", False).libraries == {}
    report.write_text(intact)
    code_lock.record(root, {"adapter": "4" * 64})
    with pytest.raises(InputError, match="splits, adapter, reward_model: made by several versions"):
        verify_installed(root, "reward_model", None, True, False)
    with pytest.raises(InputError, match="adapter: made by an unknown version"):
        verify_installed(root, "adapter", None, False, False)
    lock = root / "code.lock.yaml"
    lock.write_text(lock.read_text().replace("1.0", "--index-url=http://127.0.0.1/"))
    with pytest.raises(InputError, match="splits: made by an unknown version"):
        verify_installed(root, "splits", None, False, False)


def test_install_is_an_option_for_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--integrity", "--install", "--project", str(tmp_path)]) == 2
    assert "--install require a stage" in capsys.readouterr().err
