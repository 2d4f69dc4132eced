"""A stage is reproduced in a scratch clone from its record, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders.keys import write_keys
from builders.small_pipeline import commit, git
from conftest import dvc, edit_params, pedigree
from safetensors.torch import save_file

from dagster_project.commands.elsewhere import compared
from dagster_project.commands.outputs import Outputs, ancestors
from dagster_project.commands.sign import attest
from dagster_project.commands.verify import _unpack, as_text, verdicts, verify
from dagster_project.commands.verify_signatures import verify_signatures
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.records import read_table, write_json
from dagster_project.lineage.first_difference import first_difference
from dagster_project.lineage.history import Objects
from dagster_project.lineage.lineage import Revision
from dagster_project.lineage.runs import outputs_in


def files_of(root: Path) -> dict[str, bytes]:
    """What of a project counts: all but DVC's own scratch."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and ".git" not in path.parts
        and "tmp" not in path.relative_to(root).parts
        and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("folder", ["", "a folder/ml"])
def test_files_of_a_commit_that_archives_leave_out_or_change_are_unpacked_as_they_are(
    tmp_path: Path, folder: str
) -> None:
    root = tmp_path / "repository" / folder
    (root / "data/sources").mkdir(parents=True)
    git(tmp_path / "repository", "init", "-q")
    for name in ("params.yaml", "data/sources/a.jsonl", "data/sources/\u00e9 b.sh"):
        (root / name).write_text(name)
    (root / "data/sources/\u00e9 b.sh").chmod(0o755)
    (root / "data/sources/link").symlink_to("a.jsonl")
    (root / ".gitattributes").write_text("data/sources/** export-ignore\nversion.txt export-subst\n")
    (root / "version.txt").write_text("$Format:%H$")
    commit(root, "x")
    expected = {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".git" not in path.parts
    }
    shutil.rmtree(root / "data")
    for path in (".", "data/sources"):
        _unpack(Revision(root, "HEAD"), tmp_path / "copy" / path, path)
        found = {
            one.relative_to(tmp_path / "copy" / path): one
            for one in (tmp_path / "copy" / path).rglob("*")
            if one.is_file()
        }
        assert {name: one.read_bytes() for name, one in found.items()} == {
            name: content for name, content in expected.items() if path == "." or name.is_relative_to(path)
        }
        shutil.rmtree(tmp_path / "copy")
    _unpack(Revision(root, "HEAD"), tmp_path / "copy")
    assert (tmp_path / "copy/data/sources/link").is_symlink() and os.access(
        tmp_path / "copy/data/sources/\u00e9 b.sh", os.X_OK
    )


