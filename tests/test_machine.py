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

from dagster_project.commands.elsewhere import BOUNDS, KIND_OF_STAGE, compared, differences, judge, largest
from dagster_project.commands.requirements import versions_in
from dagster_project.core.records import write_json
from dagster_project.lineage.tolerance import Deviation, deviations
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
    for part in ("vendor", "flags", "instruction_set"):
        less = {key: value for key, value in one.items() if key != part}
        assert compared(one, less)["same_kind"] is compared(less, one)["same_kind"] is False, part
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


W = torch.arange(1.0, 9.0)
ROW = {"example_id": ["a", "b"], "prompt": ["x", "y"], "tokens": [1, 2]}
FROM_A_TO_B = {  # file -> what two machines made of it
    "a tensor is missing": ("m.safetensors", {"w": W, "v": W + 1}, {"w": W}),
    "a tensor is new": ("m.safetensors", {"w": W}, {"w": W, "v": W + 1}),
    "another shape": ("m.safetensors", {"w": W}, {"w": W.reshape(2, 4)}),
    "another number format": ("m.safetensors", {"w": W}, {"w": W.to(torch.bfloat16)}),
    "another whole number": ("m.safetensors", {"w": torch.tensor([1, 2])}, {"w": torch.tensor([1, 3])}),
    "another rank": (
        "m.safetensors",
        {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)},
        {"lora_A": torch.ones(1, 3), "lora_B": torch.ones(3, 1)},
    ),
    "half of a pair in another shape": (
        "m.safetensors",
        {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)},
        {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)},
    ),
    "half of a pair in another format": (
        "m.safetensors",
        {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2)},
        {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(3, 2).to(torch.bfloat16)},
    ),
    "another text": ("r.parquet", ROW, {**ROW, "prompt": ["x", "z"]}),
    "another count": ("r.parquet", ROW, {**ROW, "tokens": [1, 3]}),
    "another order": ("r.parquet", ROW, {name: values[::-1] for name, values in ROW.items()}),
    "a row less": ("r.parquet", ROW, {name: values[:1] for name, values in ROW.items()}),
    "another column": ("r.parquet", ROW, {**ROW, "more": [1.0, 2.0]}),
    "another column of a curve": ("c.csv", "step,loss\n1,2.0\n", "step,loss,more\n1,2.0,3\n"),
    "another name in a curve": ("c.csv", "step,loss\n1,2.0\n", "step,nll\n1,2.0\n"),
    "a step less": ("c.csv", "step,loss\n1,2.0\n2,1.0\n", "step,loss\n1,2.0\n"),
    "another step": ("c.csv", "step,loss\n1,2.0\n2,1.0\n", "step,loss\n1,2.0\n3,1.0\n"),
    "a cell less": ("c.csv", "step,loss\n1,2.0\n", "step,loss\n1\n"),
    "a list for nothing": ("r.json", {"a": None}, {"a": [1]}),
    "another truth beside an interval": (
        "r.json",
        {"value": True, "interval": [0, 0.5]},
        {"value": False, "interval": []},
    ),
    "a key is missing": ("r.json", {"a": 1, "b": 2.0}, {"a": 1}),
    "a key is new": ("r.json", {"a": 1}, {"a": 1, "b": 2.0}),
    "a score without its value": ("r.json", {"a": 0.5, "a_interval": [0.3, 0.6]}, {"a_interval": [0.3, 0.6]}),
    "an entry more": ("r.json", {"a": [1, 2]}, {"a": [1, 2, 3]}),
    "an entry less": ("r.json", {"a": [1, 2]}, {"a": [1]}),
    "another entry": ("r.json", {"a": [{"b": "x"}]}, {"a": [{"b": "y"}]}),
    "another kind of value": ("r.json", {"a": 1}, {"a": True}),
    "nothing for a number": ("r.json", {"a": 1.0}, {"a": None}),
    "another count beside an interval": (
        "r.json",
        {"value": 0.1, "interval": [-0.1, 0.2], "n": 3},
        {"value": 0.1, "interval": [], "n": 4},
    ),
    "another chosen parameter": ("r.json", {"chosen": {"lr": 0.1}}, {"chosen": {"lr": 0.2}}),
    "another seed": ("r.json", {"seed": 1.0}, {"seed": 2.0}),
    "a parameter with an interval": (
        "r.json", {"settings": {"a": 0.5, "a_interval": [0.3, 0.6]}}, {"settings": {"a": 0.4, "a_interval": [0.3, 0.6]}}
    ),
    "a parameter that is called an interval": (
        "r.json",
        {"settings": {"log_interval": 1}},
        {"settings": {"log_interval": 2}},
    ),
    "a note that is no repetition": ("r.json", {"note": "1"}, {"note": "2"}),
    "a file of another kind": ("vocab.txt", "a", "b"),
}  # fmt: skip


