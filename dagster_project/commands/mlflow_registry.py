"""`pedigree mlflow`: a model of the project as a version in MLflow's model
registry, with its lineage as tags and its data as inputs of a run.

MLflow gets hashes and figures, and the files of the model with --upload.
Nothing that a stage reads or writes depends on it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dagster_project.commands.extras import PACKAGES
from dagster_project.commands.model_files import claim
from dagster_project.core.errors import InputError
from dagster_project.lineage import lineage
from dagster_project.lineage.export.summary import published_parameters
from dagster_project.lineage.exports_in_place import without_exports
from dagster_project.lineage.index import Index
from dagster_project.lineage.signing.target import Target, find
from dagster_project.views.texts import text

VARIABLE = "MLFLOW_TRACKING_URI"
SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
IN_MEMORY = ("", "/", "/:memory:")
"""Paths of SQLite databases that are not files."""
NOT_FETCHED = "dvc:"
"""Beginning of the source of a version whose files are not in MLflow."""
SET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default it tries for minutes
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""Variables of MLflow that are set unless they are already."""
SHORT_DIGEST = 36
"""Characters of a digest that MLflow stores; the whole one is in the source of the data set."""
NOT_IN_NAMES = re.compile(r"[^\w./:\- ]")
"""Characters that MLflow refuses in names of metrics. Fields of a task and files of benchmarks may have them."""
LONGEST_PARAMETER, PER_BATCH = 6000, 100


def register(
    root: Path, model: str, name: str | None, experiment: str, uri: str | None, upload: bool
) -> dict[str, Any]:
    """Register a model of the workspace, unless a version with the same content and record is there already.

    Args:
        name: of the registered model; None: that of the stage, with - in place of @.
        uri: of MLflow's tracking server or database; None: the one in the environment.
        upload: also store the files of the model in MLflow.
    Returns:
        {"name", "version", "created", "run", "tags", "inputs": names, "source"}.
    Raises:
        InputError: an empty name, a deleted experiment, not a model of the workspace,
            an incomplete lineage, or MLflow refuses something or cannot be reached.
    """
    if find_spec("mlflow") is None:
        raise ModuleNotFoundError("mlflow is not installed", name="mlflow")
    if name is not None and not name.strip():
        raise InputError(
            "--name: the name is empty", "name the registered model, or leave out --name for that of the stage"
        )
    if not experiment.strip():
        raise InputError(
            "--experiment: the name is empty", "name the experiment, or leave out --experiment for `pedigree`"
        )
    where = _address(uri or os.environ.get(VARIABLE, ""))
    subject = lineage.find(Index(root), model)
    if not subject.run.is_model:
        raise InputError(
            f"{model}: the output of {subject.run.address} is not a model",
            "name a model, such as release or merged@VARIANT",
        )
    document = lineage.document(subject)
    if document["missing"]:
        one = document["missing"][0]
        raise InputError(f"{model}: its lineage is incomplete here: {one['path']} is missing", one["fetch"])
    target = find(root, subject.run.address) if upload else None
    if target:
        target.refuse_unrecorded()
    tags = claim.make(root, subject.run.address).as_fields()
    if tags["pedigree.model"] != subject.run.md5:
        raise InputError(
            f"{model}: is not a model of the workspace",
            f"check out the commit that has it: {subject.run.commit or 'unknown'}",
        )
    name = name or subject.run.address.replace("@", "-")
    return _write(where, name, experiment, subject, document, tags, target)


