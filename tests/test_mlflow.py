"""A model in MLflow's registry: its lineage as tags, its data as inputs of a
run, once for the same content, and no byte of the project changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders.commands import ask
from builders.history import Project, entry
from conftest import tool

from dagster_project.__main__ import main
from dagster_project.commands.model_files import claim

tool("mlflow")
ROWS = [("a.jsonl", "train", "apples"), ("a.jsonl", "test", "pears"), ("b.jsonl", "train", "figs")]
FILES = {"model.safetensors": b"weights", "config.json": b"{}"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project whose merged@lora is in the workspace and committed."""
    made = Project(tmp_path / "project")
    lock = made.lock(ROWS)
    [inputs] = lock["merged@lora"]["deps"]
    lock["merged@lora"] = entry("merged@lora", {inputs["path"]: inputs["md5"]}, made.put(FILES))
    for name, content in FILES.items():
        (made.root / "data/merged/lora").mkdir(parents=True, exist_ok=True)
        (made.root / "data/merged/lora" / name).write_bytes(content)
    made.commit(lock)
    return made


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of MLflow's, whose files of models are beside it."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def files_of(root: Path) -> dict[str, str]:
    """All files but the index of audits, which every audit may write."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and ".dvc/tmp" not in path.as_posix()
    }


def test_a_version_names_the_model_its_record_and_its_data(
    project: Project, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    here, before = ("--project", str(project.root)), files_of(project.root)
    code, made = ask(capsys, "mlflow", "merged@lora", "--tracking-uri", address, "--upload", *here)
    assert code == 0 and made["created"] and (made["name"], int(made["version"])) == ("merged-lora", 1)
    assert files_of(project.root) == before

    client = MlflowClient(tracking_uri=address, registry_uri=address)
    [version] = client.search_model_versions("name = 'merged-lora'")
    own = claim.make(project.root, "merged@lora").as_fields()
    assert {*own} == {f"pedigree.{name}" for name in ("model", "stage", "dvc_lock", "commit", "audit_sha256")}
    assert dict(version.tags) == own
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED" and own.items() <= run.data.tags.items()
    audited = ask(capsys, "audit", "merged@lora", *here)[1]
    inputs = {one.dataset.name: one.dataset for one in run.inputs.dataset_inputs}
    assert {*inputs} == {*audited["sources"], "data/splits"} and audited["sources"]
    for name, facts in audited["sources"].items():
        assert json.loads(inputs[name].source)["tags"]["sha256"] == facts["sha256"] and facts["sha256"].startswith(
            inputs[name].digest
        )
    assert inputs["data/splits"].digest == audited["stages"]["splits"]["md5"]
    fetched = Path(
        download_artifacts(artifact_uri=version.source, tracking_uri=address, dst_path=str(tmp_path / "fetched"))
    )
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == FILES


def test_the_same_model_is_registered_once_and_another_one_is_the_next_version(
    project: Project, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    command = ("mlflow", "merged@lora", "--name", "helpdesk", "--project", str(project.root))
    first, again = (ask(capsys, *command)[1] for _ in range(2))
    assert (
        first["created"]
        and not again["created"]
        and (first["version"], first["run"]) == (again["version"], again["run"])
    )
    assert first["source"].startswith("dvc:data/merged/lora@")
    project.commit(project.lock([*ROWS, ("b.jsonl", "train", "plums")], seed=1))
    _, other = ask(capsys, *command)
    assert (
        other["created"]
        and int(other["version"]) == 2
        and other["tags"]["pedigree.model"] != first["tags"]["pedigree.model"]
    )


def test_exports_beside_a_release_are_not_uploaded(
    project: Project, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no part of its content, and can be those of another version (docs/exports.md)."""
    from mlflow.artifacts import download_artifacts

    lock = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]
    lock["release"] = entry(
        "release",
        {"data/merged/lora": lock["merged@lora"]["outs"][0]["md5"]},
        project.put({**FILES, "audit/a.json": b"[]"}),
    )
    for name, content in {
        **FILES,
        "audit/a.json": b"[]",
        "exports/README.md": b"x",
        "exports.html": b"x",
        "model.sig": b"x",
    }.items():
        (project.root / "data/release" / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / "data/release" / name).write_bytes(content)
    project.commit(lock)
    code, made = ask(capsys, "mlflow", "release", "--tracking-uri", address, "--upload", "--project", str(project.root))
    assert code == 0
    got = Path(download_artifacts(artifact_uri=made["source"], dst_path=str(tmp_path / "got"), tracking_uri=address))
    assert set(files_of(got)) == {*FILES, "audit/a.json"}


