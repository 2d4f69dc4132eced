"""`pedigree why` as a command, on a project in which a small adapter was
trained: the index, a question, the check by training again, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders.commands import document

from dagster_project.__main__ import main
from dagster_project.commands import why_calibration, why_model, why_prove, why_question
from dagster_project.commands.chat import Chat, Decoding, Speaker, find_model, load
from dagster_project.commands.nearest_records import TrainingRecords
from dagster_project.commands.why_question import Options, question, tokenize, tokenizer_of
from dagster_project.core.hashing import md5_of_file, md5_of_folder
from dagster_project.core.records import example_id, read_table, write_records
from dagster_project.lineage.attribution import search, second_moment, store
from dagster_project.lineage.history import listing_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.runs import Resolver
from dagster_project.orchestration import locks

MODEL = "adapter@x"
QUESTION = ("--prompt", "Where is my hat?", "--answer", "In the blue box.", "--span", "blue")


@pytest.fixture(scope="module")
def trained(_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which a small adapter was trained, for tests that change nothing."""
    return Path(shutil.copytree(_trained, tmp_path_factory.mktemp("why") / "project", symlinks=True))


@pytest.fixture
def root(_trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_trained, tmp_path / "project", symlinks=True))


def why(root: Path, *arguments: str) -> int:
    return main(["why", MODEL, *arguments, "--project", str(root)])


def stores(root: Path) -> list[Path]:
    return list((root / ".dvc/tmp/pedigree/gradients").iterdir())


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in stores(root)[0].iterdir()}


def test_a_question_ranks_records_of_the_training_only(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "why.html"
    assert why(root, *QUESTION, "--top", "5", "--json", "--html", str(page)) == 0
    found = document(capsys)
    used = read_table(root / "data/adapter/x/examples.parquet")
    assert found["records"] == len({row["example_id"] for row in used}) == 28
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4, 5]
    for hit in found["hits"]:
        assert hit["steps"] == [row["step"] for row in used if row["example_id"] == hit["example_id"]] and hit["steps"]
    assert (
        found["question"]["span"] == "blue"
        and found["question"]["tokens"] == 4
        and found["question"]["log_probability"] < 0
    )
    assert sum(found["distribution"]["counts"]) == 28
    assert "has not all records of this training" in found["notes"][0], (
        "this project has no split, so no system prompt is known"
    )
    html = page.read_text()
    assert (
        "<mark>blue</mark>" in html
        and "Content-Security-Policy" in html
        and "<script src" not in html
        and "http:" not in html
        and "https:" not in html
    )

    assert why(root, *QUESTION, "--top", "5") == 0
    shown = capsys.readouterr().out
    assert all(hit["example_id"][:8] in shown for hit in found["hits"])
    assert "influence" not in shown.lower() and "caused" not in shown.lower()


def test_a_conversation_is_asked_as_the_command_is(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(trained, *QUESTION, "--system", "", "--top", "3") == 0
    by_command = capsys.readouterr().out
    speaker = load(trained, *find_model(trained, MODEL))
    speaker.messages = [{"role": "user", "content": QUESTION[1]}, {"role": "assistant", "content": QUESTION[3]}]
    first, wrong, whole = in_terminal(trained, speaker, "/why blue", "/why purple", "/why")
    assert first == by_command.replace("(given)", "(model)")
    assert "the part 'purple' is not in the answer" in wrong and "the whole answer" in whole
    speaker.finished = False
    [cut_off] = in_terminal(trained, speaker, "/why")
    assert "the model did not end its answer" in cut_off
    tokens = [int(found) for found in re.findall(r"whole answer: ([0-9]+) tokens", whole + cut_off)]
    assert len(tokens) == 2 and tokens[0] > tokens[1] > 0, (
        "without the token that ends an answer, which the model did not write"
    )
    earlier = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}]
    speaker.messages = [*earlier, *speaker.messages]
    [after_others] = in_terminal(trained, speaker, "/why blue")
    assert "prompt  Hello! Where is my hat?" in after_others, "the earlier turns are a part of the question"
    assert scores_of(after_others) != scores_of(first)


