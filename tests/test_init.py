"""`pedigree init`: an empty folder becomes a valid project, whatever the layout
of the data, and nothing is overwritten."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.files import jsonl
from builders.installed import installed
from builders.layouts import BENCHMARK_ROWS, LAYOUT_ROWS, PAIR_ROWS
from conftest import ROOT, run
from ruamel.yaml import YAML

from dagster_project.__main__ import main
from dagster_project.commands import init as init_module
from dagster_project.commands.init import init
from dagster_project.commands.init_data import Found
from dagster_project.commands.init_params import SAMPLE_MODEL, params_text
from dagster_project.core.errors import InputError
from dagster_project.core.published_ids import read_key
from dagster_project.curation.check_files import check_paths
from dagster_project.orchestration import dvc
from dagster_project.pipeline import UNREAD, sections, validate

HEAVY = ("torch", "transformers", "dagster", "dvc", "datasets", "trl", "peft", "great_expectations", "sklearn", "ray")


def make(
    tmp_path: Path, files: dict[str, list[dict[str, Any]]], **options: Any
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A project of these JSON files: folder, document and parameters."""
    names = []
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps(rows))
        names.append(str(tmp_path / name))
    arguments = {"base_model": None, "task": "auto", "license": "MIT", **options}
    document = init(tmp_path / "project", names, **arguments)
    return tmp_path / "project", document, validate(tmp_path / "project")