def write_as(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(content), path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("case", FROM_A_TO_B)
def test_what_no_machine_may_change_is_within_no_bound_of_any_stage(tmp_path: Path, case: str) -> None:
    name, recorded, made = FROM_A_TO_B[case]
    found = measured(tmp_path, name, lambda path, new: write_as(path, made if new else recorded))
    assert found["equal"] == float("inf")
    for stage in FLOATING_POINT:
        _, beyond = judge(stage, {}, deviations(name, tmp_path / "recorded" / name, tmp_path / "made" / name))
        assert any(line.endswith("which no machine may change") for line in beyond)


@pytest.mark.parametrize(
    ("name", "recorded", "made"),
    [
        *((name, one, one) for name, one, _ in FROM_A_TO_B.values() if name != "vocab.txt" and "lora_A" not in one),
        ("r.parquet", {"nll": [float("nan"), None, 1.0]}, {"nll": [float("nan"), None, 1.0]}),
        ("r.parquet", {"answer": []}, {"answer": []}),
        ("r.parquet", {"nll": [0.0, 0.0]}, {"nll": [0.0, 0.0]}),
        ("m.safetensors", {"w": torch.zeros(3)}, {"w": torch.zeros(3)}),
        ("calibration.csv", "bin,count\n1,2\n", "bin,count\n1,3\n"),
        *(
            ("r.json", {key: "x"}, {key: "y"})
            for key in (
                "machine", "environment", "versions", "device", "dtype", "attention", "output_sha256", "sha256_before",
                "sha256_after",
            )
        ),
    ],
)  # fmt: skip
def test_equal_content_and_what_is_the_machine_s_is_no_difference(
    tmp_path: Path, name: str, recorded: Any, made: Any
) -> None:
    assert measured(tmp_path, name, lambda path, new: write_as(path, made if new else recorded)) == {}


@pytest.mark.parametrize(
    ("name", "recorded", "made", "expected"),
    [
        ("c.csv", "step,loss\n1,4.0\n2,-1.0\n", "step,loss\n1,4.0\n2,-0.5\n", {"column": 0.125}),
        ("r.parquet", {"nll": [1.0, None]}, {"nll": [1.0, 2.0]}, {"column": float("inf")}),
        ("r.parquet", {"nll": [1.0, 2.0]}, {"nll": [1.0, float("nan")]}, {"column": float("inf")}),
        ("r.parquet", {"nll": [1.0, float("nan")]}, {"nll": [1.0, 2.0]}, {"column": float("inf")}),
        ("r.parquet", {"nll": [1.0, 2.0]}, {"nll": [1.0, None]}, {"column": float("inf")}),
        ("r.parquet", {"nll": [1.0, float("nan")]}, {"nll": [1.0, None]}, {"column": float("inf")}),
        ("r.parquet", {"label": ["a", "b"], "correct": [True, True]}, {"label": ["a", "c"], "correct": [True, False]},
         {"answers": 0.5}),
        ("r.json", {"loss": 0.5, "more": [4.0, 1.0]}, {"loss": 0.75, "more": [6.0, 1.125]}, {"number": 0.5}),
        ("r.json", {"to": {"difference": 0.1, "interval": [-0.1, 0.2]}},
         {"to": {"difference": 0.0, "interval": [-0.2, 0.1]}}, {"interval": 0.5}),
        ("r.json", {"to": {"value": 0.1, "interval": [-0.1, 0.2]}}, {"to": {"value": 0.3}}, {"interval": 2.0}),
        ("r.json", {"loss": 4.0}, {"loss": 5.0}, {"number": 0.25}),
        ("r.json", {"value": 0.1, "interval": [-0.1, 0.2], "p": 0.5}, {"value": 0.1, "interval": [], "p": 0.75},
         {"number": 0.25}),
        ("r.json", {"a": 0.5, "a_interval": [0.5, 0.6]}, {"a": 0.25, "a_interval": []}, {"number": 0.25}),
        ("r.json", {"a": 4.0, "a_interval": [4.0, 5.0]}, {"a": 3.0, "a_interval": []}, {"number": 0.25}),
    ],
)  # fmt: skip
def test_the_largest_difference_of_each_measure_is_the_documented_one(
    tmp_path: Path, name: str, recorded: Any, made: Any, expected: dict[str, float]
) -> None:
    assert measured(tmp_path, name, lambda path, new: write_as(path, made if new else recorded)) == pytest.approx(
        expected
    )


def test_the_starting_value_is_that_of_the_file_with_this_tensor_in_this_shape(tmp_path: Path) -> None:
    starts = [tmp_path / f"{number}.safetensors" for number in range(3)]
    matrix = W.reshape(2, 4)
    for path, tensors in zip(starts, ({"v": matrix}, {"w": W}, {"w": matrix}), strict=True):
        save_file(tensors, path)
    found = measured(
        tmp_path, "m.safetensors", lambda path, new: save_file({"w": matrix * (1.5 if new else 2)}, path), *starts
    )
    assert found["update"] == pytest.approx(0.5)  # (2 w - 1.5 w) / (2 w - w), not relative to 2 w
    assert "update" not in measured(
        tmp_path, "m.safetensors", lambda path, new: save_file({"w": matrix + new}, path), *starts[:2]
    )


def test_factors_that_are_no_matrices_are_compared_as_they_are(tmp_path: Path) -> None:
    """Those of LoRA on convolutions."""
    found = measured(
        tmp_path,
        "m.safetensors",
        lambda path, new: save_file(
            {"lora_A": torch.full((2, 3, 3, 3), 2.0), "lora_B": torch.full((4, 2, 1, 1), 1.5 if new else 2.0)}, path
        ),
    )
    assert found == {"weight": 0.25}


def test_an_update_below_the_rounding_of_the_stored_numbers_counts_as_that_rounding(tmp_path: Path) -> None:
    start, rounding = torch.ones(4), torch.finfo(torch.float32).eps
    save_file({"w": start}, tmp_path / "base.safetensors")
    found = measured(
        tmp_path,
        "m.safetensors",
        lambda path, new: save_file({"w": start + rounding * new}, path),  # the recorded training changed nothing
        tmp_path / "base.safetensors",
    )
    assert found["update"] == pytest.approx(1.0)


def test_a_difference_is_another_machine_s_up_to_its_bound_and_a_fault_beyond() -> None:
    assert KIND_OF_STAGE.keys() == FLOATING_POINT
    for (kind, dtype), bounds in BOUNDS.items():
        stage = next(one for one in KIND_OF_STAGE if KIND_OF_STAGE[one] == kind)
        settings = {"compute": {"dtype": dtype}}
        for measure in ("update", "weight", "number", "column", "interval", "answers"):
            bound = bounds.get(measure, 0.0)
            values = [bound, bound * 1.001 or 1e-9, float("nan"), float("inf")]
            found = [Deviation(f"file {number}", measure, value, "w") for number, value in enumerate(values)]
            listed, beyond = judge(stage, settings, found)
            assert [line.partition(":")[0] for line in beyond] == ["file 1", "file 2", "file 3"]
            assert {one["bound"] for one in listed} == {bound}
    float32 = BOUNDS["training", "float32"]["update"]
    for settings, expected in (
        ({}, BOUNDS["training", "bfloat16"]["update"]),
        ({"compute": {"dtype": "auto"}}, BOUNDS["training", "bfloat16"]["update"]),
        ({"compute": {"dtype": "float32"}}, float32),
    ):
        [one], _ = judge("adapter", settings, [Deviation("f", "update", 1e-9, "w")])
        assert one["bound"] == expected
    settings = {"compute": {"dtype": "float32"}, "evaluation": {"dtype": "bfloat16"}}
    [one], _ = judge("evaluation", settings, [Deviation("f", "answers", 1e-9, "w")])
    assert one["bound"] == BOUNDS["evaluation", "bfloat16"]["answers"]


def test_of_each_measure_the_difference_nearest_to_its_bound_is_shown() -> None:
    rows = [
        {"measure": measure, "value": value, "bound": bound, "where": where}
        for measure, value, bound, where in (
            ("number", 0.2, 0.4, "half"), ("number", 0.3, 0.4, "most"), ("number", 0.1, 0.4, "least"),
            ("weight", 0.1, 0.2, "first"), ("weight", 0.1, 0.2, "same"), ("column", 2.0, 1.0, "beyond"),
        )
    ]  # fmt: skip
    assert [one["where"] for one in largest(rows)] == ["most", "first", "beyond"]