def test_without_gradients_a_conversation_goes_on(root: Path) -> None:
    shutil.rmtree(stores(root)[0])
    speaker = load(root, *find_model(root, MODEL))
    [before] = in_terminal(root, speaker, "/why")
    assert "nothing was answered yet" in before
    speaker.messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}]
    [missing] = in_terminal(root, speaker, "/why")
    assert f"pedigree why {MODEL} --index" in missing


def in_terminal(root: Path, speaker: Speaker, *lines: str) -> list[str]:
    """What `pedigree chat` writes for each line."""
    left, written = [*lines], list[str]()

    def read() -> str:
        written.append("")
        if not left:
            raise EOFError
        return left.pop(0)

    def write(text: str) -> None:
        written[-1] += text

    Chat(TrainingRecords(root), [speaker], None, Decoding(1), read, write).talk()
    return written[:-1]


def scores_of(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if re.match(r" +[0-9]+  [+-]", line)]


def test_an_index_is_computed_once_and_a_killed_one_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(root)
    assert why(root, "--index", "--json") == 0
    assert document(capsys)["index"]["computed"] == 0 and files(root) == before
    damaged = next(iter(stores(root)[0].glob("gradients-*.safetensors")))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    assert why(root, *QUESTION) == 2
    assert "--index" in capsys.readouterr().err
    assert why(root, *QUESTION, "--index", "--json") == 0
    assert document(capsys)["index"]["computed"] == 28 and damaged.read_bytes() == content


def validation(root: Path, count: int, text: str = "red") -> list[tuple[str, str]]:
    """Write a validation split of answers with two sentences. Returns: prompt and part of each question."""
    colors, asked, records = ("red", "blue", "green", "gold"), [], []
    for i in range(count):
        parts = [f"In the {colors[i % 4] if i else text} box.", f"It has {i} doors."]
        messages = [
            {"role": "user", "content": f"Where is hat {i}?"},
            {"role": "assistant", "content": " ".join(parts)},
        ]
        records.append(
            {"example_id": example_id(messages), "source": "a.jsonl", "messages": messages, "category": None}
        )
        asked += [(messages[0]["content"], part) for part in parts]
    shutil.rmtree(root / "data/splits/validation", ignore_errors=True)
    write_records(root / "data/splits/validation", records)
    return asked


def unsure(found: dict[str, Any]) -> str:
    """The note on why there is no comparison with the validation split."""
    [note] = [note for note in found["notes"] if "which is often wrong" in note]
    return str(note)


