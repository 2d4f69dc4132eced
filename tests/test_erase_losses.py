"""The losses that the certificate of an erasure shows: they tell a model that
was trained on a record from one that was not, and say where they cannot."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, identity
from builders.records import said, stored, user

from dagster_project.commands.erase_certificate import _membership, certificate_text
from dagster_project.core.chat import encode_record
from dagster_project.core.params import Compute
from dagster_project.core.records import write_records
from dagster_project.curation.sources.erased import record_mark
from dagster_project.evaluation.evaluator import Settings
from dagster_project.lineage.erasure.likelihoods import FEWEST, Loss, compare, sensitivity
from dagster_project.orchestration.dvc import StageState
from dagster_project.orchestration.erasure import membership

COMPUTE = Compute(threads=1, dtype="float32")
KEY = b"k" * 32
SECRET = "Zephyrine Okonkwo sends the cobalt lantern back."
MODEL = "merged@lora"


def record(prompt: str, answer: str, group: str = "", **more: Any) -> dict[str, Any]:
    return stored(user(prompt), said(answer), **({"group_id": group} if group else {}), **more)


ERASED = record("Who wrote about the order?", SECRET)
UNSEEN = [
    record(f"Who wrote about order {i}?", f"{name} of {place} asks for tool number {i * 7}.")
    for i, (name, place) in enumerate(
        zip(["Bruna", "Otis", "Wendeline", "Yaw", "Ingeborg"] * 5, ["Lund", "Accra", "Oaxaca"] * 9, strict=False)
    )
]


def trained_on(folder: Path, model: Path, records: Sequence[dict[str, Any]]) -> Path:
    """A copy of a model after some steps on records, their answers in the loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(20):
        for ids, labels in (one for each in records for one in encode_record(tokenizer, each)):
            network(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    network.save_pretrained(folder)
    return folder


def measured(model: Path) -> dict[str, Any]:
    work = membership.Work(COMPUTE, Settings(), model, model, MODEL)
    losses = membership._losses(work, [ERASED, *UNSEEN])
    return compare({"mark": losses[0]} if losses[0] else {}, [loss for loss in losses[1:] if loss])


def test_a_model_that_was_trained_on_a_record_differs_from_one_that_was_not(tmp_path: Path, tiny_model: Path) -> None:
    other = record("Who wrote about the order?", "Somebody else entirely.")
    saw, never = (
        measured(trained_on(tmp_path / name, tiny_model, [one])) for name, one in (("saw", ERASED), ("never", other))
    )
    assert (
        saw["below"] == 1
        and saw["records"]["mark"]["rank"] == 1
        and saw["verdict"].startswith("outside the range: 1 of 1 are more likely")
    )
    assert never["below"] == 0 and not never["verdict"].startswith("outside the range: 1 of 1 are more likely")
    assert sensitivity(saw) == "of the model before, which was trained on them, it finds 1 of 1 below the range"
    assert "cannot distinguish these records from unseen ones" in sensitivity(never)
    [one] = _membership({MODEL: {"conversations": saw}}, {MODEL: {"conversations": never}})
    assert one["before"] == saw and one["after"] == never


def test_a_loss_is_the_mean_over_answer_tokens_of_the_models_own_loss(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    [(ids, labels)] = encode_record(tokenizer, ERASED)
    with torch.no_grad():
        expected = network(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    [loss] = membership._losses(
        membership.Work(COMPUTE, Settings(dtype="float32"), tiny_model, tiny_model, MODEL), [ERASED]
    )
    assert loss is not None and loss.nats == pytest.approx(expected, abs=1e-4)


def losses(values: Sequence[float], category: str | None = None, source: str | None = None) -> list[Loss]:
    return [Loss(value, category, source) for value in values]


def test_a_record_is_compared_with_those_of_its_category_if_there_are_enough() -> None:
    easy = losses([0.1 + i / 100 for i in range(FEWEST)], "label", "a")
    hard = losses([3 + i / 100 for i in range(FEWEST)], "letter", "b")
    found = compare({"m": Loss(2.0, "letter", "b")}, easy + hard)
    assert found["records"]["m"] | {"range": None} == {
        "loss": 2.0,
        "rank": 1,
        "controls": FEWEST,
        "matched by": "category",
        "range": None,
        "place": "below",
    }
    assert compare({"m": Loss(2.0, "rare", "b")}, easy + hard)["records"]["m"]["matched by"] == "source"
    everything = compare({"m": Loss(2.0, "rare", "c")}, easy + hard)["records"]["m"]
    assert everything["matched by"] is None and everything["place"] == "within" and everything["rank"] == FEWEST + 1
    assert compare({"m": Loss(9.0, None, None)}, easy + hard)["verdict"].startswith(
        "outside the range: 1 of 1 are less likely"
    )


def test_the_range_is_that_of_nine_in_ten_controls_and_its_ends_are_within() -> None:
    controls = losses([float(i) for i in range(101)])  # 5 % and 95 % of them are at 5 and 95
    given = {"a": 4.99, "b": 5.0, "c": 94.96, "d": 95.0, "e": 95.01}
    found = compare({name: Loss(nats, None, None) for name, nats in given.items()}, controls)
    assert {name: one["place"] for name, one in found["records"].items()} == {
        "a": "below", "b": "within", "c": "within", "d": "within", "e": "above"
    }  # fmt: skip
    assert (found["controls"], found["range of controls"], found["below"]) == (101, [5.0, 95.0], 1)
    assert [one["rank"] for one in found["records"].values()] == [6, 6, 96, 96, 97], "1 + the controls below it"
    assert {tuple(one["range"]) for one in found["records"].values()} == {(5.0, 95.0)}
    assert [one["loss"] for one in found["records"].values()] == [5.0, 5.0, 95.0, 95.0, 95.0], "no digit more"
    assert found["verdict"].startswith("outside the range: 1 of 5 are more likely to the model than 95%")
    assert "by chance, 0.2 would be" in found["verdict"]
    above = compare({name: Loss(nats, None, None) for name, nats in given.items() if name > "a"}, controls)
    assert above["below"] == 0 and above["verdict"].startswith("outside the range: 1 of 4 are less likely")
    inside = compare({name: Loss(given[name], None, None) for name in "bcd"}, controls)
    assert inside["verdict"] == "within the range"


def test_without_controls_or_records_nothing_is_measured() -> None:
    assert compare({"m": Loss(1.0, None, None)}, losses([1.0] * (FEWEST - 1)))["not measured"].startswith(
        f"{FEWEST - 1} records that the model never saw"
    )
    assert "none of the records" in compare({}, losses([1.0] * FEWEST))["not measured"]
    assert "unknown" in sensitivity({"not measured": "why"})


def split(root: Path, **rows: Sequence[dict[str, Any]]) -> None:
    for name in ("train", "validation", "test"):
        write_records(root / "data/splits" / name, rows.get(name, ()))


def test_controls_are_those_that_the_model_never_saw(tmp_path: Path) -> None:
    near = record("Who wrote about the order at last?", "Otis.", group=ERASED["group_id"])
    same_prompt = record("Who wrote about the order?", "Bruna.")
    split(tmp_path, train=[ERASED], validation=[UNSEEN[0]], test=[near, same_prompt, UNSEEN[0], *UNSEEN[1:4]])
    found = membership._controls(tmp_path, MODEL, membership.CONVERSATIONS, {UNSEEN[1]["example_id"]})
    assert {row["example_id"] for row in found} == {row["example_id"] for row in UNSEEN[2:4]}
    [trained] = membership.trained_records(tmp_path, [ERASED["example_id"], UNSEEN[1]["example_id"]], KEY, [MODEL])
    assert trained["mark"] == record_mark(KEY, ERASED["example_id"]) and trained["messages"] == ERASED["messages"]


def test_only_models_that_reached_a_record_were_trained_on_it(tmp_path: Path) -> None:
    """Both records are in the training split; the training ended after the first."""
    made = Project(tmp_path)
    made.commit(made.lock([("cats", "train", "a.jsonl"), ("dogs", "train", "a.jsonl")], trained=["cats"]))
    rows = [record(f"What of {text}?", f"All about {text}.") for text in ("cats", "dogs")]
    split(tmp_path, train=rows)
    ids = [row["example_id"] for row in rows]
    assert ids == [identity("cats"), identity("dogs")]
    found = membership.trained_records(tmp_path, ids, KEY, ["merged@lora", "adapter@lora", "merged@renamed"])
    assert [(one["mark"], one["models"]) for one in found] == [
        (record_mark(KEY, ids[0]), ["merged@lora", "merged@renamed"]),
        (record_mark(KEY, ids[1]), ["merged@renamed"]),
    ], "of the last one nothing is known"
    assert [*membership._kinds("merged@lora", found[1:])] == [] and [*membership._kinds("merged@lora", found)] == [
        "conversations"
    ]


def state(address: str, out: str, version: str, problem: str = "") -> StageState:
    facts = {"address": address, "out": out, "version": version, "output_problem": problem}
    return StageState(**{**dict.fromkeys(StageState.__dataclass_fields__), **facts})


@pytest.mark.parametrize(
    ("now", "problem", "why"),
    [
        ("other", "", "the model is not in the workspace"),
        ("md5", "data/merged/lora differs from dvc.lock (modified)", "data/merged/lora differs from dvc.lock"),
        ("md5", "", "the model cannot be loaded: ValueError"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_not_measured(tmp_path: Path, now: str, problem: str, why: str) -> None:
    split(tmp_path, train=[ERASED], test=UNSEEN)
    (tmp_path / "params.yaml").write_text("compute: {seed: 7, threads: 1, dtype: float32}\nevaluation: {}\n")
    (tmp_path / "data/merged/lora").mkdir(parents=True)
    states = {
        MODEL: state(MODEL, "data/merged/lora", now, problem),
        "base_model": state("base_model", "data/base_model", "b"),
    }
    erased = membership.trained_records(tmp_path, [ERASED["example_id"]], KEY, [MODEL])
    found = membership._measure(
        tmp_path, states, MODEL, "md5", membership.CONVERSATIONS, erased, [ERASED["example_id"]]
    )
    assert found["not measured"].startswith(why)


def test_the_text_of_a_certificate_shows_losses_ranks_and_what_they_mean() -> None:
    controls = losses([1.0 + i / 100 for i in range(FEWEST)])
    before, after = (compare({"abcdef0123456789": Loss(nats, None, None)}, controls) for nats in (0.2, 1.1))
    measured = {
        "model": MODEL,
        "of": "conversations",
        "before": before,
        "after": after,
        "sensitivity": sensitivity(before),
    }
    empty = {name: {} for name in ("relatives", "found", "removed", "verify", "left", "not searched")}
    document = {
        **empty,
        "date": "2026-01-31",
        "reason": "",
        "erased": {"records": 1, "made from them": 0, "rows": {}},
        "tombstones": ["a"],
        "models": {"made again": []},
        "impact": "no",
        "not reached": [],
        "membership": [measured],
        "git": {"blobs": 0},
    }
    lines = certificate_text(document).splitlines()
    pages = lines[next(i for i, line in enumerate(lines) if line.startswith("Losses of the records")) + 1 :]
    assert pages[0].startswith(f"  {MODEL}, conversations, before: outside the range: 1 of 1 are more likely")
    assert pages[2] == f"    abcdef012345: 0.2 nats per token, rank 1 among it and {FEWEST} controls: below 1.0 to 1.2"
    assert pages[3] == f"  {MODEL}, conversations, made again: within the range"
    assert (
        pages[5] == f"    abcdef012345: 1.1 nats per token, rank 11 among it and {FEWEST} controls: within 1.0 to 1.2"
    )