def test_files_can_be_uploaded_after_a_model_was_registered_without_them(
    project: Project, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("mlflow", "merged@lora", "--tracking-uri", address, "--project", str(project.root))
    without, first, again, last = (
        ask(capsys, *command, *upload)[1] for upload in ((), ("--upload",), ("--upload",), ())
    )
    assert without["source"].startswith("dvc:") and first["created"] and int(first["version"]) == 2
    assert {path.name for path in Path(first["source"]).iterdir()} == {*FILES}
    assert not again["created"] and again["run"] == first["run"] and not last["created"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merged@lora",), "no address of an MLflow server or database"),
        (("merged@lora", "--tracking-uri", "mlruns"), "not an address of a server or database"),
        (("merged@lora", "--tracking-uri", "http://me:secret@127.0.0.1:9"), "a user or password"),
        (("splits", "--tracking-uri", "sqlite:///mlflow.db"), "splits is not a model"),
        (("merged@x", "--tracking-uri", "sqlite:///mlflow.db"), "no such stage"),
        (("merged@lora", "--tracking-uri", "sqlite:///mlflow.db", "--name", "a/b"), "cannot contain"),
        (("merged@lora", "--tracking-uri", "sqlite:///mlflow.db", "--name", " "), "the name is empty"),
        (("merged@lora", "--tracking-uri", "http://127.0.0.1:9"), "MLflow: "),
        (("merged@lora", "--tracking-uri", "http://"), "not an address of a server or database"),
        (("merged@lora", "--tracking-uri", "http://[::1"), "not an address"),
        (("merged@lora", "--tracking-uri", "sqlite://"), "a database in memory"),
        (("merged@lora", "--tracking-uri", "sqlite:///:memory:"), "a database in memory"),
        (
            ("merged@lora", "--tracking-uri", "sqlite:///notes.txt"),
            "MLflow: (sqlite3.DatabaseError) file is not a database",
        ),
        (("merged@lora", "--tracking-uri", "mssql+other://me:secret@host"), "Can't load plugin"),
    ],
)
def test_bad_input_is_refused_with_one_message(
    project: Project,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "notes.txt").write_text("Notes, and not a database. " * 50)
    assert main(["mlflow", *arguments, "--project", str(project.root)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and "secret" not in shown.err and not shown.out
    assert "Dagster" not in shown.err and "run that was begun" not in shown.err


def test_a_database_whose_driver_is_not_installed_is_refused_by_the_driver_s_name(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for driver in ("psycopg", "psycopg2"):  # SQLAlchemy's default is one or the other
        monkeypatch.setitem(sys.modules, driver, None)
    address = "postgresql://me:secret@127.0.0.1:9/x"
    assert main(["mlflow", "merged@lora", "--tracking-uri", address, "--project", str(project.root)]) == 2
    shown = capsys.readouterr().err
    assert "its driver is not installed: psycopg" in shown and "secret" not in shown


def test_changed_files_are_not_uploaded(project: Project, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    (project.root / "data/merged/lora/config.json").write_text("{} ")
    assert main(["mlflow", "merged@lora", "--tracking-uri", address, "--upload", "--project", str(project.root)]) == 2
    assert "not what dvc.lock recorded for" in capsys.readouterr().err


def test_the_run_is_in_the_named_experiment(project: Project, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    here = ("--project", str(project.root), "--tracking-uri", address)
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    assert (
        main(["mlflow", "merged@lora", *here, "--experiment", " "]) == 2
        and "--experiment: the name is empty" in capsys.readouterr().err
    )
    client.delete_experiment(client.create_experiment("old"))
    assert main(["mlflow", "merged@lora", *here, "--experiment", "old"]) == 2
    assert "--experiment old: deleted in MLflow" in capsys.readouterr().err and not client.search_registered_models()
    for name, models in (("helpdesk", 1), ("pedigree", 2)):
        options = ("--experiment", name) if models == 1 else ("--name", "other")
        code, made = ask(capsys, "mlflow", "merged@lora", *here, *options)
        known = client.get_experiment_by_name(name)
        assert code == 0 and known and client.get_run(made["run"]).info.experiment_id == known.experiment_id
        assert len(client.search_registered_models()) == models


def test_figures_of_fields_and_benchmarks_may_have_any_name(
    project: Project, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    (project.root / "data/reports/merged").mkdir()
    report = project.report("merged/lora", {"passed": True, "type (main).accuracy": 0.5, "mmlu, übung": 0.25})
    lock = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]
    lock["merged@lora"]["outs"].append({**report, "hash": "md5"})
    project.commit(lock)
    code, made = ask(capsys, "mlflow", "merged@lora", "--tracking-uri", address, "--project", str(project.root))
    assert code == 0 and made["created"]
    figures = MlflowClient(tracking_uri=address).get_run(made["run"]).data.metrics
    assert figures == {"merged/lora/type _main_.accuracy": 0.5, "merged/lora/mmlu_ übung": 0.25}


def test_a_release_has_the_figures_of_the_evaluation_of_the_model_that_it_is_a_copy_of(
    project: Project, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    lock = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]
    model = {"data/merged/lora": lock["merged@lora"]["outs"][0]["md5"]}
    lock["evaluation@lora"] = entry("evaluation@lora", model, project.put({"answers.parquet": b"x"}))
    lock["release"] = entry("release", model, project.put({**FILES, "release.json": b"{}"}))
    (project.root / "data/reports/evaluation").mkdir()
    lock["evaluation@lora"]["outs"].append(
        {**project.report("evaluation/lora", {"passed": True, "perplexity": 2.5}), "hash": "md5"}
    )
    project.commit(lock)
    code, made = ask(capsys, "mlflow", "release", "--tracking-uri", address, "--project", str(project.root))
    assert code == 0
    assert MlflowClient(tracking_uri=address).get_run(made["run"]).data.metrics == {"evaluation/lora/perplexity": 2.5}


def test_ids_of_records_in_waivers_are_left_out(
    project: Project, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    lock = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]
    waiver = {"check": "too_long", "reason": "kept", "expires": "2999-01-01", "rows": ["a.jsonl:3", "0f" * 16]}
    lock["merged@lora"]["params"] = {"params.yaml": {"instructions": {"waivers": [waiver]}}}
    project.commit(lock)
    code, made = ask(capsys, "mlflow", "merged@lora", "--tracking-uri", address, "--project", str(project.root))
    assert code == 0
    parameters = MlflowClient(tracking_uri=address).get_run(made["run"]).data.params
    assert json.loads(parameters["instructions"])["waivers"] == [{**waiver, "rows": ["a.jsonl:3", "a record"]}]


def test_a_model_that_changes_while_it_is_uploaded_is_not_registered(
    project: Project, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    log = MlflowClient.log_artifact

    def log_artifact(self: Any, run: str, path: str, *rest: Any) -> None:
        (project.root / "data/merged/lora/model.safetensors").write_bytes(b"others")
        log(self, run, path, *rest)

    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    assert main(["mlflow", "merged@lora", "--tracking-uri", address, "--upload", "--project", str(project.root)]) == 2
    assert "not what dvc.lock recorded for" in capsys.readouterr().err
    client = MlflowClient(address)
    [run] = client.search_runs([client.get_experiment_by_name("pedigree").experiment_id])
    assert run.info.status == "FAILED" and not client.search_registered_models()
