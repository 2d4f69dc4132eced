"""The machine is recorded where floating-point numbers are computed, and nowhere else; data stages do not depend on it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dagster_project.orchestration.machine import machine
from dagster_project.pipeline import FLOATING_POINT

ISA = {  # oneDNN's own words for its instruction sets (src/cpu/x64/cpu_isa_traits.cpp)
    "Intel SSE4.1": "SSE41",
    "Intel AVX": "AVX",
    "Intel AVX2": "AVX2",
    "Intel AVX2 with Intel DL Boost": "AVX2_VNNI",
    "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions": "AVX512_CORE",
    "Intel AVX-512 with Intel DL Boost": "AVX512_CORE_VNNI",
    "Intel AVX-512 with Intel DL Boost and bfloat16 support": "AVX512_CORE_BF16",
    "Intel AVX 10.1": "AVX512_CORE_FP16",
}
ASK = """
import json, torch
from dagster_project.orchestration.machine import machine
torch.ones(8, 8).to_mkldnn()  # oneDNN introduces itself
print(json.dumps(machine()))
"""


def ask(**environment: str) -> tuple[dict[str, Any], str]:
    """The machine as a process of its own records it, and the instruction set that oneDNN prints there."""
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, "ONEDNN_VERBOSE": "1", **environment}, capture_output=True, text=True, check=True
    )
    *lines, document = done.stdout.splitlines()
    return json.loads(document), next(line.partition("isa:")[2] for line in lines if "isa:" in line)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's instruction sets of x86")
@pytest.mark.parametrize("limit", ["", "SSE41", "avx2", "AVX512_CORE_BF16", "UNKNOWN"])
def test_the_instruction_set_is_the_one_that_onednn_says_it_uses(limit: str) -> None:
    recorded, printed = ask(ONEDNN_MAX_CPU_ISA=limit)
    if printed in ISA:  # else a processor with AMX, whose words are not known here
        assert recorded["instruction_set"]["onednn"] == ISA[printed]
    assert recorded.get("limits", {}).get("ONEDNN_MAX_CPU_ISA", "") == limit


def test_a_forced_instruction_set_of_torch_is_recorded() -> None:
    assert ask(ATEN_CPU_CAPABILITY="default")[0]["instruction_set"]["torch"] in {"DEFAULT", "NO AVX"}


def test_the_record_has_no_host_name_path_or_time_and_is_the_same_each_time() -> None:
    first = machine()
    assert first == machine() == json.loads(json.dumps(first))
    assert set(first) - {"limits", "cuda"} == {
        "cpu", "architecture", "vendor", "flags", "caches", "instruction_set", "threads", "torch", "libraries",
    }  # fmt: skip
    text = json.dumps(first)
    assert platform.node() not in text and "/" not in text and str(Path.home()) not in text


def test_the_machine_is_in_the_report_of_each_stage_that_computes_with_floats_and_in_no_output(finished: Path) -> None:
    reports = sorted((finished / "data/reports").rglob("*.json"))
    having = {
        path.relative_to(finished / "data/reports").parts[0].removesuffix(".json")
        for path in reports
        if "machine" in json.loads(path.read_text())
    }
    assert having == FLOATING_POINT
    for path in (finished / "data").rglob("*.json"):
        if path not in reports and path.relative_to(finished / "data").parts[0] not in {"pages", "live"}:
            assert "instruction_set" not in path.read_text(), path
