"""A user's own training command: what it gets, what is refused of what it writes, and what the records then say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from builders import small_pipeline, training_pipeline
from builders.history import Project, entry, identity
from builders.own_trainer import FULL, LORA, SAVE, make_project, outputs, train
from conftest import ROOT, draw_pages, dvc

from dagster_project.commands import plan
from dagster_project.commands.verify import verify
from dagster_project.core.context import ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.records import read_table
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.lineage import audit, training_lines
from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.stages import adapter, comparison, merged
from dagster_project.views.lineage import lineage_page


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def unpacked(path: Path) -> list[dict[str, Any]]:
    """The examples of packed rows, cut apart independently of the product."""
    found = []
    for row in read_table(path):
        ends = np.cumsum(row["lengths"])
        for identity_, end, length in zip(row["example_ids"], ends, row["lengths"], strict=True):
            parts = {name: row[name][end - length : end] for name in ("input_ids", "labels", "weights")}
            found.append({"example_id": identity_, **parts})
    return found


def checks(report: Any) -> dict[str, bool]:
    return {check.name: check.passed for check in report.checks}


def test_a_command_gets_examples_model_and_parameters_as_files(
    root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "adapter@x")
    monkeypatch.setenv("MINE", "kept")
    (root / "data/trainers/more").mkdir()
    (root / "data/trainers/more/config.yaml").write_text("a: 1")
    script = (
        LORA
        + SAVE
        + 'open("../seen.json", "w").write(json.dumps([given, dict(os.environ), os.getcwd(), sorted(os.listdir())]))'
    )
    files = ["data/trainers/train.py", "data/trainers/more/config.yaml"]
    train(root, tiny_model, script, files=files, learning_rate=0.5, options={"mine": [1, "two"]})
    given, environment, folder, names = json.loads((root / "seen.json").read_text())
    assert names == ["base_model", "inputs.json", "more", "output", "train.parquet", "train.py", "validation.parquet"]
    assert given["parameters"] == {"method": "lora", "learning_rate": 0.5, "options": {"mine": [1, "two"]}}
    assert (given["seed"], given["threads"], given["dtype"], given["device"]) == (7, 1, "float32", "cpu")
    assert environment["PEDIGREE_INPUTS"] == f"{folder}/inputs.json" and environment["OMP_NUM_THREADS"] == "1"
    assert environment["MINE"] == "kept" and "DVC_STAGE" not in environment
    for split in ("train", "validation"):
        expected = unpacked(root / f"data/tokenized/{split}.parquet")
        rows = read_table(Path(given[split]))
        assert [row["example_id"] for row in rows] == [row["example_id"] for row in expected]
        assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in expected]
        assert [row["labels"][1:] for row in rows] == [row["labels"][1:] for row in expected]
        assert [row["weights"][1:] for row in rows] == [row["weights"][1:] for row in expected]
        assert all(row["labels"][0] == -100 and set(row["attention_mask"]) == {1} for row in rows)
    assert (root / "data/trainers").exists() and not [*(root / "data/trainers").rglob("__pycache__")], (
        "DVC watches the folder"
    )


def test_an_adapter_is_recorded_with_measured_changes_and_merges(root: Path, tiny_model: Path) -> None:
    from safetensors.numpy import load_file

    from dagster_project.core.params import Compute

    metrics = 'Path("output/metrics.csv").write_text("step,loss,learning_rate\\n1,3.5,0.1\\n2,2.5,0.05\\n")'
    report = train(root, tiny_model, LORA + SAVE + metrics, peft={"r": 4, "target_modules": ["v_proj", "q_proj"]})
    made = load_file(root / "out/adapter_model.safetensors")
    written = load_file(root / "work/output/adapter_model.safetensors")
    assert made.keys() == written.keys() and all(np.array_equal(made[name], written[name]) for name in made)
    document = json.loads((root / "out/training.json").read_text())
    norm = float(np.sqrt(sum((written[name].astype("float64") ** 2).sum() for name in written if "lora_B" in name)))
    assert document["trained"]["lora_B"]["norm_of_change"] == pytest.approx(norm, rel=1e-5)
    assert document["start_unknown"] == {"lora_A": 4}, "A starts at random, so nothing is claimed about it"
    assert document["frozen"]["sha256_before"] == document["frozen"]["sha256_after"]
    assert checks(report)["trained_what_it_should"] and not report.failures
    assert (document["order"], document["steps"], document["loss"]) == ("unknown", 2, {"first": 3.5, "last": 2.5})
    assert (root / "loss.csv").read_text() == "step,loss,learning_rate\n1,3.5,0.1\n2,2.5,0.05\n"
    assert str(root) not in "".join(path.read_text() for path in (root / "out").glob("*.json"))
    first = outputs(root)
    train(root, tiny_model, LORA + SAVE + metrics, peft={"r": 4, "target_modules": ["v_proj", "q_proj"]})
    assert outputs(root) == first
    after = merged.produce(Compute(threads=1), tiny_model, root / "out", root / "merged")
    assert checks(after) == {"merge_is_equal": True} and (root / "merged/model.safetensors").is_file()


def test_the_validation_loss_is_that_of_the_weights(root: Path, tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    report = train(root, tiny_model, LORA + SAVE)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), root / "out")
    for model, measured in zip((base, tuned.eval()), report.metrics["validation_loss"], strict=True):
        nats, tokens = 0.0, 0
        for row in unpacked(root / "data/tokenized/validation.parquet"):
            with torch.no_grad():
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            for position, label in enumerate(row["labels"][1:]):
                if label != -100:
                    nats, tokens = nats - float(logits[position, label]), tokens + 1
        assert measured == pytest.approx(nats / tokens, abs=1e-3)


BY_ROW = """
with open("output/examples.csv", "w") as file:
    file.write("step,row\\n1,5\\n1,0\\n2,27\\n3,5\\n")