def test_a_question_is_compared_with_those_of_the_validation_split(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert why(root, *QUESTION, "--json") == 0
    found = document(capsys)
    assert found["distribution"]["compared"] is None and "is not the split of the training" in unsure(found)
    asked = validation(root, 12)
    assert why(root, *QUESTION, "--json") == 0
    assert "was not compared: --index compares it" in unsure(document(capsys))
    assert why(root, "--index", "--json") == 0
    index = document(capsys)["index"]
    assert index["computed"] == 0 and index["questions"] == len(asked) == 24
    before = files(root)
    assert (
        why(root, "--index", "--json") == 0 and document(capsys)["index"]["questions"] == 24 and files(root) == before
    )
    page = tmp_path / "why.html"
    assert why(root, *QUESTION, "--json", "--html", str(page)) == 0
    found = document(capsys)
    compared = found["distribution"]["compared"]
    assert compared["questions"] == 24 and found["distribution"]["stands_out"] == (compared["p"] <= 0.1)
    assert (
        not any("which is often wrong" in note for note in found["notes"])
        and "24 questions of the validation split" in page.read_text()
    )
    assert why(root, *QUESTION) == 0
    assert f"p {compared['p']:.3f} (" in capsys.readouterr().out

    # the same scores, each question asked alone: of the part as a span of its answer, at the model
    target = why_model.target(root, MODEL)
    stored = target.store.read()
    tokenizer = tokenizer_of(target)
    expected = []
    for i, (prompt, part) in enumerate(asked):
        answer = " ".join(text for _, text in asked[i - i % 2 : i - i % 2 + 2])
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        _, gradient = target.model.of_span(tokenize(tokenizer, messages, part).example)
        vector = target.projection.project(gradient).numpy()
        expected.append(vector / np.linalg.norm(vector))
    known = why_calibration.read(target)
    assert known is not None
    _, gradient = target.model.of_span(question(Options(*QUESTION[1::2]), None, tokenizer, None).example)
    [scores] = stored.scores(target.projection.project(gradient).numpy()[None])
    assert compared["p"] == round(known.p_value(scores), 4) and compared["excess"] == round(known.excess(scores), 4)
    assert found["distribution"]["first"] == round(float(scores.max()), 4)
    alike = why_calibration.cosines_of(target)
    far = np.abs(alike[:, None] - (np.stack(expected) @ stored.units.astype(np.float32).T)[None]).max(2)
    assert np.allclose(known.scores, stored.scores(np.stack(expected)[far.argmin(1)]), atol=2e-3)
    assert far.min(1).max() < 2e-3 and sorted(far.argmin(1).tolist()) == list(range(24)), (
        "each stored question is another one of these"
    )
    assert sorted(known.owners.tolist()) == [i // 2 for i in range(24)]
    note = target.store.folder / why_calibration.NOTE
    note.write_text(note.read_text().replace('"code": "', '"code": "of another version'))
    assert why(root, *QUESTION, "--json") == 0
    assert "another version; --index makes it again" in unsure(document(capsys))


def test_many_records_are_answered_from_few_gradients_and_a_note_says_so(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    validation(root, 12)
    for module, name, value in ((store, "IN_MEMORY", 20), (second_moment, "SAMPLE", 4), (store, "PROBES", 4)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(search, "MOST", 4)
    shutil.rmtree(stores(root)[0])  # of few records
    assert why(root, *QUESTION, "--index", "--top", "4", "--json") == 0
    found = document(capsys)
    [note] = [note for note in found["notes"] if "estimates" in note]
    read = int(re.findall(r"gradients of (\d+) of 28 records", note)[0])
    assert 4 <= read < 28
    target = why_model.target(root, MODEL)
    stored = target.store.read()
    example = question(Options(*QUESTION[1::2]), None, tokenizer_of(target), None).example
    asked = target.projection.project(target.model.of_span(example)[1]).numpy()[None]
    [scores] = stored.scores(asked)
    numbers = {record.example_id: i for i, record in enumerate(target.records)}
    assert [hit["gradient"]["score"] for hit in found["hits"]] == [
        round(float(scores[numbers[hit["example_id"]]]), 4) for hit in found["hits"]
    ]
    assert found["distribution"]["compared"]["questions"] == 24 and found["distribution"]["first"] <= round(
        float(scores.max()), 4
    )
    assert why(root, *QUESTION) == 0 and "estimates from sketches" in capsys.readouterr().out


def test_questions_of_another_split_and_damaged_ones_are_not_used(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def questions() -> Any:
        assert why(root, *QUESTION, "--json") == 0
        return (document(capsys)["distribution"]["compared"] or {}).get("questions")

    validation(root, 12)
    assert why(root, "--index") == 0 and "24 questions" in capsys.readouterr().out and questions() == 24
    validation(root, 12, "black")
    assert questions() is None
    assert why(root, "--index") == 0 and capsys.readouterr() and questions() == 24
    [file] = stores(root)[0].glob("validation.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert questions() is None
    assert why(root, "--index") == 0 and capsys.readouterr() and questions() == 24 and file.read_bytes() == content
    (stores(root)[0] / "validation.json").write_text("[]")
    assert questions() is None
    for few in ((9, "red"), (1, ". ".join(["red box"] * 30))):  # 18 questions; and many, all about one answer
        validation(root, *few)
        assert why(root, "--index", "--json") == 0 and document(capsys)["index"]["questions"] == 0
        assert questions() is None


def test_the_validation_split_of_another_training_is_not_asked_about(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `splits` alone ran again, it may have records that the model was trained on."""
    validation(root, 12)
    [shard] = (root / "data/splits/validation").glob("*.parquet")
    recorded = [("out", "train", "0" * 32), ("out", "validation", md5_of_file(shard))]
    monkeypatch.setattr(Index, "shards", lambda index, run: recorded)
    assert why(root, "--index", "--json") == 0 and document(capsys)["index"]["questions"] == 24
    recorded[1] = ("out", "validation", "0" * 32)
    assert why(root, *QUESTION, "--json") == 0
    found = document(capsys)
    assert found["distribution"]["compared"] is None and any(
        "is not the split of the training" in note for note in found["notes"]
    )
    assert why(root, "--index", "--json") == 0 and document(capsys)["index"]["questions"] == 0
    recorded.clear()  # as in a clone that never had the files of that data set
    read = SimpleNamespace(inputs=(("data/splits", "data/splits", md5_of_folder(listing_of(root / "data/splits"))),))
    monkeypatch.setattr(Index, "ancestors", lambda index, run: {"out": read})
    assert why(root, "--index", "--json") == 0 and document(capsys)["index"]["questions"] == 24
    validation(root, 12, "black")
    assert why(root, "--index", "--json") == 0 and document(capsys)["index"]["questions"] == 0


@pytest.mark.parametrize("ended", [True, False])
def test_the_answer_of_the_model_is_explained_where_none_is_given(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    def say(model: Any, tokenizer: Any, prompts: list[list[int]], *_: Any) -> list[list[int]]:
        """What this random model does not say by itself, which ends its answers at once."""
        [prompt] = prompts
        assert tokenizer.decode(prompt).endswith("Where is my hat?<|im_end|>\n<|im_start|>assistant\n")
        return [[*tokenizer.encode("In the red box."), *([tokenizer.eos_token_id] if ended else [])]]

    assert why(trained, "--prompt", "Where is my hat?") == 2
    assert "the model's answer is empty" in capsys.readouterr().err
    monkeypatch.setattr(why_question, "generate_ids", say)
    assert why(trained, "--prompt", "Where is my hat?", "--json") == 0
    found = document(capsys)
    asked = found["question"]
    assert asked["answered_by"] == "model" and asked["span"] is None
    [(start, stop)] = asked["spans"]
    assert asked["answer"][start:stop].startswith("In the red box.")
    assert ("<|im_end|>" in asked["answer"][start:stop]) is ended
    assert any("the model did not end its answer" in note for note in found["notes"]) is not ended


def test_the_check_trains_again_with_the_very_bytes_and_says_what_it_does_not_support(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = (root / "data/adapter/x/adapter_model.safetensors").read_bytes()
    code = why(root, *QUESTION, "--top", "2", "--prove", "--draws", "2", "--json")
    proof = document(capsys)["proof"]
    assert proof["identical"] and proof["left_out"] == 2 and len(proof["draws"]) == 2
    assert code == (0 if proof["supported"] else 1)
    assert proof["difference"] == pytest.approx(proof["change"] - sum(proof["draws"]) / 2, abs=2e-4)
    kept = {path.read_bytes() for path in (root / ".dvc/tmp/pedigree/proofs").rglob("adapter_model.safetensors")}
    assert len(kept) == 4 and adapter in kept
    assert (root / "data/adapter/x/adapter_model.safetensors").read_bytes() == adapter

    left = next((root / ".dvc/tmp/pedigree/proofs").glob("*/*/")).with_suffix(".training")
    left.mkdir()  # the command was killed before it removed this
    assert why(root, *QUESTION, "--top", "2", "--prove", "--draws", "2") == code
    assert not left.exists()
    shown = capsys.readouterr()
    assert "0 of 4 trainings" in shown.err, "those of the first question are kept"
    assert ("NOT supported" in shown.out) == (not proof["supported"])

    damaged, *others = sorted((root / ".dvc/tmp/pedigree/proofs").rglob("adapter_model.safetensors"))
    intact = damaged.read_bytes()
    damaged.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    note = others[0].with_name("done.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "made_by": {"code": "other"}}))
    config = others[1].with_name("adapter_config.json")
    unedited = config.read_text()
    config.write_text(json.dumps(json.loads(unedited) | {"lora_alpha": 999}))
    assert why(root, *QUESTION, "--top", "2", "--prove", "--draws", "2") == code
    assert "3 of 4 trainings" in capsys.readouterr().err, "damaged ones, and one by other code, are run again"
    assert damaged.read_bytes() == intact and "other" not in note.read_text() and config.read_text() == unedited


def test_data_that_an_interrupted_check_copied_are_removed_with_this_version_of_the_model(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(why_prove.adapter, "produce", interrupted)
    assert why(root, *QUESTION, "--top", "2", "--prove") == 130
    proofs = root / ".dvc/tmp/pedigree/proofs"
    assert [*proofs.glob("*/*.training/tokenized/*.parquet")]
    why_prove.remove_others(proofs, "a later version", MODEL)
    assert not [*proofs.iterdir()]


def test_the_check_waits_for_nobody_and_trains_nothing_while_the_stage_is_in_use(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(holder: str) -> None:
        raise AssertionError(holder)

    with locks.hold(root, MODEL, refuse, "pedigree erase"):
        assert why(root, *QUESTION, "--top", "2", "--prove") == 1
    shown = capsys.readouterr()
    assert "being used by" in shown.err and "pedigree erase" in shown.err and not shown.out
    assert not (root / ".dvc/tmp/pedigree/proofs").exists()


def test_a_record_that_has_a_row_to_itself_cannot_be_checked(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(why_prove, "fits", lambda tokenized, names: len(names) > 1)
    assert why(trained, *QUESTION, "--top", "1", "--prove") == 2
    said = capsys.readouterr().err
    assert "the first record has a row to itself (all records do without tokenized.packing)" in said
    assert "a larger tokenized.packed_length puts several into one" in said


def test_a_changed_adapter_or_other_data_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = root / "data/adapter/x/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + b"\x01")
    assert why(root, *QUESTION) == 2
    assert "data/adapter/x" in capsys.readouterr().err
    weights.write_bytes(content)
    shutil.rmtree(root / "data/tokenized")
    assert why(root, *QUESTION) == 2
    assert "dvc checkout data/tokenized" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--prompt is required"),
        (("--index", "--span", "x"), "--prompt is required with --span"),
        (("--prompt", " "), "--prompt: empty"),
        (("--prompt", "Hat?", "--answer", ""), "empty"),
        (("--prompt", "Hat?", "--answer", "In a box.", "--span", "bag"), "not in the answer"),
        (("--prompt", "Hat?", "--html", "page.txt"), "must end in .html"),
        (("--prompt", "Hat?", "--answer", "Yes.", "--prove", "--draws", "1"), "--draws 1"),
        (("--prompt", "Hat?", "--answer", "Yes.", "--draws", "3"), "--draws is only used with --prove"),
        (("--prompt", "Hat?", "--answer", "Yes.", "--prove", "--top", "28"), "--top"),
    ],
)
def test_bad_input_is_refused_with_one_message(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    before = files(trained)
    assert why(trained, *arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and not shown.out
    assert files(trained) == before


def test_without_an_index_the_next_step_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / ".dvc/tmp/pedigree/gradients")
    assert why(root, *QUESTION) == 2
    assert "add --index" in capsys.readouterr().err
    assert main(["why", "nothing@here", "--index", "--project", str(root)]) == 2


def test_a_question_reads_the_history_once(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, connect = list[Resolver](), Resolver.connect
    monkeypatch.setattr(Resolver, "connect", lambda resolver: (resolved.append(resolver), connect(resolver)))
    assert why(trained, *QUESTION) == 0
    assert len(resolved) == 1


def test_an_audit_lists_the_gradients_of_the_very_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed() -> Any:
        assert main(["audit", MODEL, "--json", "--project", str(root)]) == 0
        return document(capsys).get("gradients")

    [store] = stores(root)
    size = sum(path.stat().st_size for path in store.glob("*.safetensors"))
    assert listed() == [
        {"stage": MODEL, "folder": store.relative_to(root).as_posix(), "records": 28, "of": 28, "bytes": size}
    ]
    assert main(["audit", MODEL, "--project", str(root)]) == 0
    assert f"{MODEL}: {store.relative_to(root).as_posix()}, 28 of 28 records" in capsys.readouterr().out
    manifest = json.loads((store / "store.json").read_text())
    for damaged in ({}, {"identity": []}, manifest | {"shards": None}):
        (store / "store.json").write_text(json.dumps(damaged))
        assert listed() is None, "a damaged store is listed by nobody, and an audit needs none"
    (store / "store.json").write_text(json.dumps(manifest | {"records": 32 + 28}))
    assert [(one["records"], one["of"], one["bytes"]) for one in listed()] == [(32, 60, size)], (
        "it was interrupted after one file"
    )
    assert main(["audit", MODEL, "--project", str(root)]) == 0
    assert "32 of 60 records" in capsys.readouterr().out
    manifest["identity"]["adapter"] = "0" * 64
    (store / "store.json").write_text(json.dumps(manifest))
    assert listed() is None, "a store of another training of the same stage"
    shutil.rmtree(store)
    assert listed() is None