def _address(uri: str) -> str:
    example = f"e.g. sqlite:///mlflow.db or http://127.0.0.1:5000, also in {VARIABLE}"
    if not uri:
        raise InputError("--tracking-uri: no address of an MLflow server or database", example)
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise InputError("--tracking-uri: not an address", example) from None
    kind = parts.scheme.partition("+")[0]
    if kind not in (*SERVERS, *DATABASES) or (kind in SERVERS and not parts.hostname):
        raise InputError("--tracking-uri: not an address of a server or database", example)
    if kind == "sqlite" and parts.path in IN_MEMORY:
        raise InputError("--tracking-uri: a database in memory, which ends with this command", example)
    if kind in SERVERS and (parts.username or parts.password):
        raise InputError(
            "--tracking-uri: the address has a user or password, which would be shown",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    return uri


def _write(
    uri: str,
    name: str,
    experiment: str,
    subject: lineage.Subject,
    document: Mapping[str, Any],
    tags: Mapping[str, str],
    target: Target | None,
) -> dict[str, Any]:
    client: Any
    with _mlflow(uri) as client:
        found = client.search_registered_models(f"name = '{_quoted(name)}'")
        versions = client.search_model_versions(f"name = '{_quoted(name)}'") if found else []
        inputs = [*_inputs(document)]
        result = {"name": name, "tags": dict(tags), "inputs": [one.dataset.name for one in inputs]}
        # the commit is left out: it is added once the same lock is committed
        same = [
            one
            for one in versions
            if all(one.tags.get(key) == tags[key] for key in ("pedigree.model", "pedigree.audit_sha256"))
        ]
        same = [one for one in same if not target or not one.source.startswith(NOT_FETCHED)]
        if same:
            return {
                **result,
                "version": same[0].version,
                "created": False,
                "run": same[0].run_id,
                "source": same[0].source,
            }
        known = client.get_experiment_by_name(experiment)
        if known and known.lifecycle_stage != "active":
            raise InputError(
                f"--experiment {experiment}: deleted in MLflow",
                "restore it with `mlflow experiments restore`, or name another",
            )
        run = client.create_run(
            known.experiment_id if known else client.create_experiment(experiment),
            run_name=f"{subject.run.address} {subject.run.md5[:8]}",
            tags={
                **tags,
                **({"mlflow.source.git.commit": tags["pedigree.commit"]} if "pedigree.commit" in tags else {}),
            },
        )
        try:
            _log(client, run.info.run_id, document, inputs)
            source = f"{NOT_FETCHED}{subject.run.path}@{subject.run.md5}"
            if target:
                files = sorted(without_exports(target.folder, target.folder.rglob("*")))
                for file in (file for file in files if file.is_file()):
                    place = Path("model", file.parent.relative_to(target.folder)).as_posix()
                    client.log_artifact(run.info.run_id, str(file), place)
                source = f"{run.info.artifact_uri}/model"
                target.refuse_unrecorded()  # so it did not change while it was uploaded
            if not found:
                client.create_registered_model(name)
            version = client.create_model_version(name, source, run.info.run_id, tags=dict(tags))
        except BaseException:
            client.set_terminated(run.info.run_id, "FAILED")
            raise
        client.set_terminated(run.info.run_id)
        return {**result, "version": version.version, "created": True, "run": run.info.run_id, "source": source}


@contextmanager
def _mlflow(uri: str) -> Iterator[Any]:
    """MLflow's client.

    Raises:
        InputError: MLflow refuses something, or cannot be reached.
    """
    for key, value in SET.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError) as error:
        reason = " ".join(str(error).replace(uri, "the address").split())[:300]
        raise InputError(f"MLflow: {reason}", "see that the server or database runs and accepts this") from None
    except ModuleNotFoundError as error:
        if error.name in PACKAGES["mlflow"]:
            raise
        raise InputError(
            f"--tracking-uri: its driver is not installed: {error.name}", f"`pip install {error.name}`"
        ) from None


def _quoted(name: str) -> str:
    if "'" in name:
        raise InputError(f"--name: {name!r} has a quote", "use another name")
    return name


def _inputs(document: Mapping[str, Any]) -> Iterator[Any]:
    """MLflow's inputs of the run: every source of the model's records with its
    sha256, and every data set of its lineage with its hash in dvc.lock."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.entities import Dataset, DatasetInput, InputTag

    def one(name: str, digest: str, facts: Mapping[str, Any], context: str) -> Any:
        source = CodeDatasetSource({key: str(value) for key, value in facts.items()}).to_json()
        return DatasetInput(
            Dataset(name, digest[:SHORT_DIGEST], "code", source), [InputTag("mlflow.data.context", context)]
        )

    for path, facts in document["sources"].items():
        yield one(
            path,
            facts["sha256"],
            {key: facts[key] for key in ("sha256", "rows", "license", "format") if key in facts},
            "source",
        )
    models = {parent["stage"] for parent in document["parents"]} | {document["model"]["stage"]}
    for name, stage in document["stages"].items():
        if name not in models:
            yield one(f"data/{name}", stage["md5"], {"stage": name, "md5": stage["md5"]}, "data set")


def _log(client: Any, run: str, document: Mapping[str, Any], inputs: list[Any]) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    figures = {
        NOT_IN_NAMES.sub("_", f"{stage.replace('@', '/')}/{name}"): float(value)
        for stage, metrics in document["metrics"].items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    client.log_batch(run, metrics=[Metric(name, value, now, 0) for name, value in figures.items()])
    parameters = [
        Param(name, text if len(text) <= LONGEST_PARAMETER else f"{text[: LONGEST_PARAMETER - 1]}…")
        for name, value in published_parameters(document["parameters"]).items()
        for text in [json.dumps(value, sort_keys=True, ensure_ascii=False)]
    ]
    for start in range(0, len(parameters), PER_BATCH):
        client.log_batch(run, params=parameters[start : start + PER_BATCH])
    client.log_inputs(run, inputs)


def as_text(document: Mapping[str, Any]) -> str:
    """For the terminal."""
    return text("mlflow", **document)