def chats(answers: list[str], **more: Any) -> list[dict[str, Any]]:
    words = ["wren", "heron", "plover", "curlew", "dunlin", "siskin", "merlin", "osprey", "gannet", "fulmar"]
    prompts = [
        f"Tell me about the {words[i % 10]} and the {words[i // 10 % 10]} of {i} hills." for i in range(len(answers))
    ]
    return [{"prompt": prompt, "completion": answer, **more} for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_every_layout_of_examples_gives_valid_parameters_that_state_what_check_finds(
    layout: str, tmp_path: Path
) -> None:
    folder, document, values = make(tmp_path, {"mine.json": [LAYOUT_ROWS[layout][0]]})
    checked = check_paths([str(tmp_path / "mine.json")])
    assert list(values) == [name for name in sections() if name not in UNREAD]
    assert values["raw_examples"]["sources"] == [{"path": "data/sources/mine.json", "license": "MIT"}]
    assert document["sources"] == [
        {"path": "data/sources/mine.json", "kind": "examples", "layout": checked["format"], "rows": 1}
    ]
    assert checked["format"] == layout
    text = (folder / "params.yaml").read_text()
    assert f"# {layout}, 1 row\n" in text and f"the checks keep {checked['kept']} of 1 row" in text
    assert (folder / "data/sources/mine.json").read_bytes() == (tmp_path / "mine.json").read_bytes()


@pytest.mark.parametrize("layout", [name for name in PAIR_ROWS if name != "oasst"])  # trees are read as examples
def test_preferences_become_sources_of_an_alignment(layout: str, tmp_path: Path) -> None:
    _, document, values = make(tmp_path, {"mine.json": chats(["It sings."] * 3), "pairs.json": PAIR_ROWS[layout]})
    assert [one["kind"] for one in document["sources"]] == ["examples", "preferences"]
    assert values["raw_preferences"]["sources"] == [{"path": "data/sources/pairs.json", "license": "MIT"}]
    assert values["aligned"] == {"dpo": {"method": "dpo", "adapter": "lora"}}


@pytest.mark.parametrize("layout", ["mmlu", "hellaswag", "arc", "piqa"])
def test_benchmarks_measure_forgetting_and_are_never_trained_on(layout: str, tmp_path: Path) -> None:
    folder, _, values = make(
        tmp_path, {"mine.json": chats(["It sings."] * 3), "general.json": [BENCHMARK_ROWS[layout][0]]}
    )
    place = "data/sources/benchmarks/general.json"
    assert (folder / place).is_file()
    assert (
        values["evaluation"]["benchmarks"]
        == values["instructions"]["benchmarks"]
        == values["preferences"]["benchmarks"]
        == [place]
    )


def test_lengths_come_from_the_data(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(1500))
    _, _, values = make(tmp_path, {"mine.json": chats(["It sings.", long])})
    assert values["tokenized"]["max_length"] == 4096 and values["instructions"]["max_tokens"] == 4096
    assert values["evaluation"]["max_new_tokens"] == 512


def test_the_longer_answer_of_a_pair_counts(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": " ".join(f"word{i}" for i in range(500))}
    _, _, values = make(tmp_path, {"mine.json": chats(["It sings."]), "pairs.json": [pair]})
    assert values["preferences"]["max_length"] == 2048


def test_lengths_are_counted_with_the_tokenizer_of_a_given_model(tiny_model: Path, tmp_path: Path) -> None:
    folder, _, values = make(tmp_path, {"mine.json": chats(["It sings." * 30])}, base_model=str(tiny_model))
    assert values["base_model"]["folder"] == f"models/{tiny_model.name}"
    assert values["tokenized"]["max_length"] == 512, "one token for each byte"
    assert "by the base model's tokenizer" in (folder / "params.yaml").read_text()


def test_few_short_answers_are_labels(tmp_path: Path) -> None:
    _, document, values = make(tmp_path, {"mine.json": chats(["ham", "spam"] * 10)})
    assert document["task"] == values["evaluation"]["task"] == {"labels": "auto"}


def test_json_answers_are_scored_by_the_field_that_is_the_category(tmp_path: Path) -> None:
    rows = chats([json.dumps({"note": f"no {i}", "kind": "ab"[i % 2], "tone": "xyz"[i % 3]}) for i in range(24)])
    _, _, values = make(tmp_path, {"mine.json": [{**row, "category": "ab"[i % 2]} for i, row in enumerate(rows)]})
    assert values["evaluation"]["task"] == {
        "fields": {"note": [], "kind": ["a", "b"], "tone": ["x", "y", "z"]},
        "score": "kind",
    }


def test_answers_of_another_kind_than_the_task_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(chats([f"It sings {i} songs." for i in range(20)])))
    for task, what in (("labels", "20 different answers in 20 examples"), ("json", "not JSON objects")):
        with pytest.raises(InputError, match=f"--task {task}: .*{what}"):
            init(tmp_path / "project", [str(tmp_path / "mine.json")], None, task, "MIT")
    assert not (tmp_path / "project").exists(), "nothing was written"


def test_tools_get_a_chat_template_that_writes_them(tmp_path: Path) -> None:
    _, _, values = make(tmp_path, {"mine.json": [LAYOUT_ROWS["xlam"][0]]})
    assert values["base_model"] == {**SAMPLE_MODEL, "chat_template": "hermes"}


def reasoned(count: int) -> list[dict[str, Any]]:
    rows = chats([f"<think>\n{'step ' * 40}{i}\n</think>\n#### {i}" for i in range(count)])
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]


def test_traces_are_trained_on_and_fit_the_answer(tmp_path: Path) -> None:
    _, _, values = make(tmp_path, {"mine.json": reasoned(10)})
    assert values["base_model"] == {**SAMPLE_MODEL, "chat_template": "hermes"}
    assert values["tokenized"]["reasoning"] == "keep" and values["evaluation"]["max_new_tokens"] > 5 * 40 / 4


@pytest.mark.parametrize("rows", ["tools", "traces"])
def test_a_given_model_whose_template_does_not_write_the_data_gets_one_that_does(
    rows: str, tiny_model: Path, tmp_path: Path
) -> None:
    data = [LAYOUT_ROWS["xlam"][0]] if rows == "tools" else reasoned(3)
    _, document, values = make(tmp_path, {"mine.json": data}, base_model=str(tiny_model))
    assert values["base_model"]["chat_template"] == "hermes" and document["kept"] == len(data)


