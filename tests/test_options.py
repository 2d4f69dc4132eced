"""Options of the command line: none is accepted and then without effect, and
nothing is announced that does not happen."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.commands import exit_code

from dagster_project.__main__ import main
from dagster_project.cli.output import print_error, print_result, write
from dagster_project.cli.parser import parser, refuse_separators
from dagster_project.core.errors import InputError
from dagster_project.lineage import diff
from dagster_project.lineage.impact import text

NAMES_A_FILE = re.compile(r"FILE|FOLDER|\.html|\.jsonl")
REFUSED_LATER = {"--all", "--template"}
"""Each has a message of its own for an empty name."""


def commands(of: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    nested = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    yield from (one for action in nested for child in action.choices.values() for one in commands(child))
    if not nested:
        yield of


def test_every_option_that_names_a_file_refuses_an_empty_name() -> None:
    """It would have the effect of no option, e.g. where a variable of a script
    is not set: `--policy ""` would check by the default policy."""
    actions = [action for command in commands(parser()) for action in command._actions if action.nargs in {None, "?"}]
    files = [
        one
        for one in actions
        if NAMES_A_FILE.search(str(one.metavar)) and not REFUSED_LATER.intersection(one.option_strings)
    ]
    assert len(files) > 20
    for one in files:
        assert callable(one.type), f"{one.option_strings} accepts an empty name"
        with pytest.raises(argparse.ArgumentTypeError, match="the name is empty"):
            one.type("")


@pytest.mark.parametrize(
    "arguments",
    [
        "init",
        "check x --policy",
        "chat --compare",
        "share --remote",
        "sweep splits --to",
        "mlflow release --tracking-uri",
        "mlflow release --name",
        "ui --host",
        "export release --rev",
        "audit release --rev",
        "audit --against-rev",
        "init --base-model",
        "init --license",
        "plan --model",
        "bisect --prompt x --expect y",
        "why --diff release",
        "audit --diff release",
    ],
)
def test_an_empty_name_ends_with_exit_code_2(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments.split(), "", "--project", str(tmp_path)])
    assert ended.value.code == 2 and "the name is empty" in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "arguments",
    [
        "why release --prompt=--",
        "why release --prompt x --top=--",
        "bisect release --expect x --prompt=--",
        "impact --text=--",
        "audit release --as-of=--",
        "audit release --html=--",
        "audit release --project=--",
    ],
)
def test_two_hyphens_as_a_value_are_refused(arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse takes them as an empty list before Python 3.13: `--as-of=--` would act as if it were absent."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments.split(), "--json"])
    shown = capsys.readouterr()
    option = arguments.split()[-1].removesuffix("=--")
    assert ended.value.code == 2 and f"argument {option}: expected one argument" in shown.err
    assert json.loads(shown.out)["error"].startswith(f"argument {option}")
    refuse_separators(["why", "--answer=a=--", "--", "--top=--"])


@pytest.mark.parametrize(
    "arguments",
    [
        "impact --containing",
        "impact --text",
        "impact --source",
        "erase --containing",
        "why release --prompt",
        "why release --answer",
        "chat --once",
        "chat --system",
        "bisect release --expect x --prompt",
        "init --license",
    ],
)
def test_a_text_that_is_not_utf8_is_refused(arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No row contains such a text, so `impact` would answer no, whatever the same name in UTF-8 is in."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments.split(), "M\udcfcller", "--project", str(tmp_path)])
    assert ended.value.code == 2 and "bytes that are not UTF-8" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_text_is_written_into_a_pipe_or_the_target_of_a_link_and_replaces_neither(tmp_path: Path) -> None:
    """As root, a file in the place of /dev/null or /dev/stdout would break the machine."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (pipe, link):
            write("--out", path, "the text")
        assert os.read(reader, 99) == b"the text" and pipe.is_fifo()
    finally:
        os.close(reader)
    assert link.is_symlink() and target.read_text() == "the text"


