"""`pedigree chat`: answers are those of evaluation, conversations go on, and
what is shown about training records is what the lineage says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pedigree

from dagster_project.__main__ import main
from dagster_project.commands import chat
from dagster_project.commands.chat import Chat, Decoding, Speaker
from dagster_project.commands.model_ids import model_id
from dagster_project.commands.nearest_records import TrainingRecords, nearest_text, places_in
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute
from dagster_project.core.records import read_records, read_table, write_records
from dagster_project.evaluation.evaluator import EvaluatedModel, Settings
from dagster_project.lineage.history import md5_on_disk
from dagster_project.training.methods.build import build
from dagster_project.training.methods.load import load

COMPUTE = Compute(threads=1, dtype="float32")
LONGEST = 12


@pytest.fixture
def speaker(tiny_model: Path) -> Speaker:
    return Speaker("tiny", tiny_model, EvaluatedModel(tiny_model, COMPUTE, Settings(max_new_tokens=LONGEST)))


def talk(speakers: list[Speaker], *lines: str, root: Path = Path(), **how: Any) -> str:
    """What the terminal shows."""
    given: Iterator[str] = iter(lines)
    shown: list[str] = []

    def read() -> str:
        line = next(given, None)
        if line is None:
            raise EOFError
        return line

    Chat(TrainingRecords(root), speakers, None, Decoding(LONGEST, **how), read, shown.append).talk()
    return "".join(shown)


def test_an_answer_is_that_of_the_evaluation_and_its_parts_are_its_text(speaker: Speaker) -> None:
    parts: list[str] = []
    reply = speaker.ask("Where is my parcel?", None, Decoding(LONGEST), parts.append)
    asked = [{"role": "user", "content": "Where is my parcel?"}]
    assert reply.message == speaker.model.answer([asked], "x")[0].message
    assert "".join(parts).strip() == reply.message["content"] and len(parts) > 1 and 0 < reply.tokens <= LONGEST


def test_the_next_question_is_asked_after_the_earlier_turns(speaker: Speaker) -> None:
    talk([speaker], "One?", "Two?")
    assert [message["role"] for message in speaker.messages] == ["user", "assistant"] * 2
    assert speaker.messages[3] == speaker.model.answer([speaker.messages[:3]], "x")[0].message


def test_an_answer_that_is_stopped_keeps_what_was_written(speaker: Speaker) -> None:
    parts: list[str] = []

    def write(text: str) -> None:
        parts.append(text)
        if len(parts) == 3:
            raise KeyboardInterrupt

    reply = speaker.ask("Where?", None, Decoding(LONGEST), write)
    assert not reply.finished and reply.message["content"] == "".join(parts).strip() == speaker.messages[-1]["content"]


@pytest.mark.parametrize("tokens", [1, 2])
def test_an_answer_to_one_question_that_the_limit_cut_off_is_noted(
    project: Path, tiny_model: Path, tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["chat", str(tiny_model), "--once", "Hi", "--max-new-tokens", str(tokens), "--project", str(project)]
    assert main([*asked, "--json"]) == 0
    printed = capsys.readouterr()
    (answer,) = json.loads(printed.out)["answers"]
    noted = f"not finished after {tokens} token{'s' if tokens > 1 else ''} (--max-new-tokens)"
    assert (noted in printed.err) is not answer["finished"]
    assert not answer["finished"], "otherwise nothing is tested"


def test_an_empty_question_is_refused(project: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", " \n"):  # such as a variable of the shell that is not set
        assert main(["chat", str(tiny_model), "--once", text, "--project", str(project)]) == 2
        printed = capsys.readouterr()
        assert "--once: the question is empty" in printed.err and not printed.out


def test_two_models_answer_each_in_its_own_conversation(tiny_model: Path, speaker: Speaker) -> None:
    other = Speaker("other", tiny_model, speaker.model)
    said = talk([speaker, other], "Where?", "/reset", "Who?", temperature=3.0)
    assert said.index("[tiny]") < said.index("[other]") and "a new conversation" in said
    assert len(speaker.messages) == len(other.messages) == 2 and speaker.messages[0]["content"] == "Who?"


def test_sampled_answers_depend_on_the_seed_and_the_place_in_the_conversation(speaker: Speaker) -> None:
    def answers(seed: int) -> list[str]:
        speaker.messages = []
        talk([speaker], "A?", "A?", temperature=5.0, seed=seed)
        return [message["content"] for message in speaker.messages if message["role"] == "assistant"]

    first = answers(1)
    assert answers(1) == first and answers(2) != first and first[0] != first[1]


def test_a_system_prompt_begins_the_conversation(speaker: Speaker) -> None:
    talk([speaker], "/system Be brief.", "A?", "/reset", "B?")
    assert [message["content"] for message in speaker.messages[:2]] == ["Be brief.", "B?"]
    talk([speaker], "/system")
    assert speaker.messages == []


def test_a_model_that_scores_answers_is_refused(project: Path, tiny_model: Path, tmp_path: Path) -> None:
    """transformers would load it with an output layer of random weights, and without a word."""
    shutil.copytree(tiny_model, tmp_path / "m")
    for kind in ("LlamaForSequenceClassification", "LlamaModel"):
        config = json.loads((tmp_path / "m/config.json").read_text())
        (tmp_path / "m/config.json").write_text(json.dumps(config | {"architectures": [kind]}))
        with pytest.raises(InputError, match=f"does not generate text: {kind}"):
            chat.find_model(project, str(tmp_path / "m"))


def test_an_adapter_of_an_aligned_model_answers_on_the_model_that_it_was_trained_on(
    project: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, project / "data/base_model", dirs_exist_ok=True)
    supervised = Path(shutil.copytree(tiny_model, project / "data/merged/lora"))
    weights = load_file(supervised / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * torch.linspace(-1, 1, 64)
    save_file(weights, supervised / "model.safetensors", {"format": "pt"})
    cpu, ids = torch.device("cpu"), torch.tensor([[1, 40, 50, 60]])
    prepared = build("lora", {}, supervised, cpu, torch.float32, "aligned.dpo", named="data/merged/lora")
    prepared.save(project / "data/aligned/dpo")  # as it began: it changes nothing
    with torch.no_grad():
        found = chat.load(project, "data/aligned/dpo", project / "data/aligned/dpo").model.model(ids).logits.float()
        assert torch.allclose(found, load(supervised, None, cpu, torch.float32)(ids).logits, atol=0.1)
        assert not torch.allclose(found, load(tiny_model, None, cpu, torch.float32)(ids).logits, atol=0.1)


@pytest.mark.parametrize(
    ("base", "refused"),
    [
        (model_id("merged@lora", "6d292c09.dir"), "is an adapter of merged-lora-6d292c09, not of the base model"),
        (model_id("merged@日本", "6d292c09.dir"), "is an adapter of merged-6d292c09, not of the base model"),
        (
            model_id("base_model", "6d292c09.dir"),
            "is an adapter of base_model-6d292c09, and data/base_model is base_mod",
        ),
        ("", ""),
    ],
)
def test_an_exported_adapter_answers_only_on_the_base_model_that_it_names(
    project: Path, tiny_model: Path, base: str, refused: str
) -> None:
    shutil.copytree(tiny_model, project / "data/base_model", dirs_exist_ok=True)
    named = base or model_id("base_model", md5_on_disk(project / "data/base_model"))
    prepared = build("lora", {}, tiny_model, torch.device("cpu"), torch.float32, "adapter.x", named=named)
    prepared.save(project / "exported")
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        chat.load(project, "exported", project / "exported")


@pytest.mark.parametrize("reasoning", [True, False])
def test_an_answer_begins_as_in_training(speaker: Speaker, monkeypatch: pytest.MonkeyPatch, reasoning: bool) -> None:
    """Some templates begin an answer with a trace in another way than one without."""
    asked = []
    monkeypatch.setattr(chat, "encode_prompt", lambda *given: asked.append(given[3]) or [5])
    speaker.reasoning = reasoning
    speaker.ask("One?", None, Decoding(LONGEST), print)
    assert asked == [reasoning]


def test_saved_conversations_are_examples_that_check_reads(speaker: Speaker, tmp_path: Path) -> None:
    said = talk(
        [speaker],
        "/save x",
        "Where is it?",
        f"/save {tmp_path / 'talks.jsonl'}",
        "And why?",
        f"/save {tmp_path / 'talks.jsonl'}",
    )
    assert "there is no conversation yet" in said and "appended 1 conversation to" in said
    rows = [json.loads(line) for line in (tmp_path / "talks.jsonl").read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 4] and rows[1]["messages"] == speaker.messages
    found = json.loads(pedigree(tmp_path, "check", "talks.jsonl", "--json").stdout)
    assert (found["format"], found["rows"]) == ("messages", 2)


def test_a_conversation_is_not_saved_into_an_output_and_a_bad_name_does_not_end_it(
    speaker: Speaker, tmp_path: Path
) -> None:
    (tmp_path / "data/sources").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  raw_examples:\n    cmd: a\n    deps: [{path: data/sources, md5: 01.dir}]\n"
        "    outs: [{path: data/raw_examples, md5: 02.dir}]\n"
    )
    names = ("data/raw_examples/x.jsonl", "dvc.lock", "data/sources/talks.jsonl")
    saves = [f"/save {tmp_path / name}" for name in names]
    said = talk([speaker], "A?", *saves, "/save ~nobody-of-this-name/x", "/save a\0b", "B?", root=tmp_path)
    assert "lies in data/raw_examples, an output of raw_examples" in said and "is dvc.lock" in said
    assert "~nobody-of-this-name/x: Could not determine home directory" in said and "null byte" in said
    assert len(speaker.messages) == 4, "the second question was answered"
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["sources", "talks.jsonl"]
    assert (tmp_path / "dvc.lock").read_text().endswith("md5: 02.dir}]\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bad", "/bad: unknown"),
        ("/data", "nothing was asked yet"),
        ("/save", "/save: no file"),
        ("/save /", "there is no conversation yet"),
    ],
)
def test_a_wrong_command_is_one_message_and_the_conversation_goes_on(speaker: Speaker, line: str, message: str) -> None:
    said = talk([speaker], line, "A?")
    assert message in said and "Traceback" not in said and len(speaker.messages) == 2


def test_a_line_that_is_not_utf8_is_one_message_and_the_conversation_goes_on(speaker: Speaker) -> None:
    said = talk([speaker], "M\udcfcller?", "A?")
    assert said.count("not UTF-8") == 1 and "(" in said, "the second question is answered"
    assert [message["content"] for message in speaker.messages if message["role"] == "user"] == ["A?"]


def test_a_conversation_ends_without_a_traceback_when_its_reader_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def closed(root: Path, options: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("dagster_project.commands.chat.talk", closed)
    monkeypatch.setattr("dagster_project.commands.ending.discard", lambda stream: None)
    (tmp_path / "dvc.yaml").touch()
    assert main(["chat", "release", "--project", str(tmp_path)]) == 0


def test_hidden_characters_of_an_answer_are_written_out(speaker: Speaker) -> None:
    shown: list[str] = []
    text = chat._Text(speaker.model.tokenizer, shown.append)
    text._write("a\x1b[31mb")
    assert shown == ["a\\x1b[31mb"]
    assert (
        chat.call_text({"function": {"name": "find", "arguments": {"city": "Oslo"}}}) == 'call: find({"city": "Oslo"})'
    )


def test_a_text_that_is_not_utf8_is_refused_and_the_conversation_goes_on(speaker: Speaker) -> None:
    """As terminals and scripts in another encoding give it: caf\xe9 in Latin-1."""
    shown = talk([speaker], "caf\udce9", "One?")
    assert "not UTF-8" in shown and [
        message["content"] for message in speaker.messages if message["role"] == "user"
    ] == ["One?"]
    with pytest.raises(InputError, match="not UTF-8"):
        speaker.ask("One?", [{"type": "function", "function": {"name": "\ud800"}}], Decoding(LONGEST), print)


def test_a_conversation_longer_than_the_context_is_refused(speaker: Speaker) -> None:
    speaker.model.tokenizer.model_max_length = 20
    said = talk([speaker], "a b c d e f g h i j k l m n o p", "/reset", "A?")
    assert "leaves no room for an answer" in said and "ask a shorter question" in said
    assert "/reset" not in said, "there is nothing to begin anew, and `chat --once` has no /reset"
    speaker.model.tokenizer.model_max_length = 50
    said = talk([speaker], "a b c d", "/reset", "a b c d", "a b c d e f")
    assert "leaves no room for an answer" in said and "/reset begins anew" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("merged@lora", r"merged@lora: there is no model in data/merged/lora.*dvc repro merged@lora"),
        ("merged", r"merged: no variant is named.*merged@lora"),
        ("nothing", "there is no such folder with a model"),
        ("merged@../../x", r"params.yaml has no adapter\.\.\./\.\./x.*merged@lora"),
        ("merged@lorra", r"merged@lorra: params.yaml has no adapter.lorra.*name one of merged@lora"),
        ("merged_aligned@lora", r"params.yaml has no aligned.lora.*name one of merged_aligned@dpo"),
        (None, "no model was made here yet"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_the_command_that_makes_it(
    project: Path, name: str | None, message: str
) -> None:
    shutil.rmtree(project / "data/base_model", ignore_errors=True)
    with pytest.raises(InputError, match=f"(?s){message}"):
        chat.find_model(project, name)


@pytest.mark.parametrize(
    "content",
    ["[]", '{"a":' * 100_000, '{"model_type": "llama", "vocab_size": 1000000000000, "hidden_size": 1000000000}'],
)
def test_a_model_with_an_impossible_configuration_is_refused(project: Path, content: str) -> None:
    (project / "models/tiny/config.json").write_text(content)
    with pytest.raises(InputError, match="models/tiny cannot be loaded: "):
        chat.load(project, "models/tiny", project / "models/tiny")


def test_of_an_adapter_its_base_model_is_restored_too(project: Path) -> None:
    for folder in (project / "data/base_model", project / "data/adapter/lora"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (project / "data/adapter/lora/adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="dvc checkout --force data/adapter/lora data/base_model` restores it"):
        chat.load(project, "adapter@lora", project / "data/adapter/lora")


@pytest.mark.parametrize("kind", ["index", "adapter"])
def test_weights_that_would_be_unpickled_are_refused(project: Path, kind: str) -> None:
    """Also by the restricted unpickler of torch.load, which transformers and PEFT call for such files."""
    folder = project / "models/tiny"
    (folder / "model.safetensors").rename(folder / "weights.bin")
    if kind == "index":
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "weights.bin"}})
        )
    else:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        (folder / "weights.bin").rename(folder / "adapter_model.bin")
        with pytest.raises(
            InputError,
            match=r"is an adapter, and its base model is not in data/base_model\nhint: .*dvc repro base_model",
        ):
            chat.load(project, "models/tiny", folder)
        (project / "data").mkdir(exist_ok=True)
        shutil.copytree(folder, project / "data/base_model")
    with pytest.raises(InputError, match="weights in other formats are not read"):
        chat.load(project, "models/tiny", folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_bitsandbytes_would_quantize_is_refused(project: Path, bits: int) -> None:
    """Its first pass ends in an AssertionError of bitsandbytes."""
    path = project / "models/tiny/config.json"
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "quantization_config": {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True},
            }
        )
    )
    with pytest.raises(InputError, match="bitsandbytes quantizes, which is not supported"):
        chat.load(project, "models/tiny", project / "models/tiny")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1", b"", None], ids=["not downloaded", "empty", "missing"]
)
def test_a_model_with_a_damaged_file_is_refused(project: Path, file: str, content: bytes | None) -> None:
    (path := project / "models/tiny" / file).unlink()
    if content is not None:
        path.write_bytes(content)
    if file == "config.json" and content is None:
        with pytest.raises(InputError, match="there is no such folder with a model"):
            chat.find_model(project, "models/tiny")
        return
    with pytest.raises(InputError, match=r"models/tiny cannot be loaded: .+\nhint: .*dvc checkout --force models/tiny"):
        chat.load(project, "models/tiny", project / "models/tiny")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "[1]",
        "no",
        '[{"type": "function", "function": "x"}]',
        '[{"a": 1}]',
        '[{"name": "f", "parameters": 3}]',
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_tools_that_are_no_list_of_functions_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(InputError, match="--tools"):
        chat.read_tools(tmp_path / "tools.json")
    (tmp_path / "tools.json").write_text(
        '[{"name": "f"}, {"type": "function", "function": {"name": "g", "parameters": {}}}]'
    )
    assert chat.read_tools(tmp_path / "tools.json")


def test_tools_in_a_file_that_does_not_exist_are_refused_in_plain_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: No such file or directory\n"):
        chat.read_tools(tmp_path / "none.json")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)  # may have to make the finished project
def test_the_release_talks_and_names_the_rows_that_it_was_trained_on(finished: Path) -> None:
    done = pedigree(
        finished, "chat", "--once", "Where is my parcel?", "--max-new-tokens", "4", "--compare", "base_model", "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [answer["folder"] for answer in document["answers"]] == ["data/release", "data/base_model"]
    records = read_records(finished / "data/splits/train")
    trained = {row["example_id"]: set() for row in read_table(finished / "data/adapter/lora/examples.parquet")}
    for row in read_table(finished / "data/adapter/lora/examples.parquet"):
        trained[row["example_id"]].add(row["step"])
    record = next(record for record in records if record["example_id"] in trained)
    question = next(m["content"] for m in record["messages"] if m["role"] == "user")
    found = TrainingRecords(finished).nearest("merged@lora", question, 3)
    best = found.records[0]
    assert best["example_id"] == record["example_id"] and set(best["steps"]) == trained[record["example_id"]]
    source = json.loads((finished / best["source"]).read_text())
    assert source[best["source_row"]]["instruction"] in best["prompt"]
    assert {one["example_id"] for one in found.records} <= trained.keys()
    shutil.rmtree(finished / "data/splits/train")
    assert "are not in data/splits/train" in nearest_text(TrainingRecords(finished).nearest("merged@lora", "parcel", 3))
    assert "was not trained on records of this project" in nearest_text(
        TrainingRecords(finished).nearest("base_model", "parcel", 3)
    )


def test_a_step_with_several_examples_of_a_record_is_listed_once() -> None:
    uses = [{"example_id": "a", "source": "s.jsonl", "source_row": 3, "step": step} for step in (1, 1, 2, 8, 8)]
    assert places_in(uses) == {"a": {"source": "s.jsonl", "source_row": 3, "steps": [1, 2, 8]}}


def test_the_system_prompt_of_all_training_records_is_the_default(project: Path) -> None:
    def record(number: int, *system: str) -> dict[str, Any]:
        turns = [*(("system", text) for text in system), ("user", f"q{number}"), ("assistant", "a")]
        return {"example_id": str(number), "messages": [{"role": role, "content": text} for role, text in turns]}

    for records, expected in (
        ([record(0, "Be kind."), record(1, "Be kind.")], "Be kind."),
        ([record(0, "Be kind."), record(1)], None),
        ([record(0), record(1)], None),
    ):
        shutil.rmtree(project / "data/splits", ignore_errors=True)
        write_records(project / "data/splits/train", records)
        assert TrainingRecords(project).system_prompt() == expected
    shutil.rmtree(project / "data/splits")
    assert TrainingRecords(project).system_prompt() is None


def test_training_records_have_traces_if_each_answer_has_one(project: Path) -> None:
    def record(number: int, **trace: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **trace}]
        return {"example_id": str(number), "messages": turns}

    thinks = record(0, reasoning_content="So.")
    for records, expected in (
        ([thinks, record(1, reasoning_content="Hm.")], True),
        ([thinks, record(1)], False),
        ([record(1)], False),
    ):
        shutil.rmtree(project / "data/splits", ignore_errors=True)
        write_records(project / "data/splits/train", records)
        assert TrainingRecords(project).have_traces() == expected
