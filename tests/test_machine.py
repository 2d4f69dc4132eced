"""The machine is recorded where floating-point numbers are computed; data
stages do not depend on it, and trainings within bounds."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import dvc, run
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from dagster_project.commands.elsewhere import compared, differences
from dagster_project.commands.requirements import versions_in
from dagster_project.core.records import write_json
from dagster_project.lineage.tolerance import deviations
from dagster_project.orchestration.machine import _caches, machine, packages
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
        [sys.executable, "-c", ASK],
        env={**os.environ, "ONEDNN_VERBOSE": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, document = done.stdout.splitlines()
    return json.loads(document), next(line.partition("isa:")[2] for line in lines if "isa:" in line)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's instruction sets of x86")
@pytest.mark.parametrize(
    "limit",
    ["", *(pytest.param(name, marks=pytest.mark.long) for name in ("SSE41", "avx2", "AVX512_CORE_BF16", "UNKNOWN"))],
)
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
        "packages",
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


def test_a_cache_whose_size_the_firmware_does_not_state_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, facts in enumerate(
        ({"level": "1", "type": "Data"}, {"level": "2", "type": "Unified", "size": "512K"}, {})
    ):
        (tmp_path / f"index{number}").mkdir()
        for name, value in facts.items():
            (tmp_path / f"index{number}" / name).write_text(f"{value}\n")
    monkeypatch.setattr("dagster_project.orchestration.machine.CACHES", tmp_path)
    assert _caches() == {"L2": "512K"}


def test_the_hash_of_the_environment_is_that_of_the_names_and_versions_that_pip_lists() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    ).stdout
    lines = sorted({f"{canonicalize_name(one['name'])}=={one['version']}\n" for one in json.loads(listed)})
    assert packages() == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_environment_does_not_depend_on_what_a_stage_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    vendored = str(Path(setuptools.__file__).parent / "_vendor")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != vendored])
    before = packages()
    monkeypatch.setattr(sys, "path", [*sys.path, vendored])  # as setuptools does when it is imported
    assert list(Path(vendored).glob("*.dist-info")) and packages() == before


def test_what_an_interrupted_installation_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = packages()
    (tmp_path / "half-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packages() == before
    assert versions_in([str(tmp_path)]) == {}
    importlib.import_module("importlib_metadata")  # from now on, distributions are found by this library
    assert packages() == before
    assert versions_in([str(tmp_path)]) == {}


FORCED = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Prescott",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    "ARROW_USER_SIMD_LEVEL": "NONE",
    "NUMBA_CPU_NAME": "generic",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F",
}
"""Another instruction set for every library that computes: torch, oneDNN, numpy
with its BLAS, Arrow, numba and the C library."""


def verified(root: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    done = run([sys.executable, "-m", "dagster_project", "verify", *arguments, "--json"], root, **environment)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_data_stages_give_the_same_bytes_with_another_instruction_set(finished: Path) -> None:
    """`preferences` with all stages before it; of those before `tokenized`, each is among them."""
    checked: set[str] = set()
    for arguments in (["preferences", "--deep"], ["tokenized"]):
        code, document = verified(finished, *arguments, **FORCED)
        assert (code, document["verdict"], document["differences"]) == (0, "identical", [])
        checked |= set(document["stages"])
    assert checked == {
        "base_model",
        "raw_examples",
        "instructions",
        "splits",
        "tokenized",
        "raw_preferences",
        "preferences",
    }


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_a_training_on_another_instruction_set_is_elsewhere_and_a_tampered_one_is_different(finished: Path) -> None:
    """On the same one it is identical: tests/test_verify.py."""
    code, document = verified(finished, "adapter@lora", **FORCED)
    assert (code, document["verdict"], document["machine"]["same_kind"]) == (0, "elsewhere", False)
    assert document["machine"]["now"]["instruction_set"] == {"torch": "DEFAULT", "onednn": "SSE41"}
    listed = document["stages"]["adapter@lora"]["deviations"]
    assert {"update", "number"} <= {one["measure"] for one in listed} and all(
        0 < one["value"] <= one["bound"] for one in listed
    )

    weights = load_file(finished / "data/adapter/lora/adapter_model.safetensors")
    changed = next(name for name in weights if "lora_B" in name)
    weights[changed] *= 1.5
    save_file(weights, finished / "data/adapter/lora/adapter_model.safetensors")
    assert dvc(finished, "commit", "-f", "adapter@lora").returncode == 0
    code, document = verified(finished, "adapter@lora", **FORCED)
    assert (code, document["verdict"], document["machine"]["same_kind"]) == (1, "different", False)
    assert any(changed in cause and "more than the" in cause for cause in document["causes"])
    code, document = verified(finished, "adapter@lora")
    assert (code, document["verdict"], document["machine"]["same_kind"]) == (1, "different", True)
    assert "a fault" in document["causes"][-1]


@pytest.mark.long
def test_a_report_without_a_machine_is_verified_as_before(finished: Path) -> None:
    report = finished / "data/reports/adapter/lora.json"
    write_json(report, {key: value for key, value in json.loads(report.read_text()).items() if key != "machine"})
    assert dvc(finished, "commit", "-f", "adapter@lora").returncode == 0
    code, document = verified(finished, "adapter@lora")
    assert (code, document["verdict"]) == (
        0,
        "identical",
    )  # the reproduced report has a machine, and nothing else that is new
    assert document["machine"]["recorded"] is None and document["machine"]["same_kind"] is None
    code, document = verified(finished, "adapter@lora", **FORCED)
    assert (code, document["verdict"]) == (1, "different")
    assert "unknown kind of machine" in document["causes"][-1]


def test_the_name_of_a_processor_makes_no_other_kind() -> None:
    one = {"cpu": "A", "vendor": "V", "flags": ["avx", "avx2"], "instruction_set": {"torch": "AVX2", "onednn": "AVX2"}}
    assert compared(one, {**one, "cpu": "B"})["same_kind"] is True
    assert compared({**one, "packages": "1"}, {**one, "packages": "2"})["same_kind"] is True, (
        "few packages change a result"
    )
    assert compared(one, {**one, "flags": ["avx", "fma"]})["same_kind"] is False
    assert compared(one, None)["same_kind"] is None
    assert list(
        differences(one, {**one, "flags": ["avx", "fma"], "instruction_set": {"torch": "AVX2", "onednn": "AVX"}})
    ) == [
        "machine.flags: without avx2 now, with fma now",
        "machine.instruction_set.onednn: AVX2 then, AVX now",
    ]


def measured(tmp_path: Path, name: str, write: Callable[[Path, bool], object], *starts: Path) -> dict[str, float]:
    files = [tmp_path / folder / name for folder in ("recorded", "made")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        write(file, file.parent.name == "made")
    return {one.measure: one.value for one in deviations(name, *files, starts)}


def test_adapters_are_compared_by_their_update(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b, noise = torch.randn(4, 30), torch.randn(20, 4), torch.randn(20, 4) * 1e-3

    def write(path: Path, made: bool) -> None:
        save_file({"x.lora_A.weight": a, "x.lora_B.weight": b + noise * made}, path)

    expected = float((noise @ a).norm() / (b @ a).norm())
    assert measured(tmp_path, "adapter_model.safetensors", write) == {"update": pytest.approx(expected, rel=1e-4)}


def test_whole_models_are_compared_by_what_they_learned(tmp_path: Path) -> None:
    start = torch.ones(8)
    save_file({"w": start}, tmp_path / "base.safetensors")
    found = measured(
        tmp_path,
        "m.safetensors",
        lambda path, made: save_file({"w": start + (0.02 if made else 0.01)}, path),
        tmp_path / "base.safetensors",
    )
    assert found["update"] == pytest.approx(1.0, rel=1e-3) and found["weight"] == pytest.approx(0.01 / 1.01, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_within_no_bound(tmp_path: Path, value: float) -> None:
    found = measured(
        tmp_path,
        "m.safetensors",
        lambda path, made: save_file({"w": torch.tensor([1.0, value if made else 2.0])}, path),
    )
    assert found["weight"] == float("inf")


@pytest.mark.parametrize(
    ("recorded", "made", "expected"),
    [
        ({"loss": 2.0}, {"loss": 2.5}, {"number": 0.25}),
        ({"a": 0.5, "a_interval": [0.3, 0.6]}, {"a": 0.4, "a_interval": [0.2, 0.5]}, {"interval": 0.5}),
        ({"a": 0.5, "a_interval": [0.3, 0.6]}, {"a": 0.65, "a_interval": [0.2, 0.8]}, {"interval": 1.5}),
        ({"a": 1.0, "a_interval": [1.0, 1.0]}, {"a": 0.9, "a_interval": [0.8, 1.0]}, {"number": 0.1}),
        ({"steps": 8}, {"steps": 9}, {"equal": float("inf")}),
        ({"settings": {"learning_rate": 0.1}}, {"settings": {"learning_rate": 0.2}}, {"equal": float("inf")}),
        (
            {"versions": {"torch": "2"}, "checks": {"c": {"passed": True, "note": "1"}}},
            {"versions": {}, "checks": {"c": {"passed": True, "note": "2"}}},
            {},
        ),
        ({"checks": {"c": {"passed": True}}}, {"checks": {"c": {"passed": False}}}, {"equal": float("inf")}),
    ],
)
def test_numbers_of_a_document_are_measured_and_its_parameters_must_be_equal(
    tmp_path: Path, recorded: Any, made: Any, expected: dict[str, float]
) -> None:
    assert measured(
        tmp_path, "a.json", lambda path, new: path.write_text(json.dumps(made if new else recorded))
    ) == pytest.approx(expected)


def test_answers_are_counted_and_the_numbers_of_the_others_measured(tmp_path: Path) -> None:
    def write(path: Path, made: bool) -> None:
        rows = {
            "example_id": ["a", "b", "c", "d"],
            "answer": ["1", "2", "3", "9" if made else "4"],
            "nll": [1.0, 2.0, 3.0, 9.0 if made else 4.0],
        }
        rows["nll"][0] += 0.3 * made
        pq.write_table(pa.table(rows), path)

    assert measured(tmp_path, "r.parquet", write) == pytest.approx({"answers": 0.25, "column": 0.1})