@pytest.mark.parametrize(
    "command", ["export release --format spdx --issued", "audit release --as-of", "push release a/b --issued"]
)
def test_a_date_before_1970_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A year of three digits ended in a traceback of the library for SPDX."""
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "0999-12-31", "--project", str(tmp_path)])
    assert ended.value.code == 2 and "before 1970" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", ["--endpoint http://127.0.0.1:9/v1", "--model m", "--key-env JUDGE_KEY", "--price 1 2"]
)
def test_the_reward_model_as_judge_has_no_options_of_an_endpoint(
    more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text("reward_model: {}")
    assert main(["judge", "--reward-model", *more.split(), "--project", str(tmp_path)]) == 2
    assert "exactly one judge" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["--rev HEAD", "--against-rev HEAD", "--where"])
def test_an_audit_of_an_exported_file_refuses_options_that_it_does_not_use(
    more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = json.dumps(
        {"__metadata__": {"pedigree.model": "0" * 32 + ".dir", "pedigree.stage": "merged@lora"}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    exported = ["audit", str(tmp_path / "model.safetensors"), "--project", str(tmp_path)]
    assert main(exported) != 2, "without the option it is examined"
    assert main([*exported, *more.split()]) == 2
    assert "not for exported files" in capsys.readouterr().err


@pytest.mark.parametrize("ports", ["--port 70000", "--port 3111 --pages-port 3111"])
def test_addresses_of_the_ui_are_printed_only_if_its_ports_are_free(
    ports: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").touch()
    assert main(["ui", *ports.split(), "--json", "--project", str(tmp_path)]) == 2
    assert "url" not in capsys.readouterr().out


def test_the_terminal_says_how_many_records_of_a_difference_it_leaves_out() -> None:
    def records(count: int) -> list[dict[str, object]]:
        return [{"example_id": f"{i:032x}", "splits": ["train"], "rows": [f"a.jsonl:{i}"]} for i in range(count)]

    model = {"stage": "merged@lora", "path": "data/merged/lora", "md5": "0" * 32}
    same = {
        name: {}
        for name in ("sources", "other_files", "base_model", "parameters", "code", "environment", "machine", "metrics")
    }
    same |= {"trained_on": None}
    found = {"added": records(diff.SHOWN + 5), "removed": records(diff.SHOWN), "changed": [], "moved": []}
    shown = diff.as_text({"models": [model, model], "same": False, "records": found, "missing": [], **same})
    assert "more, which --json lists: 5 added\n" in shown + "\n"
    assert "more, " not in diff.as_text(
        {"models": [model, model], "same": False, "records": {**found, "added": []}, "missing": [], **same}
    )


def test_the_terminal_says_how_many_matches_of_a_text_it_leaves_out() -> None:
    match = {"example_id": "0" * 32, "role": "user", "field": "content", "excerpt": "x"}
    looked = dict.fromkeys(("models", "data_sets", "rows", "commits", "commits_in_reflog", "cached_runs"), 0)
    answer = {
        "asked": {"containing": "x"},
        "verdict": "no",
        "records": [],
        "models": [],
        "unknown": [],
        "looked_at": looked,
        "unreadable": [],
        "shallow": False,
    }
    assert "3 more, which --json lists" in text.as_text({**answer, "matches": [match] * (text.SHOWN + 3)})
    assert "more, " not in text.as_text({**answer, "matches": [match] * text.SHOWN})


def test_what_a_function_of_the_user_prints_is_not_in_the_document_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from dagster_project.orchestration import run_stage

    def run(root: Path, address: str) -> dict[str, str]:
        print("scoring")
        return {"stage": address}

    monkeypatch.setattr(run_stage, "run_stage", run)
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    assert main(["run", "splits", "--json", "--project", str(tmp_path)]) == 0
    written = capfd.readouterr()
    assert json.loads(written.out) == {"stage": "splits"} and "scoring" in written.err


@pytest.mark.parametrize(
    "arguments", ["audit x", "audit x --rev", "check", "check none.jsonl", "no-such-command", "sync --unknown"]
)
def test_an_error_is_one_document_with_json(arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input and wrong usage; stdout was empty, which no reader of JSON accepts."""
    for options, expected in (([], False), (["--json"], True)):
        assert (
            exit_code(*arguments.split(), *options, *(["--project", str(tmp_path)] if arguments == "audit x" else []))
            == 2
        )
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and bool(said.out) == expected
    document = json.loads(said.out)
    assert said.err == f"error: {document['error']}\nhint: {document['hint']}\n"


def test_nothing_is_added_to_a_document_that_was_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`ui --json` and `serve --json` print their addresses, and may end with an error later."""
    options = argparse.Namespace(json=True)
    print_result(options, {"url": "here"}, str)
    print_error(options, InputError("the server ended", "see its log"))
    assert json.loads(capsys.readouterr().out) == {"url": "here"}