def test_a_given_model_without_a_template_gets_one(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").unlink()
    rows = chats(["It sings.", "It flies."])
    _, document, values = make(tmp_path, {"mine.json": rows}, base_model=str(tmp_path / "plain"))
    assert values["base_model"]["chat_template"] == "hermes" and document["kept"] == 2
    state = json.loads((tmp_path / "plain/tokenizer.json").read_text())
    state["added_tokens"] = [token for token in state["added_tokens"] if "im_" not in token["content"]]
    (tmp_path / "plain/tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((tmp_path / "plain/tokenizer_config.json").read_text())
    (tmp_path / "plain/tokenizer_config.json").write_text(
        json.dumps({**settings, "bos_token": None, "eos_token": "<|endoftext|>"})
    )
    shutil.rmtree(tmp_path / "project")
    _, document, values = make(tmp_path, {"mine.json": rows}, base_model=str(tmp_path / "plain"))
    assert values["base_model"]["chat_template"] == "alpaca" and document["kept"] == 2


def test_the_template_of_a_given_model_stays_if_it_writes_the_data(tiny_model: Path, tmp_path: Path) -> None:
    _, _, values = make(tmp_path, {"mine.json": chats(["It sings."] * 3)}, base_model=str(tiny_model))
    assert "chat_template" not in values["base_model"]


def test_the_default_model_is_that_of_the_sample() -> None:
    assert YAML(typ="safe").load((ROOT / "params.yaml").read_text())["base_model"] == SAMPLE_MODEL


def test_texts_of_the_data_cannot_break_the_parameters(tmp_path: Path) -> None:
    odd = ["yes", 'say "no": {x}', "# none", "- 1\nb", "\u2028é 🐦"]
    rows = chats([json.dumps({"kind": odd[i % 5], "text": str(i)}) for i in range(25)])
    _, _, values = make(tmp_path, {"my data: #1.json": [{**row, "category": odd[i % 5]} for i, row in enumerate(rows)]})
    assert set(values["evaluation"]["task"]["fields"]["kind"]) == set(odd)
    assert values["raw_examples"]["sources"][0]["path"] == "data/sources/my data: #1.json"


def test_the_project_has_git_dvc_and_a_secret_of_its_own(tmp_path: Path) -> None:
    folder, document, _ = make(tmp_path, {"mine.json": chats(["It sings."] * 3)})
    assert document["git"]
    staged = set(run(["git", "diff", "--cached", "--name-only"], folder).stdout.splitlines())
    assert {
        "params.yaml",
        "dvc.yaml",
        "code.lock.yaml",
        "workspace.yaml",
        ".dvc/config",
        "data/sources/mine.json",
    } <= staged
    assert "data/keys/record_ids.key" not in staged and not run(["git", "status", "--porcelain"], folder).stdout.count(
        "??"
    )
    key = folder / "data/keys/record_ids.key"
    assert key.stat().st_mode & 0o077 == 0 and read_key(folder).hex() in key.read_text()
    init(tmp_path / "other", [], None, "auto", "unknown")
    assert read_key(tmp_path / "other") != read_key(folder)
    assert not list(folder.rglob("*.py")), "no copy of the code"
    states = dvc.read_stages(folder)
    assert "adapter@lora" in states and all(state.changed == ["never run"] for state in states.values())


def test_a_folder_with_files_of_a_project_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text("mine: 1\n")
    assert main(["init", str(tmp_path)]) == 2
    assert "params.yaml already; nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"] and (
        tmp_path / "params.yaml"
    ).read_text() == "mine: 1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.json"], "missing.json does not exist"),
        (["--base-model", "org/name"], "neither a folder nor a model at a commit"),
        (["--base-model", "org/name@main"], "is not a commit"),
        (["--base-model", "."], "no config.json or tokenizer.json"),
        (["--data", "pairs.json"], "no examples to train on, only preferences"),
        (["--data", "a/x.json", "b/x.json"], "two files would become data/sources/x.json"),
        (["--data", "hub:org/name"], "hub:org/name: not a split of a data set\nhint: use hub:org/name@REVISION:split"),
        (["--data", "hub:org/name@main:train"], "is not a commit"),
        (["--data", "s3://"], "is not an address of objects"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps(PAIR_ROWS["preference"]))
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps(chats(["It sings."])))
    assert main(["init", "project", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "project").exists()


def test_a_folder_whose_name_is_not_utf8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its path is not UTF-8, which DVC requires; nothing was written"):
        init(tmp_path / "caf\udce9", [], None, "auto", "MIT")
    assert not [*tmp_path.iterdir()]


def test_a_folder_of_data_that_contains_the_project_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(chats(["It sings."])))
    with pytest.raises(InputError, match="contains the project"):
        init(tmp_path / "project", [str(tmp_path)], None, "auto", "MIT")
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("at", ["_copy", "_add_to_dvc"])
def test_an_interrupted_command_can_be_given_again(
    at: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = tmp_path / "project", tmp_path / "mine.json"
    data.write_text(json.dumps([{"instruction": f"question {i}?", "output": "yes"} for i in range(20)]))
    if existing:
        (folder / "data/sources").mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(init_module, "LARGE", 100)
    with monkeypatch.context() as patch:
        whole = getattr(init_module, at)

        def interrupted(*arguments: Any) -> None:
            whole(*arguments)
            raise KeyboardInterrupt

        patch.setattr(init_module, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            init_module.init(folder, [str(data)], None, "auto", "unknown")
    left = (
        [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    )
    assert [name for name in left if not name.startswith((".git/", ".dvc/"))] == (["notes.txt"] if existing else [])
    assert (folder / "data/sources").is_dir() == existing, "folders that were there before stay"
    assert init_module.init(folder, [str(data)], None, "auto", "unknown")["dvc"] == ["data/sources/mine.json"]


@pytest.mark.parametrize("rule", ["data/", "*.lock", "reports", "mine.json"])
def test_a_repository_that_ignores_files_of_a_project_is_refused(rule: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(chats(["It sings."])))
    run(["git", "init", "-q"], tmp_path)
    (tmp_path / ".gitignore").write_text(f"{rule}\n")
    with pytest.raises(InputError, match=re.escape(f"by the rule `{rule}` (.gitignore, line 1); nothing was written")):
        init(tmp_path / "project", [str(tmp_path / "mine.json")], None, "auto", "MIT")
    assert not (tmp_path / "project").exists()
    (tmp_path / ".gitignore").write_text(f"{rule}\n!{rule}\n*.key\n")
    init(tmp_path / "project", [str(tmp_path / "mine.json")], None, "auto", "MIT")
    assert "project/data/sources/mine.json" in run(["git", "diff", "--cached", "--name-only"], tmp_path).stdout


def test_without_data_the_next_step_is_to_add_some(tmp_path: Path) -> None:
    document = init(tmp_path / "project", [], None, "auto", "unknown")
    assert document["next"][1:3] == ["put your data into data/sources/mine.jsonl", "git add data/sources/mine.jsonl"]
    with pytest.raises(InputError, match=r"data/sources/mine\.jsonl does not exist"):
        validate(tmp_path / "project")
    (tmp_path / "project/data/sources/mine.jsonl").write_text(json.dumps(chats(["It sings."])[0]))
    validate(tmp_path / "project")


def test_the_next_steps_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    document = init(tmp_path / "my project", [], None, "auto", "unknown")
    assert document["next"][0] == f"cd '{tmp_path}/my project'"


def test_a_limit_below_the_answers_does_not_say_that_it_holds_them(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    for folder, answers in ((short, ["It sings."] * 3), (long, [f"{i} " * 2_000 for i in range(3)])):
        folder.mkdir()
        make(folder, {"mine.json": chats(answers)})
    lines = [
        next(line for line in (folder / "project/params.yaml").read_text().splitlines() if "max_new_tokens" in line)
        for folder in (short, long)
    ]
    assert lines[0] == "  max_new_tokens: 16   # longest answer; 95 % of the examples have fewer"
    assert re.fullmatch(
        r"  max_new_tokens: 512   # longest answer, which costs time; 95 % of the examples have fewer than [\d,]{5}",
        lines[1],
    )


@pytest.mark.parametrize(("longest", "limit"), [(1, 16), (15, 16), (16, 32), (47, 48), (48, 64)])
def test_the_limit_of_answers_has_room_for_the_end_of_an_answer(longest: int, limit: int) -> None:
    lines = params_text(Found(answer=longest, estimated=False), SAMPLE_MODEL, "MIT").splitlines()
    assert f"  max_new_tokens: {limit}   # longest answer; 95 % of the examples have fewer" in lines


def test_large_files_are_tracked_by_dvc(tmp_path: Path) -> None:
    rows = chats([f"It sings {i} songs. {'la ' * 20}" for i in range(3)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.json").write_text(json.dumps(rows))
    (tmp_path / "mine" / "notes.bin").write_bytes(bytes(11_000_000))
    document = init(tmp_path / "project", [str(tmp_path / "mine")], None, "auto", "MIT")
    assert document["dvc"] == ["data/sources/mine"]
    staged = run(["git", "diff", "--cached", "--name-only"], tmp_path / "project").stdout.splitlines()
    assert "data/sources/mine.dvc" in staged and "data/sources/mine/a.json" not in staged
    assert not run(["git", "status", "--porcelain"], tmp_path / "project").stdout.count("??")


def test_a_folder_that_is_a_repository_is_copied_without_what_git_and_dvc_have_in_it(tmp_path: Path) -> None:
    """Git would have a reference to the inner repository, and none of its files."""
    jsonl(tmp_path / "mine/a.jsonl", *chats(["It sings."] * 3))
    jsonl(tmp_path / "mine/.ipynb_checkpoints/a-checkpoint.jsonl", *chats(["It sings."] * 3))
    (tmp_path / "mine/a.jsonl.dvc").write_text("outs: []")
    (tmp_path / "mine/.gitignore").write_text("*.jsonl")
    run(["git", "init", "-q"], tmp_path / "mine")
    (tmp_path / "mine/.git/large").write_bytes(bytes(11_000_000))
    document = init(tmp_path / "project", [str(tmp_path / "mine")], None, "auto", "MIT")
    assert [path.name for path in (tmp_path / "project/data/sources/mine").iterdir()] == ["a.jsonl"] and document[
        "dvc"
    ] == []
    staged = run(["git", "diff", "--cached", "--name-only"], tmp_path / "project").stdout.splitlines()
    assert "data/sources/mine/a.jsonl" in staged
    assert document["sources"] == [
        {"path": "data/sources/mine", "kind": "examples", "layout": "prompt_completion", "rows": 3}
    ]


def test_files_named_after_splits_keep_their_rows_in_them(tmp_path: Path) -> None:
    """Otherwise the user's own test set would be trained on."""
    rows = chats([f"It sings {i} songs." for i in range(9)])
    folder, _, values = make(tmp_path, {"train.json": rows[:5], "test.json": rows[5:7], "more.json": rows[7:]})
    splits = {Path(source["path"]).name: source.get("split") for source in values["raw_examples"]["sources"]}
    assert splits == {"train.json": "from_file_names", "test.json": "from_file_names", "more.json": None}
    assert "rows of files named train, validation or test are in that split" in (folder / "params.yaml").read_text()
    (tmp_path / "all").mkdir()
    for name in ("train.json", "test.json"):
        (tmp_path / name).rename(tmp_path / "all" / name)
    init(tmp_path / "second", [str(tmp_path / "all")], None, "auto", "MIT")
    assert [source.get("split") for source in validate(tmp_path / "second")["raw_examples"]["sources"]] == [
        "from_file_names"
    ]
    init(tmp_path / "third", [str(tmp_path / "all/test.json")], None, "auto", "MIT")
    assert "split" not in validate(tmp_path / "third")["raw_examples"]["sources"][0], (
        "there would be nothing to train on"
    )


def test_what_dvc_does_not_track_yet_is_added_in_the_next_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_project.commands.init.LARGE", 10)
    monkeypatch.setattr("dagster_project.commands.init._add_to_dvc", lambda *_: False)
    _, document, _ = make(tmp_path, {"my mine.json": chats(["It sings."] * 3)})
    assert document["next"][1:-1] == [
        "dvc add 'data/sources/my mine.json'",
        "git add 'data/sources/my mine.json.dvc' data/sources/.gitignore",
        "git commit -m 'New project'",
    ]


def test_init_imports_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(chats(["It sings."] * 3)))
    code = f"""import sys, json
from dagster_project.__main__ import main
main(["init", "project", "--data", "mine.json"])
print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"""
    done = installed(ROOT, tmp_path, "-c", code)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
