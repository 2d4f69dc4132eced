"""Entries that dvc.lock lacks: lost to a kill, or shorter because dvc.yaml has fewer outputs now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from builders.small_pipeline import git

from dagster_project.lineage.history import lost_entries


def entry(address: str, outs: Sequence[str]) -> str:
    """An entry of dvc.lock as DVC writes it."""
    lines = [f"  {address}:", "    cmd: x", "    deps:", "    - path: a", "      hash: md5", f"      md5: {'0' * 32}"]
    lines += ["      size: 3", *(["    outs:"] if outs else [])]
    for path in outs:
        lines += [f"    - path: {path}", "      hash: md5", f"      md5: {'1' * 32}", "      size: 3"]
    return "".join(f"{line}\n" for line in lines)


def lock(*entries: str) -> str:
    return "schema: '2.0'\nstages:\n" + "".join(entries)


FIRST, VARIANT, LAST = entry("first", ["b", "c"]), entry("made@x", ["data/x", "x.json"]), entry("last", ["d", "e"])
WHOLE = {"first": "[b, c]", "made": '["data/${item}"], metrics: ["${item}.json"]', "last": "[d], plots: [e]"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "dvc.lock").write_text(lock(FIRST, VARIANT, LAST))
    git(tmp_path, "add", "dvc.lock")
    git(tmp_path, "commit", "-qm", "run")
    return tmp_path


def lost(root: Path, text: str, **declared: str) -> list[str]:
    """The lost entries of a dvc.lock, if a dvc.yaml declares these outputs besides or in place of `WHOLE`."""
    outs = WHOLE | declared
    stages = [f"  first: {{cmd: x, outs: {outs['first']}}}", f"  last: {{cmd: x, outs: {outs['last']}}}"]
    stages.append(f"  made: {{foreach: [x], do: {{cmd: x, outs: {outs['made']}}}}}")
    (root / "dvc.yaml").write_text("\n".join(["stages:", *stages]))
    (root / "dvc.lock").write_text(text)
    return lost_entries(root)


def test_an_entry_that_lacks_an_output_which_dvc_yaml_no_longer_has_is_whole(root: Path) -> None:
    assert lost(root, lock(entry("first", ["b"]), VARIANT, LAST), first="[b]") == []
    assert lost(root, lock(FIRST, entry("made@x", ["data/x"]), LAST), made='["data/${item}"]') == []
    assert lost(root, lock(FIRST, VARIANT, entry("last", ["d"])), last="[d]") == []


def test_an_entry_that_lacks_an_output_which_dvc_yaml_has_is_lost(root: Path) -> None:
    assert lost(root, lock(entry("first", ["b"]), VARIANT, LAST)) == ["first"]
    assert lost(root, lock(FIRST, entry("made@x", ["data/x"]), LAST)) == ["made@x"]
    assert lost(root, lock(FIRST, VARIANT, entry("last", ["d"]))) == ["last"]
    assert lost(root, lock(FIRST, VARIANT)) == ["last"]


def test_an_entry_that_ends_within_an_output_is_lost_although_it_names_as_many_as_dvc_yaml(root: Path) -> None:
    whole = lock(FIRST, VARIANT, LAST)
    for end in range(whole.index("    - path: d\n") + 1, whole.index("    - path: e")):
        assert lost(root, whole[:end], last="[d]") == ["last"], whole[:end]
    for end in range(whole.index("    - path: e") + 1, len(whole)):
        assert lost(root, whole[:end]) == ["last"], whole[:end]


def test_an_entry_that_ends_before_its_outputs_is_lost_whatever_dvc_yaml_has(root: Path) -> None:
    whole = lock(FIRST, VARIANT, LAST)
    end = whole.rindex("    - path: a")
    for outs in ("[d, e]", "[d]", "[]"):
        assert lost(root, whole[:end], last=outs) == ["last"]