"""
BY_ID = """
import pyarrow as pa, pyarrow.parquet as pq
table = {"step": [1, 1, 2], "example_id": ["train0.1", "train6.3", "train0.1"], "epoch": [1, 1, 4]}
pq.write_table(pa.table(table), "output/examples.parquet")
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (BY_ROW, [(1, 1, 0, "train1.1"), (1, 1, 1, "train0.0"), (2, 1, 0, "train6.3"), (3, 2, 0, "train1.1")]),
        (BY_ID, [(1, 1, 0, "train0.1"), (1, 1, 1, "train6.3"), (2, 4, 0, "train0.1")]),
        ('Path("output/examples.csv").write_text("step,row\\n1,5\\n", encoding="utf-8-sig")', [(1, 1, 0, "train1.1")]),
    ],
    ids=["rows", "ids", "byte order mark"],
)
def test_the_order_of_examples_is_what_the_command_wrote(
    script: str, expected: Sequence[tuple[Any, ...]], root: Path, tiny_model: Path
) -> None:
    train(root, tiny_model, LORA + SAVE + script)
    assert [tuple(row.values()) for row in read_table(root / "out/examples.parquet")] == expected
    assert not (root / "out/order_unknown.json").exists()
    rows = {row["example_id"]: row for row in unpacked(root / "data/tokenized/train.parquet")}
    document = json.loads((root / "out/training.json").read_text())
    assert document["order"] == "recorded by the command" and document["steps"] == expected[-1][0]
    assert document["tokens"] == sum(len(rows[one[3]]["input_ids"]) for one in expected)
    assert document["trained_tokens"] == sum(label != -100 for one in expected for label in rows[one[3]]["labels"][1:])


