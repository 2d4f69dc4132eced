"""The table of the seconds of a run, from a profile by py-spy."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from stage_time import samples  # type: ignore[import-not-found]

DVC = (
    'process 7:"/bin/python3.11 -m dvc repro";thread (0x1): MainThread;main (dvc/cli/__init__.py:1);reproduce'
    " (dvc/repo/reproduce.py:2)"
)


def test_dvc_waits_for_a_stage_and_works_in_its_own_threads(tmp_path: Path) -> None:
    stage = (
        f'{DVC};process 8:"python -m dagster_project run adapter@lora";thread (0x2): MainThread;_run (runpy.py:1);read'
        " (io.py:2)"
    )
    lines = {
        f"{DVC};_run (dvc/stage/run.py:3);communicate (subprocess.py:4);_wait (subprocess.py:5)": 90,
        f"{DVC};transfer (dvc_data/hashfile/transfer.py:3);wait (concurrent/futures/_base.py:4)": 8,
        f"{DVC};commit (dvc/output.py:3)": 4,
        f"{DVC.replace('MainThread', 'ThreadPoolExecutor-0_0')};hash_file (dvc_data/hashfile/hash.py:3)": 8,
        stage: 60,
    }
    profile = tmp_path / "profile"
    profile.write_text("".join(f"{stack} {count}\n" for stack, count in lines.items()))
    assert [*samples(profile)] == [("dvc", "dvc", 8), ("dvc", "dvc", 4), ("adapter@lora", "reading", 60)]
