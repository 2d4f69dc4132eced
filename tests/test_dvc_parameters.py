"""Values of parameters read once a file are those that DVC reads each time, and
differ from dvc.lock where DVC says so."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from dpath.exceptions import InvalidKeyName
from dvc.dependency.param import BadParamFileError, ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage

from dagster_project.orchestration.dvc_parameters import ParameterFiles

NAMES = ["a", "b", "lora", "16", "x-y", "é"]
KEYS = [
    "",
    *NAMES,
    "a.b",
    "a.lora",
    "lora.16",
    "a.b.lora",
    "a.0",
    "b.1",
    "a.*",
    "l?ra",
    "a.b.c.d",
    ".a",
    "a.",
    "lora.x-y",
]


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.choice(
        ["map", "map", "list", "text", "number", "none", "bool"] if depth < 3 else ["text", "number", "none", "bool"]
    )
    if kind == "map":
        return {name: value(draw, depth + 1) for name in draw.sample(NAMES, draw.randint(0, 4))}
    if kind == "list":
        return [value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return {
        "text": draw.choice(["", "7", "ja"]),
        "number": draw.choice([0, 7, 0.5]),
        "none": None,
        "bool": draw.random() < 0.5,
    }[kind]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Repo:
    return Repo.init(str(tmp_path_factory.mktemp("project")), no_scm=True)


def dependency(repo: Repo, path: Path, params: Any) -> ParamsDependency:
    return ParamsDependency(
        PipelineStage(repo, str(Path(repo.root_dir, "dvc.yaml")), name="s"), str(path), params, repo
    )


def outcome(function: Any) -> Any:
    """What a call returns, or how it fails."""
    try:
        return function()
    except (DvcException, KeyError, ValueError, TypeError, InvalidKeyName) as error:
        return type(error), str(error)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_random_files_are_read_and_compared_as_by_dvc(repo: Repo, ending: str) -> None:
    draw = random.Random(0)
    seen = {"same": 0, "changed": 0, "missing": 0}
    for number in range(300):
        path = Path(repo.root_dir, f"p{number}.{ending}")
        content = {name: value(draw) for name in draw.sample(NAMES, draw.randint(0, 5))}
        path.write_text(json.dumps(content))
        files = ParameterFiles()
        for _ in range(4):
            keys = draw.sample(KEYS, draw.randint(0, 4))
            read = outcome(lambda: dependency(repo, path, keys).read_params())  # noqa: B023
            assert outcome(lambda: files.values(dependency(repo, path, keys))) == read, (content, keys)  # noqa: B023
            if not isinstance(read, dict):
                continue
            recorded = {
                key: draw.choice([value(draw), now]) if draw.random() < 0.3 else now for key, now in read.items()
            }
            if draw.random() < 0.2:
                recorded[draw.choice(NAMES)] = 3
            dep = dependency(repo, path, recorded if draw.random() < 0.9 else keys)
            status = outcome(dep.status)
            assert outcome(lambda: files.changed(dep)) == (bool(status) if isinstance(status, dict) else status), (  # noqa: B023
                content,
                recorded,
            )
            seen["changed" if status else "same"] += 1
            seen["missing"] += len(read) < len(keys)
    assert min(seen.values()) > 50, seen


def test_python_and_toml_files_are_read_as_by_dvc(repo: Repo) -> None:
    for name, text in {"p.py": "class a:\n    b = 3\nlora = (1, 2)\n", "p.toml": "lora = [1, 2]\n[a]\nb = 3\n"}.items():
        path = Path(repo.root_dir, name)
        path.write_text(text)
        recorded = {"a.b": 3, "lora": [1, 2]}
        dep = dependency(repo, path, recorded)
        assert (
            ParameterFiles().values(dep)
            == dep.read_params()
            == {"a.b": 3, "lora": (1, 2) if name == "p.py" else [1, 2]}
        )
        assert not ParameterFiles().changed(dep) and not dep.status()
        assert ParameterFiles().changed(dependency(repo, path, {**recorded, "a.b": 4}))


def test_a_file_that_is_not_there_or_cannot_be_read_is_as_for_dvc(repo: Repo) -> None:
    missing = dependency(repo, Path(repo.root_dir, "none.yaml"), {"a": 1})
    assert ParameterFiles().values(missing) == missing.read_params() == {}
    assert ParameterFiles().changed(missing) and missing.status()
    broken = Path(repo.root_dir, "broken.yaml")
    broken.write_text("a: [1\n")
    with pytest.raises(BadParamFileError):
        ParameterFiles().values(dependency(repo, broken, ["a"]))


def test_a_file_is_parsed_once_for_all_stages(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.utils import serialize

    path = Path(repo.root_dir, "many.yaml")
    path.write_text(json.dumps({f"v{number}": number for number in range(50)}))
    calls = []
    load = serialize.load_path
    monkeypatch.setattr(serialize, "load_path", lambda *arguments: calls.append(1) or load(*arguments))
    files = ParameterFiles()
    for number in range(50):
        dep = dependency(repo, path, {f"v{number}": number})
        assert files.values(dep) == {f"v{number}": number} and not files.changed(dep)
    assert len(calls) == 1