REFUSED = {
    "nothing": (LORA, "neither adapter_model.safetensors nor model.safetensors"),
    "both": (LORA + SAVE + 'save_file(base, "output/model.safetensors")', "both an adapter and a complete model"),
    "pickle": (
        LORA + SAVE + 'Path("output/adapter_model.bin").write_bytes(b"x")',
        "pickle files, .*: adapter_model.bin",
    ),
    "shape": (LORA + "tensors[B] = tensors[B][:, :3].copy()" + SAVE, r"wrong shape \(32, 3\) instead of \(32, 4\)"),
    "module": (
        LORA + 'tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = tensors[A]' + SAVE,
        "the base model has no module for base_model.model.model.layers.7",
    ),
    "missing": (LORA + "del tensors[A]" + SAVE, "missing .*lora_A.weight"),
    "no config": (LORA + 'save_file(tensors, "output/adapter_model.safetensors")', "adapter_config.json is missing"),
    "config": (LORA + 'config["r"] = 4; config["use_dora"] = True' + SAVE, "missing .*magnitude"),
    "other rank": (LORA + 'config["r"] = 8' + SAVE, "wrong shape"),
    "complete": (
        LORA + "save_file(base, 'output/model.safetensors')",
        "adapter.x.method: lora, but the command wrote a complete model",
    ),
    "other method": (
        LORA + 'config["peft_type"] = "IA3"' + SAVE,
        "adapter.x.method: lora, but the command wrote an adapter of ia3",
    ),
    "truncated": (
        LORA + SAVE + 'Path("output/adapter_model.safetensors").write_bytes(b"123")',
        "not a valid safetensors file",
    ),
    "base": (
        LORA + SAVE + 'Path("base_model/config.json").write_text(Path("base_model/config.json").read_text() + " ")',
        "the command changed the base model",
    ),
    "example": (
        LORA + SAVE + 'Path("output/examples.csv").write_text("step,example_id\\n1,validation0.0\\n")',
        "is not in the training",
    ),
    "row": (
        LORA + SAVE + 'Path("output/examples.csv").write_text("step,row\\n1,28\\n")',
        "train.parquet has no row 28",
    ),
    "steps": (
        LORA + SAVE + 'Path("output/examples.csv").write_text("step,row\\n2,1\\n1,1\\n")',
        "step 1 comes after step 2",
    ),
    "step": (
        LORA + SAVE + 'Path("output/examples.csv").write_text("step,row\\n1.5,1\\n")',
        "step is not a whole number",
    ),
    "separator": (
        LORA + SAVE + 'Path("output/examples.csv").write_text("step;row\\n1;1\\n")',
        "examples.csv has no column step, but 'step;row'",
    ),
    "no row": (
        LORA + SAVE + 'Path("output/examples.csv").write_text("step,index\\n1,1\\n")',
        "examples.csv has no column row or example_id, but 'step', 'index'",
    ),
    "no step": (
        LORA + SAVE + 'Path("output/metrics.csv").write_text("iteration,loss\\n1,2\\n")',
        "metrics.csv has no column step, but",
    ),
    "loss": (
        LORA + SAVE + 'Path("output/metrics.csv").write_text("step,loss\\n1,low\\n")',
        "loss is not a number: low",
    ),
    "no output": (LORA + "os.rmdir('output')", "the command removed output/"),
    "key": (LORA + 'config["r"] = "four"' + SAVE, "adapter_config.json is refused: .*r: must be int"),
    "new key": (LORA + 'config["use_magic"] = True' + SAVE, "use_magic is unknown to PEFT"),
    "index": (
        LORA + SAVE + 'Path("output/examples.csv").write_text("step,row\\n9999999999,1\\n")',
        "step is not a whole number",
    ),
    "fails": (
        LORA + 'print("out of luck"); sys.exit(3)',
        r"`python train.py` failed with exit code 3; its last lines:\n.*\n  out of luck",
    ),
    "killed": (LORA + "os.kill(os.getpid(), 9)", "SIGKILL"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_output_is_one_message(case: str, root: Path, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    script, message = REFUSED[case]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        train(root, model, script.replace("\nconfig =", "\nprint('hello')\nconfig ="))
    assert caught.value.hint and caught.value.exit_code == 2
    assert case != "base" or "dvc checkout --force data/base_model" in caught.value.hint
    assert ("memory ran out" in caught.value.hint) == (case == "killed")
    assert not [*(root / "out").iterdir()]


def test_a_pickle_file_of_the_trainer_that_holds_no_weights_is_neither_opened_nor_copied(
    root: Path, tiny_model: Path
) -> None:
    train(root, tiny_model, LORA + SAVE + 'Path("output/training_args.bin").write_bytes(b"not a pickle")')
    assert not [name for name in outputs(root) if name.endswith(".bin")]


def test_a_contradiction_to_params_yaml_is_refused(root: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json: r is 4, but params\.yaml says 16"):
        train(root, tiny_model, LORA + SAVE, peft={"r": 16})
    with pytest.raises(InputError, match=r"use_dora is None, but params\.yaml says True"):
        train(root, tiny_model, LORA + SAVE, method="dora")


@pytest.mark.parametrize(
    ("change", "failed", "note"),
    [
        (
            "tensors[B] *= 1e38; tensors[A] *= 1e38",
            {"learned", "trained_what_it_should"},
            "validation loss of the trained model is not finite",
        ),
        (
            'tensors[B][0, 0] = float("nan")',
            {"learned", "trained_what_it_should"},
            "NaN or infinity in 1 trained weights",
        ),
        (
            "tensors = {name: t * (0 if 'lora_B' in name else 1) for name, t in tensors.items()}",
            {"trained_what_it_should"},
            "did not move",
        ),
    ],
)
def test_weights_that_are_not_finite_or_did_not_move_fail_the_gate(
    change: str, failed: set[str], note: str, root: Path, tiny_model: Path
) -> None:
    report = train(root, tiny_model, LORA + change + SAVE)
    assert {check.name for check in report.failures} == failed
    assert any(note in check.note for check in report.failures)


def test_with_the_weights_of_the_start_every_weight_is_compared(root: Path, tiny_model: Path) -> None:
    script = (
        LORA + "start = {n: t - (1 if 'B' in n else 0) for n, t in tensors.items()}; save_file(start,"
        " 'output/start.safetensors')" + SAVE
    )
    report = train(root, tiny_model, script)
    assert [check.name for check in report.failures] == ["trained_what_it_should"]
    assert "did not move: lora_A" in report.failures[0].note


def test_a_complete_model_may_change_only_what_its_entry_trains(root: Path, tiny_model: Path) -> None:
    save = 'save_file(tensors, "output/model.safetensors", metadata={"format": "pt"})\n'
    whole = FULL + "tensors = {name: t + 0.1 for name, t in tensors.items()}\n" + save
    report = train(root, tiny_model, whole, method="full")
    assert (
        checks(report)["trained_what_it_should"]
        and (root / "out/model.safetensors").is_file()
        and (root / "out/config.json").is_file()
    )
    some = FULL + "tensors |= {name: tensors[name] * 1.5 for name in norms}\n" + save
    report = train(root, tiny_model, some, method="full")
    assert "did not move" in report.failures[0].note
    report = train(root, tiny_model, some, method="full", peft={"trainable": ["norm"]})
    assert checks(report)["trained_what_it_should"]
    report = train(root, tiny_model, whole, method="full", peft={"trainable": ["norm"]})
    assert "a frozen weight changed" in report.failures[0].note


def test_what_is_unknown_is_drawn_as_unknown(root: Path, tiny_model: Path) -> None:
    report = train(root, tiny_model, LORA + SAVE)
    (root / "pages/run.json").write_text(json.dumps({"measured": report.measured}))
    draw_pages("adapter@x", report, root / "out", root / "pages", root)
    page = (root / "pages/training.html").read_text()
    assert "unknown: random start" in page and "python train.py" in page and "<dd>None" not in page


@pytest.mark.parametrize(
    ("values", "compute", "message"),
    [
        ({"command": "python 'train.py"}, {}, "adapter.x.command: No closing quotation"),
        ({"command": "  "}, {}, "adapter.x.command: is empty"),
        ({"files": ["data/trainers/train.py"]}, {}, "adapter.x.files: is used by a training command only"),
        ({"command": "a", "files": ["data/trainers/none.py"]}, {}, "does not exist"),
        ({"command": "a", "files": ["params.yaml"]}, {}, "is not a file in data/trainers/"),
        ({"command": "a", "files": ["data/trainers/../../params.yaml"]}, {}, "is not a file in data/trainers/"),
        ({"command": "a", "files": ["data/trainers/far.py"]}, {}, "is outside the project"),
        ({"command": "a", "sharding": {}}, {}, "adapter.x.sharding: a training command starts its own processes"),
        ({"command": "a"}, {"processes": 2}, "compute.processes: adapter.x has a command"),
        (
            {"command": "a", "learning_rate": "auto"},
            {},
            "adapter.x.learning_rate: auto is resolved by Pedigree's own trainer only",
        ),
        ({"command": "a", "peft": {"r": "auto"}}, {}, "adapter.x.peft.r: auto is resolved by"),
        ({"command": "a", "method": "adalora"}, {}, "adalora is not supported with a command"),
        ({"command": "a", "method": "lorra"}, {}, "unknown method 'lorra'"),
    ],
)
def test_an_entry_is_checked_before_anything_runs(
    values: dict[str, Any], compute: dict[str, Any], message: str, root: Path, tmp_path: Path
) -> None:
    (root / "params.yaml").write_text("")
    (root / "data/trainers/train.py").write_text("")
    (tmp_path / "far.py").write_text("")
    (root / "data/trainers/far.py").symlink_to(tmp_path / "far.py")
    with pytest.raises(InputError) as caught:
        adapter.validate(
            adapter.Params(**values),
            ValidationContext(root, {"compute": compute, "adapter": {"x": values}}, "adapter.x"),
        )
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["base_model/more.py", "inputs.json", "train.parquet"])
def test_a_file_of_a_command_that_would_take_the_place_of_an_input_is_refused(
    name: str, root: Path, tiny_model: Path
) -> None:
    path = root / "data/trainers" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    before = sorted(tiny_model.rglob("*"))
    with pytest.raises(InputError, match="the working folder already has a file of this name"):
        train(root, tiny_model, LORA + SAVE, files=["data/trainers/train.py", f"data/trainers/{name}"])
    assert sorted(tiny_model.rglob("*")) == before


def test_a_missing_program_is_named(root: Path, tiny_model: Path) -> None:
    for command in ("no_such_program x", "./train.py"):
        with pytest.raises(InputError, match=f"the program '{command.split()[0]}' does not exist or is not executable"):
            train(root, tiny_model, "", command=command)


def test_other_variants_are_recorded_as_before() -> None:
    assert {"command", "files", "options"}.isdisjoint(adapter.Params(method="lora").settings())


def test_the_checkpoints_of_a_failed_command_are_there_again_for_the_same_inputs_only(
    root: Path, tiny_model: Path
) -> None:
    fails = (
        LORA + 'open(given["checkpoints"] + "/" + str(len(os.listdir(given["checkpoints"]))), "w").close(); sys.exit(1)'
    )
    for rate, expected in ((0.1, 1), (0.1, 2), (0.2, 1)):
        with pytest.raises(InputError):
            train(root, tiny_model, fails, learning_rate=rate)
        assert len([path for path in (root / "checkpoints").rglob("*") if path.is_file()]) == expected
    train(root, tiny_model, LORA + SAVE, learning_rate=0.2)
    assert not (root / "checkpoints").exists()


STUBBORN = """
import os, signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
open("../pids.tmp", "w").write(f"{os.getpid()} {child.pid}")
os.rename("../pids.tmp", "../pids")
time.sleep(600)
"""
RUN = """
import logging, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from dagster_project.training.trainers.command.process import environment, run_command
folder = Path(sys.argv[1]) / "work"
run_command(["python", "train.py"], folder, environment(1, 7, folder / "inputs.json"), "adapter.x.command")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_and_its_children_end_with_the_stage(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/train.py").write_text(STUBBORN)
    stage = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (tmp_path / "pids").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
    assert all(process.is_running() for process in running)
    os.kill(stage.pid, number)
    stage.wait(timeout=60)
    _, alive = psutil.wait_procs(running, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


ROWS = [
    ("cats", "train", "data/sources/faq.jsonl"),
    ("dogs", "train", "data/sources/mail.jsonl"),
    ("fish", "test", "data/sources/faq.jsonl"),
]


def test_audit_and_impact_say_unknown_where_the_order_is_unknown(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    lock = project.splits(ROWS)
    splits = lock["splits"]["outs"][0]["md5"]
    files = {"adapter_model.safetensors": b"w", "order_unknown.json": b"{}", "training.json": b"{}"}
    lock |= {"adapter@lora": entry("adapter@lora", {"data/splits": splits}, project.put(files))}
    project.commit(lock | project.merged(lock), "trained by a command")
    for question in ({"record": identity("cats")}, {"text": "All about cats."}, {"source": "data/sources/faq.jsonl"}):
        found = impact(project.root, **question)
        assert found["verdict"] == "yes" and {model["stage"] for model in found["models"]} == {
            "adapter@lora",
            "merged@lora",
        }
        assert "at steps unknown" in as_text(found) and "in no step" not in as_text(found)
    assert "not trained on" in as_text(impact(project.root, record=identity("fish")))
    for model in ("adapter@lora", "merged@lora"):
        document = audit(project.root, model)
        assert document["records"] is None and document["order_unknown"] == ["adapter@lora"]
        assert "order unknown" in " ".join(training_lines(document))
        assert "unknown" in lineage_page(document, [])

    known = Project(tmp_path / "known")
    known.commit(known.lock(ROWS), "trained with a known order")
    document = audit(known.root, "merged@lora")
    assert "order_unknown" not in document and document["records"]["records"] == 2
    assert "step 2" in as_text(impact(known.root, record=identity("dogs")))


AFTERWARDS = """
import shutil
trainer.save_state()
shutil.copy("trl/trainer_state.json", "output")
json.dump(used[: trainer.state.global_step], open("../used.json", "w"))
"""


def script_of_the_documentation() -> str:
    """The script of docs/own-trainer.md, for five steps on a CPU."""
    shown = (ROOT / "docs/own-trainer.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert shown.count('report_to="none"') == 1
    return shown.replace('report_to="none"', 'report_to="none", use_cpu=True, bf16=False, max_steps=5')


@pytest.mark.long
def test_the_documented_script_with_trl_is_a_variant_like_any_other(root: Path, tiny_model: Path) -> None:
    peft = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    report = train(root, tiny_model, script_of_the_documentation() + AFTERWARDS, peft=peft, learning_rate=0.05)
    assert not report.failures and report.metrics["trainable_parameters"] == 2 * 4 * (64 + 64 + 64 + 32)
    used = json.loads((root / "used.json").read_text())
    ids = [row["example_id"] for row in unpacked(root / "data/tokenized/train.parquet")]
    seen = [(row["step"], row["example_id"]) for row in read_table(root / "out/examples.parquet")]
    assert seen == [(step, ids[row]) for step, batch in enumerate(used, 1) for row in batch] and len(used) == 5
    state = json.loads((root / "work/output/trainer_state.json").read_text())["log_history"]
    assert [float(line.split(",")[1]) for line in (root / "loss.csv").read_text().splitlines()[1:]] == pytest.approx(
        [entry["loss"] for entry in state if "loss" in entry], rel=1e-5
    )
    assert outputs(root)["adapter_config.json"]


@pytest.mark.long
def test_both_front_ends_run_a_command_and_verify_makes_it_again(
    tmp_path: Path, tiny_model: Path, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    entry_ = {"command": "python train.py", "files": ["data/trainers/train.py"], "method": "lora"}
    root = training_pipeline.make_project(tmp_path / "project", tiny_model, entry_, LORA + SAVE)
    definitions = build_definitions(root, training_pipeline.PIPELINE)
    assert small_pipeline.materialize(root, instance, ["adapter@x"], definitions).success
    first = small_pipeline.published(root, "adapter@x")
    assert not small_pipeline.not_fresh(root, instance, training_pipeline.PIPELINE)
    [code] = audit(root, "adapter@x")["other_files"].items()
    assert code[0] == "data/trainers/train.py" and code[1]["stages"] == ["adapter@x"]
    found = verify(root, "adapter@x")
    assert found["verdict"] == "identical", found
    (root / "data/trainers/train.py").write_text(LORA.replace("0.3", "0.4") + SAVE)
    assert small_pipeline.changed_in_dvc(root) == {"adapter@x"}
    done = dvc(root, "repro")
    assert done.returncode == 0, done.stderr
    second = small_pipeline.published(root, "adapter@x")
    weights = "data/adapter/x/adapter_model.safetensors"
    assert second.keys() == first.keys() and second[weights] != first[weights]
    (root / "data/trainers/train.py").write_text("raise SystemExit(5)")
    done = dvc(root, "repro")
    assert done.returncode != 0 and "failed with exit code 5" in done.stderr
    assert small_pipeline.published(root, "adapter@x") == second, "the earlier output is kept"


def test_an_unknown_cost_is_left_out_and_never_counted_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()  # a complete model, which needs no base model
    costs = []
    for document in ({"command": "python train.py", "steps": 3}, {"tokens": 9, "trained_tokens": 3, "steps": 1}):
        (tmp_path / "training.json").write_text(json.dumps(document))
        variant = comparison.Variant(tmp_path, tmp_path / "model", tmp_path / "training.json")
        costs.append(comparison._cost("x", {}, tmp_path, {"x": variant}))
    assert costs == [{"bytes": 0, "steps": 3}, {"bytes": 0, "tokens": 9, "trained_tokens": 3, "steps": 1}]
    (tmp_path / "aligned.json").write_text(json.dumps({"tokens": 5, "steps": 2}))
    aligned = comparison.Variant(tmp_path, tmp_path / "model", tmp_path / "aligned.json", tmp_path / "training.json")
    assert comparison._cost("x", {}, tmp_path, {"x": aligned}) == {"bytes": 0, "tokens": 14, "steps": 3}


def test_a_plan_says_that_a_command_is_unpredictable(root: Path, tiny_model: Path) -> None:
    tokenized = {"train": {"examples": 28, "tokens": 279}, "validation": {"rows": 2}}
    found = plan._adapter(root, {"adapter": {"x": {"command": "python train.py"}}}, "x", tokenized, tiny_model, None)  # type: ignore[arg-type]
    assert (found["memory"], found["time"], found["tokens_per_epoch"]) == (None, None, 279)
    text = plan.as_text({"variants": {"x": found}, "machine": {"device": "cpu", "dtype": "float32", "threads": 1}})
    assert "memory and time of a training command are unknown" in text and "`python train.py`" in text