def test_a_stage_of_the_real_pipeline_is_reproduced_byte_for_byte(finished: Path) -> None:
    before = files_of(finished)
    done = pedigree(finished, "verify", "adapter@lora", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "identical" and set(document["stages"]) == {"adapter@lora"}
    assert document["machine"]["same_kind"] is True
    assert all(out["made"] == out["recorded"] for out in document["stages"]["adapter@lora"]["outputs"].values())
    assert files_of(finished) == before


@pytest.mark.long
def test_an_online_training_on_tasks_is_reproduced_byte_for_byte(finished: Path) -> None:
    """Its prompts are records of the training split; `preferences` and the
    reward model are dependencies that it does not read."""
    entry = {
        "method": "rloo",
        "adapter": "lora",
        "reward_target": "response",
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "options": {"num_generations": 2, "max_completion_length": 6},
        "samples": 2,
        "max_new_tokens": 4,
        "rewards": {"regex": {"pattern": "[a-mA-M]"}, "length_window": {"weight": 0.1, "max_words": 1}},
    }
    edit_params(finished, lambda values: values["aligned"].update(math=entry))
    made = dvc(finished, "repro", "--single-item", "aligned@math")
    assert made.returncode == 0, made.stderr
    done = pedigree(finished, "verify", "aligned@math", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "identical" and {*document["stages"]} == {"aligned@math"}
    outputs = document["stages"]["aligned@math"]["outputs"]
    assert "data/aligned/math" in outputs and all(out["made"] == out["recorded"] for out in outputs.values())
    assert len(read_table(finished / "data/aligned/math/answers/answers-00000.parquet")) == 12


def test_a_dirty_project_is_verified_against_its_record_and_not_changed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(root / "missing"))  # copies of data are in the project alone
    (root / "data/sources/g.txt").write_text("r1")
    shutil.rmtree(root / "data/inst")
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"testseed": 7', '"testseed": 8'))
    before = files_of(root)
    deep = verify(root, "cmp", deep=True)
    assert deep["verdict"] == "identical" and deep["changed"] == []
    assert list(deep["stages"]) == ["raw", "inst", "tok", "adapter@lora", "adapter@dora", "cmp"]
    assert files_of(root) == before


def test_the_output_of_other_code_is_different_and_the_code_is_named(root: Path) -> None:
    (root / "code/tok.py").write_text("V = 1\n")
    found = verify(root, "tok")
    assert found["verdict"] == "different"
    assert found["differences"][0] == {
        "artifact": "data/tok/train.txt",
        "line": 4,
        "recorded": "V = 0V = 0",
        "made": "V = 0V = 1",
    }
    assert found["causes"][0] == "code/tok.py changed since it was recorded"
    assert "tok: different" in as_text(found)
    assert verify(root, "tok", rev="HEAD")["verdict"] == "identical"


@pytest.mark.long
def test_several_stages_are_verified_by_one_run_of_each_stage_above_them(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pedigree")
    assert verdicts(root, ["tok", "inst"]) == {
        stage: verify(root, stage, deep=True)["verdict"] for stage in ("tok", "inst")
    }
    together = caplog.messages[: caplog.messages.index("reproducing tok") + 1]
    assert [*map(caplog.messages.count, ("reproducing tok", "reproducing inst"))] == [2, 3] and together.count(
        "reproducing inst"
    ) == 1
    (root / "code/inst.py").write_text(
        (root / "code/inst.py").read_text() + "\nopen('data/inst/rows.txt', 'a').write('more')\n"
    )
    assert verdicts(root, ["tok", "inst"]) == {
        "tok": "different",
        "inst": "different",
    }, "what follows a stage that differs is not identical"
    assert verify(root, "tok")["verdict"] == "identical", "although it is, from the recorded input"


def test_a_stage_is_verified_from_the_input_it_read_even_if_that_was_produced_again(root: Path) -> None:
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"minlen": 1', '"minlen": 2'))
    assert dvc(root, "repro", "--single-item", "inst").returncode == 0
    assert verify(root, "tok")["verdict"] == "identical"


@pytest.mark.usefixtures("warm_small")
def test_a_removed_variant_whose_entry_dvc_keeps_is_no_part_of_what_was_made_without_it(
    root: Path, tmp_path: Path
) -> None:
    """DVC removes no entry from dvc.lock, and `cmp` reads the folder of all variants."""
    before = Revision(root, None).lock()
    assert "adapter@dora" in ancestors(Revision(root, None), before, "cmp")
    edit_params(root, lambda values: values["variants"].pop("dora"))
    shutil.rmtree(root / "data/adapter/dora")  # its report stays, in git
    (root / "data/sources/g.txt").write_text("r0\nr1")
    assert dvc(root, "repro", "-q").returncode == 0
    commit(root, "removed")
    lock = Revision(root, None).lock()
    assert lock["adapter@dora"] == before["adapter@dora"], "the entry is that of the earlier data"
    assert ancestors(Revision(root, None), lock, "cmp") == ["raw", "inst", "tok", "adapter@lora"]
    assert ancestors(Revision(root, None), lock, "adapter@dora") == ["raw", "inst", "tok"]
    found = verify(root, "cmp", deep=True)
    assert (found["verdict"], found["changed"]) == ("identical", []) and "adapter@dora" not in found["stages"]
    assert verify(root, "cmp")["changed"] == []
    private, public = write_keys(tmp_path / "keys", "ed25519")
    assert attest(root, "cmp", private)["stages"] == ["raw", "inst", "tok", "adapter@lora", "cmp"]
    assert verify_signatures(root, "cmp", public)["verdict"] == "verified"


def test_a_variant_that_was_read_counts_also_where_another_one_is_unavailable() -> None:
    files = {"1.dir": {"w": "a"}, "2.dir": {"w": "b"}}
    both, first = (
        md5_of_folder({f"{name}/w": md5 for name, md5 in parts}) for parts in ([("x", "a"), ("y", "b")], [("x", "a")])
    )
    outs = {"d/x": "1.dir", "d/y": "2.dir", "d/gone": "3.dir"}
    for removed in ((), ("d/y", "d/gone"), outs):
        assert [*outputs_in("d", both, outs, removed, files.get)] == ["d/x", "d/y"]
        assert [*outputs_in("d", first, outs, removed, files.get)] == ["d/x"]
        assert [*outputs_in("d", "neither.dir", outs, removed, files.get)] == [*outs], "one of them ran again since"


@pytest.mark.parametrize(
    "cmd",
    [
        ["mkdir -p data/two && cd data/two && echo a > a", "echo b > data/two/b"],
        "mkdir -p data/two && cd data/two && echo a > a\necho b > data/two/b\n",
        "mkdir -p data/two; [[ -d data/two ]] && echo a > data/two/a && cat <(echo b) > data/two/b",
    ],
)
def test_several_commands_of_a_stage_run_one_after_the_other_in_the_shell_of_the_user(
    root: Path, cmd: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", shutil.which("bash") or "")
    document = json.loads((root / "dvc.yaml").read_text())
    document["stages"]["two"] = {"cmd": cmd, "deps": ["data/sources/g.txt"], "outs": ["data/two"]}
    (root / "dvc.yaml").write_text(json.dumps(document))
    made = dvc(root, "repro", "two")
    assert made.returncode == 0, made.stderr
    assert {path.name for path in (root / "data/two").iterdir()} == {"a", "b"}
    assert verify(root, "two")["verdict"] == "identical"


def test_a_stage_is_verified_from_recorded_parameters_with_emoji(root: Path) -> None:
    before = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(before.replace('"testseed": 7', '"testseed": "\U0001f98a"'), encoding="utf-8")
    assert dvc(root, "repro", "tok").returncode == 0
    (root / "params.yaml").write_text(before.replace('"minlen": 1', '"minlen": 2'))
    assert dvc(root, "repro", "--single-item", "inst").returncode == 0
    assert verify(root, "tok")["verdict"] == "identical"


@pytest.mark.parametrize(("file", "verdict"), [("own.yaml", "identical"), ("own.json", "different")])
def test_a_stage_is_verified_from_recorded_parameters_of_other_files_or_these_are_named(
    root: Path, file: str, verdict: str
) -> None:
    document = json.loads((root / "dvc.yaml").read_text())
    read = f"import ruamel.yaml as y; print(y.YAML(typ='safe').load(open('{file}'))['a']['b'])"
    document["stages"]["two"] = {
        "cmd": f'python -c "{read}" > data/two',
        "deps": ["data/sources/g.txt"],
        "params": [{file: ["a.b"]}],
        "outs": ["data/two"],
    }
    (root / "dvc.yaml").write_text(json.dumps(document))
    (root / file).write_text('{"a": {"b": 1}, "c": 2}')
    made = dvc(root, "repro", "two")
    assert made.returncode == 0, made.stderr
    (root / file).write_text('{"a": {"b": 7}, "c": 2}')
    found = verify(root, "two")
    assert found["verdict"] == verdict
    assert found["changed"] == ([] if verdict == "identical" else [file])
    assert verdict == "identical" or found["causes"][0] == f"{file} changed since it was recorded"


def test_without_the_cache_nothing_is_done_and_the_error_names_what_to_fetch(root: Path) -> None:
    shutil.rmtree(root / ".dvc/cache/files")
    with pytest.raises(InputError, match="data/inst: 1 object") as said:
        verify(root, "tok")
    assert "dvc pull data/inst" in str(said.value)


def test_an_input_that_was_tampered_with_is_not_used(root: Path) -> None:
    content = (root / "data/inst/rows.txt").read_bytes()
    for path in (root / ".dvc/cache/files").rglob("*"):
        if path.is_file() and path.read_bytes() == content:
            path.chmod(0o644)
            path.write_bytes(b"TAMPERED")
    with pytest.raises(CheckFailed, match="tampered with"):
        verify(root, "tok")


@pytest.mark.parametrize("name", ["rows.txt", "row2.txt"])
def test_a_list_of_files_that_was_tampered_with_is_named_and_not_used(root: Path, name: str) -> None:
    """Whether or not it still names objects that the cache has."""
    oid = Revision(root, None).lock()["inst"]["outs"][0]["md5"]
    listing = Objects(root).at(oid)
    [entry] = json.loads(listing.read_bytes())
    listing.chmod(0o644)
    md5 = entry["md5"] if name != "rows.txt" else "0" * 32
    listing.write_text(json.dumps([{"md5": md5, "relpath": name}]))
    with pytest.raises(CheckFailed, match=f"data/inst: cache object {oid} does not match its name"):
        verify(root, "tok")


def test_likely_causes_are_differences_in_the_environment(root: Path) -> None:
    def causes(environment: dict[str, str], then: dict[str, Any], now: dict[str, Any]) -> list[str]:
        write_json(root / "data/reports/adapter/lora.json", {"environment": environment})
        write_json(store.at("ab12"), then)
        write_json(store.at("cd34.dir"), [{"relpath": "training.json", "md5": "ab12"}])
        write_json(root / "data/adapter/lora/training.json", now)
        lock = {"adapter@lora": {"outs": [{"path": "data/adapter/lora", "md5": "cd34.dir"}]}}
        return Outputs(Revision(root, None), lock, store, root).causes("adapter@lora", compared(*machines))

    machines: list[dict[str, str] | None] = [None, None]
    store = Objects(root)
    same = {"threads": 2, "dtype": "float32"}
    here = {"numpy": version("numpy")}
    assert causes(here | {"peft": "0.0"}, same, same) == [
        f"peft 0.0 when adapter@lora was produced, {version('peft')} now"
    ]
    assert causes(here, same, same | {"threads": 1}) == ["threads: 2 then, 1 now"]
    assert causes(here, same, same)[0].startswith("unknown: the same versions as when adapter@lora was produced")
    assert causes({}, {}, {})[0].startswith("unknown: the earlier versions are not recorded")
    machines[:] = {"cpu": "A", "packages": "1" * 64}, {"cpu": "A", "packages": "2" * 64}
    assert causes(here, same, same) == [f"other installed packages: sha256 {'1' * 16} then, {'2' * 16} now"]


def test_an_unknown_stage_or_revision_is_one_message(root: Path) -> None:
    with pytest.raises(InputError, match="nothing: no such stage"):
        verify(root, "nothing")
    with pytest.raises(InputError, match="no revision"):
        verify(root, "tok", rev="0" * 40)


def _tensors(path: Path, second: float) -> None:
    save_file(
        {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor([1.0, second]), "c": torch.tensor(second)}, path
    )


def _table(path: Path, second: str) -> None:
    pq.write_table(pa.table({"id": ["x", "y"], "turns": [[{"content": "hi"}], [{"content": second}]]}), path)


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        (
            "model.safetensors",
            lambda path, new: _tensors(path, 2.5 if new else 2.0),
            {"tensor": "b", "max_abs_difference": 0.5, "tensors_differing": 2, "tensors": 3},
        ),
        (
            "rows.parquet",
            lambda path, new: _table(path, "ho" if new else "hi"),
            {"row": 1, "field": "turns[0].content", "recorded": "hi", "made": "ho"},
        ),
        (
            "a.json",
            lambda path, new: path.write_text(json.dumps({"a": 1, "b": [1, {"c": new}]})),
            {"field": "b[1].c", "recorded": "false", "made": "true"},
        ),
        (
            "a.csv",
            lambda path, new: path.write_text(f"step,loss\n1,{2 if new else 3}\n"),
            {"line": 1, "recorded": "1,3", "made": "1,2"},
        ),
        ("a.bin", lambda path, new: path.write_bytes(b"\xff\x00" + bytes([new])), {"byte": 2}),
        ("broken.safetensors", lambda path, new: path.write_bytes(b"12" + bytes([new])), {"byte": 2}),
    ],
)
def test_the_first_difference_is_named_by_tensor_row_field_line_or_byte(
    tmp_path: Path, name: str, write: Any, expected: dict[str, Any]
) -> None:
    files = [tmp_path / folder / name for folder in ("recorded", "made")]
    for new, file in enumerate(files):
        file.parent.mkdir()
        write(file, bool(new))
    assert first_difference(*files) == expected
