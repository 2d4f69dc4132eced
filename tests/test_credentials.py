"""No credential that a settings file holds reaches a message, also where the file is damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import tool

from dagster_project.core.errors import InputError
from dagster_project.lineage.history import Objects
from dagster_project.orchestration.dagster.instance import open_at
from dagster_project.orchestration.dvc import read_stages

SECRET = "5tr0ng-s3cret"


@pytest.fixture(scope="module")
def root(_made: Path) -> Path:
    return _made


def without_secret(error: InputError) -> str:
    text = f"{error.what}\n{error.hint}"
    assert SECRET not in text and SECRET.partition("-")[2] not in text
    return text


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (f"[core]\n    remote = s\n['remote \"s\"']\n    secret_access_key {SECRET}\n", 4),
        (f"password = {SECRET}\n", 1),
    ],
)
def test_an_invalid_line_of_dvc_settings_is_named_and_not_quoted(
    settings: str, line: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path))
    (tmp_path / "config").write_text(settings)
    with pytest.raises(InputError, match="DVC's configuration") as read:
        _ = Objects(root).cache
    assert f"line {line} " in without_secret(read.value)
    with pytest.raises(InputError, match="config file error") as by_dvc:
        read_stages(root)
    without_secret(by_dvc.value)


def test_an_invalid_line_of_gits_settings_is_not_quoted(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / ".gitconfig").write_text(f'[remote "origin"]\n\turl "https://me:{SECRET}@example.org/x"\n')
    with pytest.raises(InputError, match=r"\.gitconfig: git's configuration cannot be read") as raised:
        read_stages(root)
    without_secret(raised.value)


@pytest.mark.parametrize(
    "address",
    [f"postgresql://me:{SECRET}", f"postgresql//me:{SECRET}@127.0.0.1/y", f"postgresql://me:{SECRET}@127.0.0.1:x/y"],
)
def test_an_address_of_postgres_that_is_none_is_one_message_without_it(address: str, tmp_path: Path) -> None:
    tool("dagster_postgres")
    (tmp_path / "dagster.yaml").write_text(f"storage: {{postgres: {{postgres_url: '{address}'}}}}\n")
    with pytest.raises(InputError, match=r"dagster\.yaml: the address of its database is not one") as raised:
        open_at(tmp_path)
    assert "%2F" in without_secret(raised.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"https://me:{SECRET}@example.org/x.jsonl", "https:/***@example.org/x.jsonl"),
        (f"https://{SECRET}@example.org/x.jsonl", "https:/***@example.org/x.jsonl"),
        (f"s3://me:{SECRET}@bucket/x.jsonl", "s3:/me:***@bucket/x.jsonl"),
        (f"https://b.example.org/x.jsonl?X-Amz-Signature={SECRET}&a=1", "X-Amz-Signature=***&a=1"),
        ("data/me:you@example.org/x.jsonl", "data/me:you@example.org/x.jsonl"),  # a path
    ],
)
def test_a_message_has_no_credential_of_an_address(address: str, shown: str, check: Any) -> None:
    lines = list[str]()

    class OfDagster(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, handler = logging.getLogger("pedigree"), OfDagster()
    log.addHandler(handler)
    try:
        done = check(address, "--json")
    finally:
        log.removeHandler(handler)
    assert done.code == 2
    for text in (done.out, done.err, *lines):
        assert SECRET not in text
    assert shown in done.out.replace("//", "/") and shown in done.err.replace("//", "/")
    assert any(shown in line.replace("//", "/") for line in lines)
