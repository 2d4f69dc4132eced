"""The small pipeline gives the same bytes in odd places: paths, repositories,
environments, users, file systems, versions of Python.

Each place runs the data stages from the base model on, by `dvc repro`, and then what people call after a run. The suite
runs all harmless oddities at once; `make test-places` (PEDIGREE_PLACES=1) runs each by itself, and those that take an
installation, a second user or a compiler.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from builders.small_pipeline import git
from conftest import ROOT, edit_params, run
from ruamel.yaml import YAML

from dagster_project.core.errors import InputError
from dagster_project.core.params import refuse_names_of_one_file, variant_names

STAGES = ("raw_examples", "instructions", "splits")
each = pytest.mark.skipif(not os.environ.get("PEDIGREE_PLACES"), reason="run by `make test-places`")
NAMES = {
    "spaces": "my project  (2)",
    "quotes": 'it\'s "quoted" `x` $HOME',
    "newline": "two\nlines",
    "other scripts": "größe 数据 😀",
    "leading dash": "-rf",
}
ALL_NAMES = '-it\'s "two"\n$HOME größe 数据 😀'


@dataclass
class Place:
    """Where and how the pipeline runs."""

    root: Path
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables to set; None: not set."""
    prefix: tuple[str, ...] = ()
    """Command that runs the command, e.g. as another user."""
    python: str = sys.executable
    umask: int = 0o022

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A module of Python in the project's folder, without a terminal."""
        given = {
            "DAGSTER_HOME": str(self.root / ".dagster"),
            "PATH": f"{Path(self.python).parent}{os.pathsep}{os.environ['PATH']}",
        }
        changed = {**os.environ, **given, **self.environment}
        env = {name: value for name, value in changed.items() if value is not None and name != "PYTHONPATH"}
        return subprocess.run(
            [*self.prefix, self.python, "-m", *arguments],
            cwd=self.root,
            env=env,
            umask=self.umask,
            stdin=subprocess.DEVNULL,
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
        )

    def pedigree(self, *arguments: str, code: int = 0) -> str:
        done = self("dagster_project", *arguments)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.stdout


def outputs(root: Path) -> dict[str, str]:
    """Content hash of the output of each stage, by dvc.lock."""
    stages = YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"]
    return {
        stage: next(out["md5"] for out in stages[stage]["outs"] if out["path"] == f"data/{stage}") for stage in STAGES
    }


def counts(root: Path) -> dict[str, list[object]]:
    reports = {stage: json.loads((root / f"data/reports/{stage}.json").read_text()) for stage in STAGES}
    return {
        stage: [report["passed"], report["rows_in"], report["rows_out"], report["dropped"]]
        for stage, report in reports.items()
    }


@pytest.fixture(scope="session")
def _based(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project as it was when only the base model was there, committed."""
    root = tmp_path_factory.mktemp("based") / "project"
    unneeded = shutil.ignore_patterns(
        "runs", ".dagster", "adapter", "merged*", "aligned", "release", "reward_model", "evaluation*", "__pycache__"
    )
    shutil.copytree(
        _finished,
        root,
        symlinks=True,
        ignore=lambda folder, names: unneeded(folder, names) if "dagster_project" not in folder else set(),
    )
    kept = {
        "base_model",
        "base_model.json",
        "reports",
        "sources",
        "templates",
        "metrics",
        "keys",
        "trainers",
        "rewards",
        "expectations",
        ".gitignore",
    }
    for path in [*(root / "data").iterdir(), *(root / "data/reports").iterdir()]:
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lock = YAML(typ="safe").load((root / "dvc.lock").read_text())
    (root / "dvc.lock").write_text(
        json.dumps({"schema": "2.0", "stages": {"base_model": lock["stages"]["base_model"]}})
    )
    git(root, "add", "--all", "--force", "dvc.lock", "data/reports")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "based")
    return root


@pytest.fixture
def based(_based: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that puts a copy into a folder of this name."""

    def put(name: str = "project") -> Path:
        return Path(shutil.copytree(_based, tmp_path / name, symlinks=True))

    return put


def assert_runs(place: Place, expected: Path) -> None:
    """The data stages run to the bytes of the undisturbed run, nothing else is
    left behind, and the record of it is whole."""
    done = place("dvc", "repro", "splits")
    assert done.returncode == 0, (done.stderr + done.stdout)[-4000:]
    assert outputs(place.root) == outputs(expected)
    assert counts(place.root) == counts(expected)
    again = place("dvc", "status", "splits")
    assert again.returncode == 0 and "up to date" in again.stdout, again.stdout + again.stderr
    assert json.loads(place.pedigree("verify", "--integrity", "--json"))["verdict"] == "intact"
    audited = json.loads(place.pedigree("audit", "splits", "--json"))
    assert audited["stages"].keys() >= {"raw_examples", "instructions"}
    assert (place.root / "data/pages/instructions/report.html").is_file()


def give_outputs(root: Path, clone: Path) -> None:
    """What git does not track."""
    for name in ("data/base_model", "models", ".dvc/cache"):
        shutil.copytree(root / name, clone / name, dirs_exist_ok=True)


def at(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.long
def test_all_harmless_oddities_at_once_give_the_same_bytes(
    based: Callable[[str], Path], _finished: Path, tmp_path: Path
) -> None:
    root = based(ALL_NAMES)
    odd: dict[str, str | None] = {
        "HOME": str(at(tmp_path / f"home {ALL_NAMES}")),
        "LANG": "C",
        "LC_ALL": "C",
        "COLUMNS": "40",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "OMP_NUM_THREADS": None,
        "OMP_WAIT_POLICY": None,
        "TMPDIR": str(at(tmp_path / "tmp dir")),
    }
    assert_runs(Place(root, odd, umask=0o077), _finished)
    reports = list((root / "data/reports").glob("*.json"))
    assert reports and all(str(root) not in path.read_text() for path in reports)


@each
@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_the_name_of_project_source_and_home(
    name: str, based: Callable[[str], Path], _finished: Path, tmp_path: Path
) -> None:
    root = based(name)
    place = Place(root, {"HOME": str(at(tmp_path / "homes" / name))})
    assert_runs(place, _finished)
    source = root / "data/sources" / f"{name}.json"
    shutil.copy(root / "data/sources/triage_alpaca.json", source)
    edit_params(root, lambda values: values["raw_examples"]["sources"][0].update(path=f"data/sources/{source.name}"))
    done = place("dvc", "repro", "splits")
    assert done.returncode == 0, done.stderr[-3000:]
    assert counts(root) == counts(_finished), "the same rows under another name"
    shutil.copy(source, root)
    plain, odd = (
        json.loads(place("dagster_project", "check", "--json", "--", path).stdout)
        for path in ("data/sources/triage_alpaca.json", source.name)
    )
    assert (plain["rows"], plain["kept"]) == (odd["rows"], odd["kept"])


ENVIRONMENTS: dict[str, Mapping[str, str | None]] = {
    "HOME unset": {"HOME": None},
    "HOME not writable": {"HOME": "/proc/1/nowhere", "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None},
    "LANG=C": {"LANG": "C", "LC_ALL": "C"},
    "NO_COLOR": {"NO_COLOR": "1"},
    "40 columns": {"COLUMNS": "40", "LINES": "10"},
    "no thread count": {"OMP_NUM_THREADS": None, "OMP_WAIT_POLICY": None},
}


@each
@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=list(ENVIRONMENTS))
def test_an_environment(environment: Mapping[str, str | None], based: Callable[[str], Path], _finished: Path) -> None:
    assert_runs(Place(based("project"), dict(environment)), _finished)


@each
def test_a_umask_that_gives_others_nothing(based: Callable[[str], Path], _finished: Path) -> None:
    assert_runs(Place(based("project"), umask=0o077), _finished)


@each
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_temporary_files_on_another_file_system(based: Callable[[str], Path], _finished: Path) -> None:
    scratch = Path("/dev/shm") / f"pedigree-{os.getpid()}"
    try:
        assert_runs(Place(based("project"), {"TMPDIR": str(at(scratch))}), _finished)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@each
@pytest.mark.parametrize("variable", [{}, {"NO_COLOR": "1"}], ids=["color", "NO_COLOR"])
def test_a_narrow_terminal(variable: dict[str, str], tmp_path: Path) -> None:
    """What a person sees at a terminal of 40 columns is what a pipe gets, apart from colors."""
    source = ROOT / "data/sources/triage_alpaca.json"
    command = [sys.executable, "-m", "dagster_project", "check", str(source)]
    env = {**os.environ, "COLUMNS": "40", "PYTHONPATH": str(ROOT), **variable}
    piped = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdin=follower, stdout=follower, stderr=subprocess.DEVNULL
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        seen += block
    os.close(leader)
    assert process.wait() == piped.returncode
    shown = seen.decode().replace("\r\n", "\n")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert [line.rstrip() for line in plain.splitlines()] == [line.rstrip() for line in piped.stdout.splitlines()]
    assert "\x1b" not in shown or not variable


@each
def test_a_sub_folder_of_a_repository(based: Callable[[str], Path], _finished: Path, tmp_path: Path) -> None:
    root = based("whole/sub")
    shutil.rmtree(root / ".git")
    config = root / ".dvc/config"
    git(tmp_path / "whole", "init", "--quiet")
    git(tmp_path / "whole", "add", "--all", "--force", "sub/.dvc/config", "sub/dvc.lock", "sub/data/reports")
    git(tmp_path / "whole", "add", "--all")
    git(tmp_path / "whole", "commit", "--quiet", "--message", "sub-folder")
    assert config.is_file()
    assert_runs(Place(root), _finished)


@each
def test_a_worktree(based: Callable[[str], Path], _finished: Path, tmp_path: Path) -> None:
    root = based("project")
    git(root, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    give_outputs(root, tmp_path / "tree")
    assert_runs(Place(tmp_path / "tree"), _finished)


@each
def test_a_submodule(based: Callable[[str], Path], _finished: Path, tmp_path: Path) -> None:
    root = based("project")
    outer = at(tmp_path / "outer")
    git(outer, "init", "--quiet")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(root), "inner")
    give_outputs(root, outer / "inner")
    assert_runs(Place(outer / "inner"), _finished)


@each
def test_a_copy_without_git_is_one_message(based: Callable[[str], Path]) -> None:
    root = based("project")
    shutil.rmtree(root / ".git")
    for command in (("run", "raw_examples"), ("verify", "--integrity"), ("audit", "base_model"), ("sync",)):
        done = Place(root)("dagster_project", *command)
        assert done.returncode in {0, 1, 2} and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert done.returncode == 0 or ("error: " in done.stderr and "hint: " in done.stderr), done.stderr[-2000:]


@each
def test_a_checkout_with_windows_line_ends(based: Callable[[str], Path], _finished: Path, tmp_path: Path) -> None:
    root = based("project")
    git(root, "clone", "--quiet", "--config", "core.autocrlf=true", str(root), str(tmp_path / "crlf"))
    give_outputs(root, tmp_path / "crlf")
    place = Place(tmp_path / "crlf")
    done = place("dvc", "repro", "splits")
    assert done.returncode == 0, done.stderr[-3000:]
    assert counts(place.root) == counts(_finished)
    assert json.loads(place.pedigree("verify", "--integrity", "--json"))["verdict"] == "intact"


def test_names_that_are_one_file_on_some_file_systems_are_refused() -> None:
    entry = {"method": "lora"}
    for names in (["A", "a"], ["lora", "LoRA"], ["ß", "SS"], ["\u00e9", "e\u0301"]):
        with pytest.raises(InputError, match="differ in case or Unicode form only"):
            refuse_names_of_one_file(names, "adapter")
    with pytest.raises(InputError, match="adapter: A and a differ in case"):
        variant_names({"adapter": {"A": entry, "a": entry}}, "adapter", required=True)
    assert variant_names({"adapter": {"A": entry, "b": entry}}, "adapter", required=True) == ["A", "b"]


def _usable_by_others() -> str | None:
    """Path of a Python with the libraries that a user without rights can run; None if there is none."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return None
    probe = [
        "setpriv",
        "--reuid=54321",
        "--regid=54321",
        "--clear-groups",
        "sh",
        "-c",
        "python -c 'import dvc, polars'",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    usable = (
        subprocess.run(probe, cwd="/", env={**os.environ, "PATH": path}, capture_output=True, check=False).returncode
        == 0
    )
    return sys.executable if usable else None


OTHER = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
"""A user without an entry in /etc/passwd, as in a container that is not run as root."""


@each
def test_a_user_without_name_and_home_as_in_a_container(based: Callable[[str], Path], _finished: Path) -> None:
    if _usable_by_others() is None:
        pytest.skip("needs root, setpriv, and a Python that other users can run")
    root = Path(shutil.copytree(based("project"), f"/tmp/pedigree-other-{os.getpid()}", symlinks=True))
    try:
        subprocess.run(["chown", "-R", "54321:54321", str(root)], check=True)
        nameless = Place(
            root, {"HOME": "/tmp", "TMPDIR": None, **dict.fromkeys(("USER", "LOGNAME", "LNAME", "USERNAME"))}, OTHER
        )
        refused = nameless("dagster_project", "run", "raw_examples")
        assert refused.returncode == 2 and "hint: set the environment variable USER" in refused.stderr, refused.stderr[
            -2000:
        ]
        assert_runs(Place(root, {**nameless.environment, "USER": "somebody"}, OTHER), _finished)
    finally:
        shutil.rmtree(root)


@each
def test_the_project_of_another_user_is_read_or_refused_with_one_message(based: Callable[[str], Path]) -> None:
    if _usable_by_others() is None:
        pytest.skip("needs root, setpriv, and a Python that other users can run")
    root = Path(shutil.copytree(based("project"), f"/tmp/pedigree-foreign-{os.getpid()}", symlinks=True))
    try:
        for command in (
            ("check", "data/sources/triage_alpaca.json"),
            ("audit", "base_model"),
            ("run", "raw_examples"),
            ("verify", "--integrity"),
        ):
            done = Place(root, {"HOME": "/tmp", "TMPDIR": None}, OTHER)("dagster_project", *command)
            assert "Traceback" not in done.stderr and done.returncode in {0, 1, 2}, done.stderr[-2000:]
            assert done.returncode == 0 or "error: " in done.stderr or done.stdout, done.stderr[-2000:]
    finally:
        shutil.rmtree(root)


SHIM = """
#include <errno.h>
int link(const char *a, const char *b) { errno = EPERM; return -1; }
int linkat(int a, const char *b, int c, const char *d, int e) { errno = EPERM; return -1; }
#ifdef WITHOUT_LOCKS
int flock(int file, int operation) { errno = ENOLCK; return -1; }
#endif
"""


def _shim(folder: Path, *options: str) -> str:
    """A library that makes every file system one without hard links and, by option, without locks."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        [compiler, "-shared", "-fPIC", *options, "-o", str(folder / "shim.so"), str(folder / "shim.c")], check=True
    )
    return str(folder / "shim.so")


@each
def test_a_file_system_without_hard_links(based: Callable[[str], Path], _finished: Path, tmp_path: Path) -> None:
    assert_runs(Place(based("project"), {"LD_PRELOAD": _shim(tmp_path)}), _finished)


@each
def test_a_file_system_without_locks_is_refused_with_one_message(based: Callable[[str], Path], tmp_path: Path) -> None:
    root = based("project")
    done = Place(root, {"LD_PRELOAD": _shim(tmp_path, "-DWITHOUT_LOCKS")})("dagster_project", "run", "raw_examples")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "does not lock files" in done.stderr and "hint: keep the project on a local disk" in done.stderr
    assert not (root / "data/raw_examples").exists()


@pytest.fixture(scope="session")
def other_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An environment with another version of Python and what the data stages
    need. Skips where it cannot be installed."""
    folder = tmp_path_factory.mktemp("python") / "env"
    names = [Path(part, f"python{request.param}") for part in os.environ["PATH"].split(os.pathsep)]
    commands = [[str(name), "-m", "venv", "--clear", str(folder)] for name in names if os.access(name, os.X_OK)]
    if not any(not subprocess.run(command, capture_output=True, check=False).returncode for command in commands):
        pytest.skip(f"no Python {request.param}, or none with venv and ensurepip")
    python = str(folder / "bin/python")
    installed = subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            str(ROOT / "requirements.lock"),
            f"{ROOT}[pipeline,train,gx]",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode:
        pytest.skip(f"cannot be installed: {installed.stderr[-300:]}")
    run([python, "-m", "pip", "uninstall", "--yes", "pedigree-llm"], ROOT)  # the project has the code
    return python


@each
@pytest.mark.parametrize("other_python", ["3.12", "3.13", "3.14"], indirect=True)
def test_another_version_of_python(other_python: str, based: Callable[[str], Path], _finished: Path) -> None:
    assert_runs(Place(based("project"), python=other_python), _finished)
