"""Every record has an outcome and every label a reason: templates, over-long
records, mixtures, packing and the label audit."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import byte_fallback_model
from builders.records import stored
from builders.tiny_model import CHAT_TEMPLATE
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dagster_project.core import bounded_templates
from dagster_project.core.chat import IGNORE, encode, encode_prompt, loss_weights, pieces
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_example
from dagster_project.core.named_templates import NAMED
from dagster_project.core.params import parse
from dagster_project.core.records import (
    CheckResult,
    Report,
    read_ledger,
    read_table,
    write_ledger,
    write_records,
    write_table,
)
from dagster_project.curation.sources import formats
from dagster_project.stages import tokenized
from dagster_project.training.tokens import blocks, chat_templates, label_audit
from dagster_project.training.tokens.collators import collate_packed
from dagster_project.training.tokens.examples import RecordOutcome, Rules, make, spans
from dagster_project.training.tokens.mixture import Replay, Row, balance, mix, resample

SYSTEM = "Be kind."


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def record(
    *messages: dict[str, str], source: str = "data/sources/a.jsonl", category: str | None = None, meta: str = "{}"
) -> dict[str, Any]:
    return stored(*messages, source=source, category=category, group_id=None, meta=meta)


def ask(question: str, answer: str = "Yes?", **about: Any) -> dict[str, Any]:
    return record(say("user", question), say("assistant", answer), **about)


def talk(*turns: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant by turns."""
    spoken = [say(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    return [say("system", system), *spoken] if system else spoken


def text(content: str, **about: Any) -> dict[str, Any]:
    return record(say("assistant", content), meta='{"kind": "text"}', **about)


class Stage:
    """The stage in a project folder of its own."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model, self.out = root, model, root / "out"

    def __call__(
        self, *train: dict[str, Any], validation: tuple[dict[str, Any], ...] = (), seed: int = 7, **params: Any
    ) -> Report:
        splits = self.root / "splits"
        write_records(splits / "train", train)
        write_records(splits / "validation", validation)
        write_ledger(
            splits,
            [
                {**{k: r[k] for k in ("source", "example_id")}, "source_row": 10 + i}
                for i, r in enumerate([*train, *validation])
            ],
        )
        return tokenized.produce(
            self.root, parse(tokenized.Params, params, "tokenized"), seed, splits, self.model, out=self.out
        )

    def template(self, source: str) -> str:
        path = self.root / chat_templates.FOLDER / "mine.jinja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return f"{chat_templates.FOLDER}/mine.jinja"

    def examples(self, split: str = "train") -> list[dict[str, Any]]:
        """The examples in the rows, one by one."""
        found = []
        for row in read_table(self.out / f"{split}.parquet"):
            at = 0
            for identity, length in zip(row["example_ids"], row["lengths"], strict=True):
                columns = {name: row[name][at : at + length] for name in ("input_ids", "labels", "weights")}
                found.append({"example_id": identity, **columns})
                at += length
            assert at == len(row["input_ids"]) == len(row["labels"]) == len(row["weights"])
        return found

    def outcomes(self) -> list[str]:
        return [line["outcome"] for line in read_ledger(self.out)]


@pytest.fixture
def stage(tmp_path: Path, tiny_model: Path) -> Stage:
    return Stage(tmp_path, tiny_model)


def test_the_weight_of_a_field_is_that_of_its_text_or_number_alone(tiny_model: Path) -> None:
    """A list or an object has none, and neither have the spaces before it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answer = '{"tags":   ["a"], "n": 512, "who":  "Bob", "more": {"x": 1}}'
    encoded = tokenizer(answer + tokenizer.eos_token, return_offsets_mapping=True)
    weights = loss_weights(
        tokenizer,
        [(encoded["input_ids"], True)],
        [(answer + tokenizer.eos_token, answer)],
        {"tags": 16, "more": 8, "n": 4, "who": 2},
        False,
    )
    covered = dict.fromkeys(weights, "")
    for weight, (start, stop) in zip(weights, encoded["offset_mapping"], strict=True):
        covered[weight] += answer[start:stop]
    assert covered.keys() == {1.0, 2.0, 4.0} and "512" in covered[4.0] and "Bob" in covered[2.0]


@pytest.mark.parametrize("end", ["\n}", " }", '\n , "m": 2}'])
def test_the_weight_of_a_number_ends_with_it(tiny_tokenizer: Any, end: str) -> None:
    answer = '{\n  "n": 512' + end
    pieces = [(tiny_tokenizer(answer).input_ids, True)]
    weights = loss_weights(tiny_tokenizer, pieces, [(answer, answer)], {"n": 16}, per_example=False)
    assert "".join(char for char, weight in zip(answer, weights, strict=True) if weight == 16) == "512"


def test_fields_have_their_weight_where_a_turn_ends_with_another_token_than_a_text(
    stage: Stage, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """As in models of Gemma and Phi, whose end of turn is named by generation_config.json alone."""
    stage.model = tmp_path / "model"
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(stage.model)
    (stage.model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    report = stage(ask("Which?", '{"category": "bug", "n": 5}'), field_weights={"category": 16})
    [example] = stage.examples()
    assert [
        token for token, weight in zip(example["input_ids"], example["weights"], strict=True) if weight == 16
    ] == tokenizer("bug").input_ids
    assert report.metrics["train"]["end_of_turn_in_loss"] == 1.0


@pytest.mark.parametrize(
    "template",
    [
        (
            "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' +"
            " m['content'] + ' <|im_end|>' }}{% endfor %}"
        ),
        NAMED["hermes"],
    ],
    ids=["spaces around an answer", "a trace"],
)
@pytest.mark.parametrize(
    "after", [[], [say("user", "Thanks")], [say("user", "Why?"), {**say("assistant", "So."), "weight": 0.0}]]
)
def test_fields_have_their_weight_in_the_last_answer_that_is_trained_on(
    stage: Stage, template: str, after: list[dict[str, str]], tmp_path: Path
) -> None:
    """Whatever the template writes around it, and however the tokenizer joins them; not in its trace."""
    from tokenizers import normalizers

    stage.model = tmp_path / "model"
    tokenizer = byte_fallback_model.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.save_pretrained(stage.model)
    answer = {**say("assistant", '{"category": "bug"}'), "reasoning_content": 'Not "category": "cat".'}
    report = stage(
        record(say("user", "Which?"), answer, *after),
        chat_template=stage.template(template),
        field_weights={"category": 16},
    )
    assert check(report, "labels").passed
    [example] = stage.examples()
    assert (
        tokenizer.decode(
            [token for token, weight in zip(example["input_ids"], example["weights"], strict=True) if weight == 16]
        )
        == "bug"
    )


@pytest.mark.parametrize("room", [512, 100, 75])
def test_fields_have_their_weight_in_every_answer_that_is_trained_on(
    stage: Stage, tiny_tokenizer: Any, room: int
) -> None:
    """Also in the parts of a conversation that is split, where earlier answers are context."""
    answers = ['{"category": "bug"}', '{"category": "cat"}', "So.", '{"category": "dog"}', '{"other": "hen"}']
    messages = talk(*(text for answer in answers for text in ("Which?", answer)))
    messages[3]["weight"] = 0.0
    stage(record(*messages), max_length=room, on_too_long="split", field_weights={"category": 16})
    examples = stage.examples()
    assert len(examples) == {512: 1, 100: 3, 75: 4}[room]
    heavy = [
        token
        for example in examples
        for token, weight in zip(example["input_ids"], example["weights"], strict=True)
        if weight == 16
    ]
    assert sorted(heavy) == sorted(tiny_tokenizer("bugdog").input_ids), "one token each character"


@pytest.mark.parametrize("cut", ["lstrip('\\n')", "rstrip('\\n')", "strip('\\n')", "lstrip()", "rstrip()", "strip()"])
@pytest.mark.parametrize("on_too_long", ["drop", "truncate"])
def test_a_template_may_trim_an_answer_at_one_end(
    stage: Stage, tiny_tokenizer: Any, cut: str, on_too_long: str
) -> None:
    """Qwen3 removes line breaks before an answer, and keeps the indentation of its first line."""
    name = stage.template(
        CHAT_TEMPLATE.replace("m['content']", f"(m['content'].{cut} if m['role'] == 'assistant' else m['content'])")
    )
    answer = '\n  {"category": "bug"}  \n'
    report = stage(
        ask("Which?", answer),
        ask("Why?", f"{answer}{'x' * 90}\n "),
        max_length=90,
        on_too_long=on_too_long,
        chat_template=name,
        field_weights={"category": 16},
    )
    assert check(report, "labels").passed
    [example] = [one for one in stage.examples() if "Which" in marked(tiny_tokenizer, one)]
    assert f"⟦{eval(repr(answer) + '.' + cut)}<|im_end|>⟧" in marked(tiny_tokenizer, example)
    assert example["weights"].count(16) == len("bug")


def check(report: Report, name: str) -> CheckResult:
    return next(found for found in report.checks if found.name == name)


def marked(tokenizer: Any, example: dict[str, Any]) -> str:
    """The decoded example with each trained span in ⟦ ⟧."""
    ids, text, at = example["input_ids"], "", 0
    for start, stop in spans(np.array(example["labels"])):
        before, span = label_audit.decode(tokenizer, [ids[at:start], ids[start:stop]])
        text, at = f"{text}{before}⟦{span}⟧", stop
    return text + label_audit.decode(tokenizer, [ids[at:]])[0]


# templates


def test_the_base_models_template_is_used_and_saved(stage: Stage, tiny_model: Path) -> None:
    report = stage(ask("Hi"))
    assert (stage.out / "chat_template.jinja").read_bytes() == (tiny_model / "chat_template.jinja").read_bytes()
    assert report.metrics["template"]["name"] == "base_model"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes?<|im_end|>⟧\n"),
        (
            "alpaca",
            (
                "Below is an instruction that describes a task. Write a response that appropriately completes the"
                " request.\n\n### Instruction:\nHi\n\n### Response:\n⟦Yes?<|im_end|>⟧"
            ),
        ),
    ],
)
def test_a_named_template_writes_its_format(stage: Stage, tiny_tokenizer: Any, name: str, wanted: str) -> None:
    stage(ask("Hi"), chat_template=name)
    assert [marked(tiny_tokenizer, example) for example in stage.examples()] == [wanted]
    assert (stage.out / "chat_template.jinja").read_text() == NAMED[name]


def test_alpaca_writes_the_system_turn_first_and_tool_turns_as_input(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    chat_templates.use(tokenizer, tmp_path, "alpaca")
    messages = [
        say("system", SYSTEM),
        say("user", "Sum?"),
        say("assistant", "add"),
        say("tool", "3"),
        say("assistant", "It is 3."),
    ]
    assert (
        "".join(f"[{said}]" if trained else said for said, trained in pieces(tokenizer, messages))
        == "Be kind.\n\n### Instruction:\nSum?\n\n### Response:\n[add<|im_end|>]\n\n### Input:\n3\n\n### Response:\n[It"
        " is 3.<|im_end|>]"
    )


@pytest.mark.parametrize("name", [None, *NAMED])
def test_a_prompt_has_the_same_ids_as_in_training_with_every_template(
    tiny_tokenizer: Any, tmp_path: Path, name: str | None
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    chat_templates.use(tokenizer, tmp_path, name)
    messages = talk("Hi", "Yes?", "Well", "No.", system=SYSTEM)
    ids, labels = encode(tokenizer, messages)
    *_, (last, _) = spans(np.array(labels))
    assert encode_prompt(tokenizer, messages[:-1]) == ids[:last]


def test_a_template_of_the_project_is_used_and_saved(stage: Stage, tiny_tokenizer: Any) -> None:
    source = CHAT_TEMPLATE.replace("m['content']", "'~' ~ m['content']")
    stage(ask("Hi"), chat_template=stage.template(source))
    assert (stage.out / "chat_template.jinja").read_text() == source
    assert "~Hi" in marked(tiny_tokenizer, stage.examples()[0])


def test_a_byte_order_mark_is_no_part_of_a_template(stage: Stage, tiny_tokenizer: Any) -> None:
    name = stage.template(f"\ufeff{CHAT_TEMPLATE}")
    stage(ask("Hi"), chat_template=name)
    assert (stage.out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert marked(tiny_tokenizer, stage.examples()[0]).startswith("<|im_start|>user")


def test_a_tokenizer_that_loads_the_written_template_makes_the_same_ids(
    stage: Stage, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    stage(ask("Hi"), chat_template="alpaca")
    merged = tmp_path / "merged"
    shutil.copytree(tiny_model, merged)
    shutil.copy(stage.out / "chat_template.jinja", merged)
    assert encode(AutoTokenizer.from_pretrained(merged), talk("Hi", "Yes?"))[0] == stage.examples()[0]["input_ids"]


def test_chatml_adds_the_models_end_of_text_token_if_it_is_another_one(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.name_or_path = str(tmp_path)  # a model whose generation_config.json names no other end
    chat_templates.use(tokenizer, tmp_path, "chatml")
    assert [said for said, trained in pieces(tokenizer, talk("Hi", "Yes?")) if trained] == [
        "Yes?<|im_end|><|endoftext|>"
    ]


def test_chatml_is_refused_if_the_tokenizer_lacks_its_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>")
    with pytest.raises(
        InputError,
        match=r"tokenized\.chat_template: chatml: the base model's tokenizer has no special token <\|im_start\|>",
    ):
        chat_templates.use(bare, tmp_path, "chatml")


def test_a_named_template_writes_the_beginning_that_the_tokenizer_expects(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = copy.deepcopy(tiny_tokenizer)
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    chat_templates.use(beginning, tmp_path, "alpaca")
    assert pieces(beginning, talk("Hi", "Yes?"))[0][0].startswith("<|im_start|>Below is an instruction")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% for m in messages %}\n{{ m }", "line 2: unexpected '}'"),
        ("{{ ''.__class__ }}" + CHAT_TEMPLATE, "line 1: accesses the private attribute `__class__`"),
        ("{{ ''['__class__'] }}" + CHAT_TEMPLATE, "line 1: accesses the private attribute `__class__`"),
        ("{{ ''|attr('__class__') }}" + CHAT_TEMPLATE, "line 1: `attr` accesses attributes by name"),
        (
            "{% set k = '_' ~ '_class_' ~ '_' %}{{ ''[k].mro() }}" + CHAT_TEMPLATE,
            "access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{{ messages.append(1) }}" + CHAT_TEMPLATE, "access to attribute 'append' of 'list' object is unsafe"),
        ("{% include '/etc/passwd' %}" + CHAT_TEMPLATE, "no loader for this environment"),
        ("{% set form = '%d %b' %}{{ strftime_now(form) }}" + CHAT_TEMPLATE, "`strftime_now` is not deterministic"),
        ("{{ ['a', 'b']|random }}" + CHAT_TEMPLATE, "`random` is not deterministic"),
        ("{{ 1 / 0 }}" + CHAT_TEMPLATE, "the chat template refuses it: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHAT_TEMPLATE, "maximum recursion depth exceeded"),
        ("{% set x = 'a' * 10 ** 11 %}" + CHAT_TEMPLATE, "the chat template needs more than 1 GiB of memory"),
        (CHAT_TEMPLATE.replace("m['content']", "m['contents']"), "leaves out what the user says in turn 1"),
        (CHAT_TEMPLATE.replace("<|im_end|>", ""), "does not end the assistant's turn with '<|im_end|>'"),
        ("", "leaves out what the user says in turn 1"),
    ],
)
def test_a_template_that_fails_or_leaves_the_sandbox_gives_one_clear_error(
    stage: Stage, source: str, complaint: str
) -> None:
    name = stage.template(source)
    with pytest.raises(InputError) as refusal:
        stage(ask("Hi"), chat_template=name)
    assert refusal.value.what.startswith(f"params.yaml: tokenized.chat_template: {name}: ")
    assert complaint in refusal.value.what and "\n" not in refusal.value.what
    assert refusal.value.hint


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = 10 ** (10 ** (messages|length + 9)) %}",
    ],
    ids=["loops", "one endless operation"],
)
def test_a_template_that_never_ends_is_stopped(stage: Stage, monkeypatch: pytest.MonkeyPatch, endless: str) -> None:
    monkeypatch.setattr(bounded_templates, "SECONDS", 1)
    monkeypatch.setattr(bounded_templates, "_renderer", None)
    with pytest.raises(InputError, match=r"mine\.jinja: the chat template takes more than 1 s of processor time"):
        stage(ask("Hi"), chat_template=stage.template(endless + CHAT_TEMPLATE))


@pytest.mark.parametrize(
    ("name", "complaint", "hint"),
    [
        ("alpacca", "'alpacca' is not a known template", "use alpaca, chatml, hermes, or a file in data/templates/"),
        ("data/templates/none.jinja", "does not exist", "add the file"),
        ("../mine.jinja", "is outside the project", "copy it"),
        ("params/mine.jinja", "is not a file in data/templates/", "move it to data/templates/"),
    ],
)
def test_a_missing_template_is_refused(tmp_path: Path, name: str, complaint: str, hint: str) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(InputError, match=complaint) as refusal:
        chat_templates.locate(tmp_path, name)
    assert hint in refusal.value.hint


def test_the_folder_of_templates_is_a_dvc_dependency() -> None:
    assert f"{chat_templates.FOLDER}," in (ROOT / "dvc.yaml").read_text() and (ROOT / chat_templates.FOLDER).is_dir()


def without_template(model: Path, folder: Path) -> Path:
    import shutil

    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_conversations_need_a_template_and_plain_text_needs_none(tmp_path: Path, tiny_model: Path) -> None:
    stage = Stage(tmp_path, without_template(tiny_model, tmp_path / "bare"))
    with pytest.raises(InputError, match="it has no chat template") as refusal:
        stage(ask("Hi"), text("Once"))
    assert "tokenized.chat_template" in refusal.value.hint
    assert stage(text("Once")).metrics["train"]["examples"] == 1
    assert not (stage.out / "chat_template.jinja").exists()
    stage(ask("Hi"), chat_template="chatml")
    assert stage.outcomes() == ["kept"]


# what teaches nothing, what does not fit the template


def test_conversations_without_an_answer_are_counted_and_dropped(stage: Stage) -> None:
    report = stage(ask("Hi"), record(say("system", SYSTEM)), record(say("user", "Hello?")), record())
    assert stage.outcomes() == ["kept", *["dropped:no_answer"] * 3]
    assert [line["why"] for line in read_ledger(stage.out)] == ["", "turns: system", "turns: user", "turns: none"]
    assert (report.rows_in, report.rows_out, report.dropped) == (4, 1, {"no_answer": 3})
    assert check(report, "no_answer") == CheckResult(
        "no_answer", True, "warn", count=3, rows=[f"data/sources/a.jsonl:{i}" for i in (11, 12, 13)],
        note="1 turns: system; 1 turns: user; 1 turns: none", dropped=3,
    )  # fmt: skip


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}{%"
    " endfor %}" + CHAT_TEMPLATE
)


@pytest.mark.parametrize("policy", ["fail", "drop"])
def test_a_conversation_that_the_template_refuses_blocks_or_is_dropped_by_policy(stage: Stage, policy: str) -> None:
    bad = record(*talk("Hi", "Yes?", system=SYSTEM))
    report = stage(
        ask("Hi"), bad, record(say("assistant", "Hello!")), chat_template=stage.template(STRICT), on_mismatch=policy
    )
    assert stage.outcomes() == ["kept", "dropped:template_mismatch", "dropped:template_mismatch"]
    assert (report.rows_in, report.rows_out, report.dropped) == (3, 1, {"template_mismatch": 2})
    found = check(report, "template_mismatch")
    assert (found.passed, found.blocking, found.count) == (policy == "drop", policy == "fail", 2)
    assert "1 the chat template refuses it: no system turns" in found.note
    assert bool(report.failures) is (policy == "fail")


def test_equal_records_of_a_source_keep_their_rows(stage: Stage) -> None:
    first, second, again, other, held_out, copy = (
        ask(text, source="a.jsonl") for text in ("Hi", "Ho", "Hi", "Hi", "He", "He")
    )
    stage(first, second, again, {**other, "source": "b.jsonl"}, validation=(held_out, copy))
    assert [(line["source"], line["source_row"]) for line in read_ledger(stage.out)] == [
        ("a.jsonl", 10), ("a.jsonl", 11), ("a.jsonl", 12), ("b.jsonl", 13), ("a.jsonl", 14), ("a.jsonl", 15)
    ]  # fmt: skip


def test_turns_after_the_last_answer_are_left_out_and_noted(stage: Stage, tiny_tokenizer: Any) -> None:
    stage(record(*talk("Hi", "Yes?", "Thanks")))
    assert read_ledger(stage.out)[0]["why"] == "1 turns after the last answer left out"
    assert "Thanks" not in marked(tiny_tokenizer, stage.examples()[0])


def test_plain_text_has_no_template_and_is_trained_on_to_its_end(stage: Stage, tiny_tokenizer: Any) -> None:
    report = stage(text("Once upon a time."))
    assert [marked(tiny_tokenizer, example) for example in stage.examples()] == ["⟦Once upon a time.<|im_end|>⟧"]
    assert all(found.passed for found in report.checks)


def test_plain_text_is_detected_as_in_curation() -> None:
    from dagster_project.core.chat import is_text

    for found in (text("x"), ask("Hi"), record(say("assistant", "x")), {**ask("Hi"), "meta": '{"kind": "text"}'}):
        assert is_text(found) == formats.is_text(found["messages"], json.loads(found["meta"]))


# over-long records


def tokens(words: str) -> int:
    return len(words.encode())


HEADER, END, TAIL = 21, 1, 1
"""Tokens of `<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n`, of
the end of turn, of the newline after it."""


def test_an_over_long_record_is_dropped_by_default(stage: Stage) -> None:
    report = stage(ask("Hi", "y" * 50), ask("Hi"), max_length=40)
    assert stage.outcomes() == ["dropped:too_long", "kept"]
    assert read_ledger(stage.out)[0]["why"] == "73 tokens, room for 40"
    assert (report.rows_in, report.rows_out, report.dropped) == (2, 1, {"too_long": 1})
    assert report.metrics["lost"] == {"too_long": {"rows": 1, "trained_tokens": 51}}
    found = check(report, "too_long")
    assert (found.passed, found.count, found.dropped, found.rows) == (True, 1, 1, ["data/sources/a.jsonl:10"])


def test_truncation_cuts_the_end_of_the_last_answer_and_keeps_its_end_of_turn(
    stage: Stage, tiny_tokenizer: Any
) -> None:
    report = stage(ask("Hi", "0123456789" * 5), max_length=40, on_too_long="truncate")
    kept = ("0123456789" * 5)[: 40 - HEADER - END]
    assert (
        marked(tiny_tokenizer, stage.examples()[0])
        == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦{kept}<|im_end|>⟧"
    )
    assert stage.outcomes() == ["truncated"]
    assert report.metrics["lost"] == {"truncated": {"rows": 1, "trained_tokens": 50 - len(kept)}}
    assert (report.rows_out, report.dropped, check(report, "labels").passed) == (1, {}, True)


@pytest.mark.parametrize("room", range(30, 40))
def test_truncation_never_cuts_a_character_in_two(stage: Stage, tiny_tokenizer: Any, room: int) -> None:
    report = stage(ask("Hi", "ä€𐍈" * 9), max_length=room, on_too_long="truncate")
    said = tiny_tokenizer.decode([label for label in stage.examples()[0]["labels"] if label != IGNORE]).removesuffix(
        "<|im_end|>"
    )
    assert ("ä€𐍈" * 9).startswith(said) and len(said) > 1
    assert check(report, "labels").passed


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo" * 9}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    ("message", "room", "kept"),
    [
        ({"reasoning_content": "t" * 30, "content": "Yes. " * 9}, 0, ""),
        ({"reasoning_content": "t" * 30, "content": "Yes. " * 9}, 1, "<think>\n" + "t" * 30 + "\n</think>\n\nY"),
        ({"reasoning_content": "t" * 60, "content": ""}, 1, ""),
        ({"content": "Let me look. " * 3, "tool_calls": [CALL]}, 1, ""),
        ({"content": "Yes. " * 20}, 1, ("Yes. " * 20)[:50]),
    ],
    ids=["within the trace", "after the trace", "a trace alone", "a call", "content alone"],
)
def test_truncation_cuts_neither_traces_nor_calls(message: Any, room: int, kept: str, tiny_tokenizer: Any) -> None:
    """A model that learned from a part of one would end its turn inside it."""
    hermes = copy.deepcopy(tiny_tokenizer)
    hermes.chat_template = NAMED["hermes"]
    asked = {"role": "user", "content": "Hi"}
    tools = TOOLS if "tool_calls" in message else None
    found = {**record(asked, {"role": "assistant", **message}), "tools": tools}
    prompt = len(encode_prompt(hermes, [asked], tools, "reasoning_content" in message))
    trace = len(hermes("<think>\n" + "t" * 30 + "\n</think>\n\n", add_special_tokens=False)["input_ids"])
    [outcome] = make(hermes, [found], Rules(prompt + trace + room + 1, "truncate"))
    texts = [hermes.decode([label for label in one.labels if label != IGNORE]) for one in outcome.examples]
    if kept:
        assert (outcome.outcome, texts) == ("truncated", [kept + "<|im_end|>"])
        assert not label_audit.find_wrong_labels(hermes, [found], [outcome])
    else:
        assert (outcome.outcome, texts) == ("dropped:too_long", [])
        assert outcome.why.endswith("; traces and calls are not cut")


REWRITING = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}{% elif not loop.last %}({{ m.content"
    " }}){% else %}{{ m.reasoning_content or '' }}|{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if"
    " add_generation_prompt %}assistant: {% endif %}"
)
"""A template that writes earlier answers in another way, and their traces not
at all, so that each answer is an example."""


@pytest.mark.parametrize(
    ("turns", "trace", "kept"),
    [
        (("Hi", "Yes?", "w" * 60, "No."), "", ["|Yes?"]),
        (("Hi", "Yes?Yes?", "Hm", "No."), "t" * 32, ["t" * 32 + "|Yes?Y", "|No."]),
        (("Hi", "Yes?", "Hm", "No."), "t" * 80, ["|No."]),
        (("Hi", "Yes?", "Hm", "n" * 60), "", ["|Yes?", "|" + "n" * 8]),
    ],
    ids=["a prompt leaves no room", "an earlier answer is cut", "a trace has no room", "the last answer is cut"],
)
def test_truncation_of_a_record_with_an_example_for_each_answer_passes_the_label_audit(
    stage: Stage, tiny_tokenizer: Any, turns: tuple[str, ...], trace: str, kept: list[str]
) -> None:
    report = stage(
        _traced(talk(*turns), trace), max_length=60, on_too_long="truncate", chat_template=stage.template(REWRITING)
    )
    labels = [[label for label in example["labels"] if label != IGNORE] for example in stage.examples()]
    assert sorted(label_audit.decode(tiny_tokenizer, labels)) == sorted(f"{answer}<|im_end|>" for answer in kept)
    assert (stage.outcomes(), report.failures) == (["truncated"], [])


def _traced(messages: list[dict[str, str]], trace: str) -> dict[str, Any]:
    """A record whose first answer has a trace."""
    return record(
        *(
            {**message, "reasoning_content": trace} if trace and i == 1 else message
            for i, message in enumerate(messages)
        )
    )


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_a_record_whose_prompt_alone_is_too_long_is_dropped(stage: Stage, policy: str) -> None:
    report = stage(ask("H" * 60), max_length=40, on_too_long=policy)
    assert stage.outcomes() == ["dropped:too_long"]
    assert report.metrics["lost"] == {"too_long": {"rows": 1, "trained_tokens": 5}}


def test_splitting_cuts_at_turns_with_the_system_turn_and_earlier_context_in_each_part(
    stage: Stage, tiny_tokenizer: Any
) -> None:
    messages = talk("q1", "a1", "q2", "a2", "q3", "a3", "q4", "a4", system="S")
    parts = [[messages[0], *messages[1:7]], [messages[0], *messages[3:9]]]
    room = len(encode(tiny_tokenizer, parts[0])[0])
    report = stage(record(*messages), max_length=room, on_too_long="split", packing=False)
    assert stage.outcomes() == ["split:2"]
    found = sorted((example["input_ids"] for example in stage.examples()), key=lambda ids: tiny_tokenizer.decode(ids))
    assert found == [encode(tiny_tokenizer, part)[0] for part in parts]
    learnt = sorted(said for example in stage.examples() for said in marked(tiny_tokenizer, example).split("⟦")[1:])
    assert [said.split("⟧")[0] for said in learnt] == [f"a{i}<|im_end|>" for i in (1, 2, 3, 4)]
    assert (report.rows_in, report.rows_out, report.metrics["train"]["examples"]) == (1, 1, 2)
    assert "lost" not in report.metrics and check(report, "labels").passed


def test_splitting_leaves_out_the_exchange_that_does_not_fit_by_itself(stage: Stage) -> None:
    report = stage(record(*talk("q1", "a1", "q2", "b" * 99, "q3", "a3")), max_length=60, on_too_long="split")
    assert stage.outcomes() == ["split:2"]
    assert report.metrics["lost"] == {"split": {"rows": 1, "trained_tokens": 100}}
    assert check(report, "labels").passed


def test_splitting_keeps_the_trace_of_the_last_answer_of_the_record_only(stage: Stage, tiny_tokenizer: Any) -> None:
    messages = talk("q1", "a1", "q2", "a2", "q3", "a3")
    traced = record(
        *({**m, "reasoning_content": f"trace of {m['content']}"} if m["role"] == "assistant" else m for m in messages)
    )
    report = stage(traced, chat_template="hermes", reasoning="last", max_length=90, on_too_long="split")
    said = [marked(tiny_tokenizer, example) for example in stage.examples()]
    assert stage.outcomes() == ["split:2"] and sum("trace of" in text for text in said) == 1
    assert any("⟦<think>\ntrace of a3\n</think>\n\na3<|im_end|>⟧" in text for text in said)
    assert report.failures == [] and "lost" not in report.metrics


def test_splitting_keeps_calls_results_and_answers_together(tiny_tokenizer: Any) -> None:
    call = [say("user", "Sum?"), say("assistant", "add"), say("tool", "3"), say("assistant", "It is 3.")]
    whole = record(*talk("q1", "a1"), *call)
    room = len(encode(tiny_tokenizer, call)[0])
    [fate] = make(tiny_tokenizer, [whole], Rules(room, "split"))
    assert [example.input_ids.tolist() for example in fate.examples] == [
        encode(tiny_tokenizer, m)[0] for m in (talk("q1", "a1"), call)
    ]


def test_plain_text_is_split_into_windows_that_join_to_the_whole(stage: Stage, tiny_tokenizer: Any) -> None:
    story = "0123456789" * 10
    report = stage(text(story), max_length=40, on_too_long="split", packing=False)
    assert stage.outcomes() == ["split:3"]
    [fate] = make(tiny_tokenizer, [text(story)], Rules(40, "split"))
    assert "".join(tiny_tokenizer.decode(example.labels) for example in fate.examples) == story + "<|im_end|>"
    assert [len(example.input_ids) for example in fate.examples] == [33, 34, 34]
    assert check(report, "labels").passed and "lost" not in report.metrics


words = st.text(alphabet="ab ä\n", min_size=1, max_size=30)
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4).map(
    lambda found: record(*talk(*(w for pair in found for w in pair)))
)
rows = st.one_of(
    conversations, words.map(text), st.just(record(say("user", "?"))), st.just(record(say("assistant", "!")))
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, max_size=5), st.sampled_from(["drop", "truncate", "split"]), st.integers(16, 120))
def test_for_any_input_every_record_has_an_outcome_and_every_label_a_reason(
    stage: Stage, found: list[dict[str, Any]], policy: str, room: int
) -> None:
    found = list({one["example_id"]: one for one in found}.values())
    report = stage(*found, max_length=room, on_too_long=policy, on_mismatch="drop")
    assert len(stage.outcomes()) == report.rows_in == len(found)
    examples = stage.examples()
    assert [check.name for check in report.failures] == ([] if examples else ["trained_tokens"])
    assert all(len(example["input_ids"]) <= room for example in examples)
    assert all(any(label != IGNORE for label in example["labels"]) for example in examples)
    learnt = Counter(example["example_id"] for example in examples)
    for one, outcome in zip(found, stage.outcomes(), strict=True):
        wanted = (
            int(outcome.partition(":")[2]) if outcome.startswith("split") else int(not outcome.startswith("dropped"))
        )
        assert learnt[one["example_id"]] == wanted


# labels


def fate_of(tokenizer: Any, found: dict[str, Any]) -> RecordOutcome:
    return make(tokenizer, [found], Rules(512))[0]


TWO = record(*talk("Hi", "Yes?", "Well", "Grüße!", system=SYSTEM))


@pytest.mark.parametrize(
    "found", [TWO, ask("Hi"), text("Once upon"), ask("Hi", " padded \n"), ask("Hi", "It is <|im_end|>, I think.")]
)
def test_generated_labels_pass_the_label_audit(tiny_tokenizer: Any, found: dict[str, Any]) -> None:
    assert label_audit.find_wrong_labels(tiny_tokenizer, [found], [fate_of(tiny_tokenizer, found)]) == {}


def damage_header(labels: np.ndarray, ids: np.ndarray) -> None:
    start = next(iter(spans(labels)))[0]
    labels[start - 1] = ids[start - 1]


def damage_end(labels: np.ndarray, ids: np.ndarray) -> None:
    labels[next(iter(spans(labels)))[1] - 1] = IGNORE


def damage_turn(labels: np.ndarray, ids: np.ndarray) -> None:
    start, stop = next(iter(spans(labels)))
    labels[start:stop] = IGNORE


def damage_user(labels: np.ndarray, ids: np.ndarray) -> None:
    labels[3:6] = ids[3:6]


def damage_all(labels: np.ndarray, ids: np.ndarray) -> None:
    labels[:] = IGNORE


def damage_shift(labels: np.ndarray, ids: np.ndarray) -> None:
    labels[:] = np.roll(labels, 1)


def damage_first(labels: np.ndarray, ids: np.ndarray) -> None:
    labels[next(iter(spans(labels)))[0]] = IGNORE


DAMAGES = [damage_header, damage_end, damage_turn, damage_user, damage_all, damage_shift, damage_first]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("found", [TWO, ask("Hi")], ids=["two turns", "one turn"])
def test_misplaced_labels_are_found(tiny_tokenizer: Any, found: dict[str, Any], damage: Any) -> None:
    fate = fate_of(tiny_tokenizer, found)
    damage(fate.examples[0].labels, fate.examples[0].input_ids)
    assert list(label_audit.find_wrong_labels(tiny_tokenizer, [found], [fate])) == [0]


@pytest.mark.parametrize("damage", [damage_header, damage_shift, damage_all])
def test_misplaced_labels_are_found_in_a_truncated_record_with_an_example_for_each_answer(
    tiny_tokenizer: Any, damage: Any
) -> None:
    rewriting = copy.deepcopy(tiny_tokenizer)
    rewriting.chat_template = REWRITING
    found = _traced(talk("Hi", "Yes?Yes?", "Hm", "No."), "t" * 32)
    [fate] = make(rewriting, [found], Rules(60, "truncate"))
    assert (fate.outcome, len(fate.examples)) == ("truncated", 2)
    damage(fate.examples[0].labels, fate.examples[0].input_ids)
    assert list(label_audit.find_wrong_labels(rewriting, [found], [fate])) == [0]


def test_misplaced_labels_block_the_stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def mask_all(*arguments: Any) -> list[RecordOutcome]:
        fates = make(*arguments)
        for fate in fates:
            fate.examples[0].labels[:] = IGNORE
        return fates

    monkeypatch.setattr(blocks, "make", mask_all)
    [failure, nothing_left] = stage(ask("Hi")).failures
    assert (failure.name, failure.rows, failure.note) == (
        "labels",
        ["data/sources/a.jsonl:10"],
        "1 an example has no labels",
    )
    assert nothing_left.name == "trained_tokens"


def test_template_text_in_the_assistant_turn_is_labeled_and_expected(stage: Stage, tiny_tokenizer: Any) -> None:
    thinking = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    )
    report = stage(ask("Hi"), chat_template=stage.template(thinking))
    assert check(report, "labels").passed
    assert marked(tiny_tokenizer, stage.examples()[0]).endswith("⟦<think></think>Yes?<|im_end|>⟧\n")


def test_a_tokenizer_that_changes_text_is_audited_against_its_own_decoding(tiny_tokenizer: Any) -> None:
    from tokenizers import normalizers

    folding = copy.deepcopy(tiny_tokenizer)
    folding.backend_tokenizer.normalizer = normalizers.Lowercase()
    fate = fate_of(folding, ask("HI", "YES?"))
    assert label_audit.find_wrong_labels(folding, [ask("HI", "YES?")], [fate]) == {}
    damage_header(fate.examples[0].labels, fate.examples[0].input_ids)
    assert list(label_audit.find_wrong_labels(folding, [ask("HI", "YES?")], [fate])) == [0]


@pytest.mark.parametrize("room", [512, 12], ids=["whole", "truncated"])
def test_answers_with_nothing_between_them_pass_the_label_audit(tiny_tokenizer: Any, room: int) -> None:
    """As in templates of Mistral, which write no header."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' ~ m.content ~ ']' if m.role == 'user' else m.content ~ eos_token }}{% endfor %}"
    )
    found = record(say("user", "Hi"), say("assistant", "One"), say("assistant", "Two and more"))
    [outcome] = make(tokenizer, [found], Rules(room, "truncate"))
    assert (
        outcome.outcome == ("kept" if room == 512 else "truncated") and len([*spans(outcome.examples[0].labels)]) == 1
    )
    assert label_audit.find_wrong_labels(tokenizer, [found], [outcome]) == {}
    outcome.examples[0].labels[-1] = IGNORE
    assert list(label_audit.find_wrong_labels(tokenizer, [found], [outcome])) == [0]


def test_a_doubled_bos_token_is_found(stage: Stage) -> None:
    report = stage(ask("Hi"), ask("Ho"), chat_template=stage.template("{{ bos_token }}" + CHAT_TEMPLATE))
    assert (check(report, "double_bos").passed, check(report, "double_bos").count) == (False, 2)
    assert check(stage(ask("Hi")), "double_bos").passed


def test_every_check_is_reported_even_without_findings(stage: Stage) -> None:
    assert [found.name for found in stage(ask("Hi")).checks] == list(tokenized.CHECK_DESCRIPTIONS)
    assert [found.name for found in stage().checks] == list(tokenized.CHECK_DESCRIPTIONS)


# mixtures


def test_by_category_all_categories_become_as_frequent_as_the_largest_by_sqrt_half_way() -> None:
    categories, ids = ["bug"] * 9 + ["login"] * 4 + [None], [f"{i}" for i in range(14)]

    def sizes(how: Any) -> dict[str | None, int]:
        copies = balance(categories, ids, how, seed=7)
        assert all(copies)
        return {
            name: sum(n for c, n in zip(categories, copies, strict=True) if c == name)
            for name in ("bug", "login", None)
        }

    assert sizes("none") == {"bug": 9, "login": 4, None: 1}
    assert sizes("category") == {"bug": 9, "login": 9, None: 9}
    assert sizes("sqrt") == {"bug": 9, "login": 6, None: 3}
    logins = balance(categories, ids, "category", seed=7)[9:13]
    assert sorted(logins) == [2, 2, 2, 3]


@pytest.mark.parametrize(
    ("target", "wanted"), [(0, 0), (14, 0), (16, 1), (30, 1), (100, 3), (130, 4), (250, 8)], ids=lambda n: str(n)
)
def test_resampling_comes_as_near_to_the_target_as_whole_rows_can(target: int, wanted: int) -> None:
    copies = resample([30, 30, 30, 30], list("abcd"), target, seed=7)
    assert sum(copies) == wanted and max(copies) - min(copies) <= 1


def test_resampling_depends_on_the_seed_and_the_row_not_on_its_position() -> None:
    ids = [f"{i}" for i in range(20)]

    def chosen(order: list[str], seed: int) -> set[str]:
        return {i for i, n in zip(order, resample([1] * 20, order, 5, seed), strict=True) if n}

    assert chosen(ids, 1) == chosen(ids[::-1], 1) != chosen(ids, 2)


GENERAL = "data/sources/general.jsonl"


@pytest.mark.parametrize(("general", "share"), [(3, 0.4), (60, 0.1)], ids=["repeated", "left out"])
def test_replay_makes_up_its_share_of_the_training_tokens(stage: Stage, general: int, share: float) -> None:
    own = [ask(f"own {i:02}") for i in range(20)]
    replayed = [ask(f"gen {i:02}", source=GENERAL) for i in range(general)]
    wanted = round(20 * share / (1 - share))  # all examples have the same length
    report = stage(
        *own, *replayed, validation=(ask("Ho", source=GENERAL),), replay={"sources": [GENERAL], "share": share}
    )
    counts = Counter(example["example_id"] for example in stage.examples())
    assert sum(counts[one["example_id"]] for one in replayed) == wanted
    assert all(counts[one["example_id"]] == 1 for one in own)
    assert report.metrics["train"]["replay_share"] == pytest.approx(share, abs=0.02)
    assert report.metrics["train"]["repeats"]["source"] == ({GENERAL: wanted - general} if wanted > general else {})
    assert report.dropped == ({"replay": general - wanted} if wanted < general else {})
    assert report.rows_in == len(own) + general + 1 and len(stage.examples("validation")) == 1


def test_a_folder_names_all_sources_in_it(stage: Stage) -> None:
    report = stage(
        ask("own"), ask("a", source="data/sources/g/a.jsonl"), replay={"sources": ["data/sources/g"], "share": 0.5}
    )
    assert report.metrics["train"]["replay_share"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        (["data/sources/b.jsonl"], "no train row comes from data/sources/b.jsonl"),
        (["data/sources/a.jsonl"], "all of train comes from them"),
    ],
)
def test_replay_of_nothing_or_of_everything_is_refused(stage: Stage, sources: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=rf"params\.yaml: tokenized\.replay\.sources: {complaint}"):
        stage(ask("Hi"), replay={"sources": sources, "share": 0.5})


def test_balance_repeats_rare_categories_in_train_only_and_reports_it(stage: Stage) -> None:
    common = [ask(f"c{i}", category="bug") for i in range(4)]
    rare = ask("r", category="login")
    report = stage(*common, rare, validation=(ask("v", category="login"),), balance="category")
    counts = Counter(example["example_id"] for example in stage.examples())
    assert counts == {**{one["example_id"]: 1 for one in common}, rare["example_id"]: 4}
    assert report.metrics["train"]["repeats"] == {"category": {"login": 3}, "source": {"data/sources/a.jsonl": 3}}
    assert report.metrics["train"]["examples"] == 8 and report.rows_out == 6
    assert [line["why"] for line in read_ledger(stage.out)] == ["", "", "", "", "4 copies", ""]
    assert len(stage.examples("validation")) == 1


def test_replayed_rows_are_not_balanced() -> None:
    rows = [*(Row(f"own {i}", "data/sources/a.jsonl", "bug", 10) for i in range(4)), Row("gen", GENERAL, "chat", 10)]
    copies, report = mix(rows, "category", Replay(sources=[GENERAL], share=0.2), seed=7)
    assert copies == [1, 1, 1, 1, 1] and report["repeats"] == {"category": {}, "source": {}}


# packed rows


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["attention of a CPU", "attention of a GPU"])
def test_examples_packed_into_a_row_have_the_logits_that_each_has_alone(stage: Stage, model: Any, device: str) -> None:
    import torch

    from dagster_project.training.methods.attention import attention_for

    stage(*(ask(f"question {i}", "y" * i) for i in range(1, 7)), max_length=64, packed_length=200)
    packed = read_table(stage.out / "train.parquet")
    assert [len(row["lengths"]) for row in packed] == [5, 1]
    with torch.no_grad():
        alone = [model(torch.tensor([example["input_ids"]])).logits[0] for example in stage.examples()]
        model.set_attn_implementation(attention_for(torch.device(device)))
        together = []
        for row in packed:
            batch = collate_packed([row])
            whole = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
            together += model(**whole, use_cache=False).logits[0].split(row["lengths"])
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_without_packing_every_example_has_a_row_and_its_length(stage: Stage) -> None:
    stage(ask("Hi"), ask("Hello"), packing=False)
    assert sorted(row["lengths"] for row in read_table(stage.out / "train.parquet")) == [[27], [30]]


def test_rows_equal_those_written_from_python_objects(stage: Stage, tmp_path: Path) -> None:
    stage(*(ask(f"{i}") for i in range(9)), max_length=64, weigh="example")
    written = stage.out / "train.parquet"
    write_table(tmp_path / "again.parquet", read_table(written), tokenized.row_schema())
    assert written.read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_two_runs_give_the_same_bytes_for_any_order_of_the_records(stage: Stage) -> None:
    mixed = {
        "balance": "category",
        "replay": {"sources": [GENERAL], "share": 0.3},
        "on_too_long": "split",
        "max_length": 60,
    }
    found = [ask(f"{i}", category="ab"[i > 3]) for i in range(6)] + [
        record(*talk("1", "2", "3", "4", "5", "6"), source=GENERAL)
    ]
    stage(*found, **mixed)
    first = {path.name: path.read_bytes() for path in stage.out.iterdir()}
    stage(*found, **mixed)
    assert {path.name: path.read_bytes() for path in stage.out.iterdir()} == first
    stage(*found[::-1], **mixed)
    assert (stage.out / "train.parquet").read_bytes() == first["train.parquet"]


# the audit


def test_the_audit_names_the_first_examples_and_a_sample_of_each_source(stage: Stage) -> None:
    found = [ask(f"{i:02}") for i in range(8)] + [text("Once", source=GENERAL)]
    stage(*found, validation=(ask("Ho"),))
    audit = json.loads((stage.out / "audit.json").read_text())
    shown = [(example["split"], example["source"], example["why"]) for example in audit["examples"]]
    assert shown.count(("train", "data/sources/a.jsonl", "first")) == label_audit.FIRST
    assert ("train", GENERAL, "sample") in shown and ("validation", "data/sources/a.jsonl", "first") in shown
    tokens = {sha256_of_example(example["input_ids"], example["labels"]) for example in stage.examples()}
    assert {example["sha256"] for example in audit["examples"] if example["split"] == "train"} <= tokens
    assert {key for example in audit["examples"] for key in example} == {
        "split",
        "source",
        "example_id",
        "part",
        "why",
        "sha256",
    }


def test_label_audit_statistics_equal_manual_counts(stage: Stage) -> None:
    stage(ask("Hi", category="bug"), ask("Ho"), text("Once"), max_length=64)
    audit = json.loads((stage.out / "audit.json").read_text())["splits"]["train"]
    total, trained = 27 + 27 + 5, 5 + 5 + 5
    assert audit == {
        "examples": 3,
        "tokens": total,
        "trained_tokens": trained,
        "trained_share": round(trained / total, 4),
        "end_of_turn_in_loss": 1.0,
        "double_bos": 0,
        "prefix_stable": 1.0,
        "padding_without_packing": round((81 - total) / 81, 4),
        "lengths": {"5-8": 1, "17-32": 2},
        "category": {
            "(none)": {"examples": 2, "tokens": 32, "trained_tokens": 10, "lengths": {"5-8": 1, "17-32": 1}},
            "bug": {"examples": 1, "tokens": 27, "trained_tokens": 5, "lengths": {"17-32": 1}},
        },
        "source": {
            "data/sources/a.jsonl": {
                "examples": 3,
                "tokens": total,
                "trained_tokens": trained,
                "lengths": {"5-8": 1, "17-32": 2},
            }
        },
        "fill_rate": round(total / 64, 4),
    }


def test_texts_with_other_ids_when_tokenized_in_pieces_are_counted(newline_merging_tokenizer: Any) -> None:
    assert [fate.stable for fate in make(newline_merging_tokenizer, [ask("Hi"), ask("Hi", "\nYes")], Rules(512))] == [
        True,
        False,
    ]


def test_hermes_writes_tools_calls_results_and_traces(tiny_tokenizer: Any) -> None:
    from dagster_project.core.chat import examples_of

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = NAMED["hermes"]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "reasoning_content": "Easy.", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    [parts] = examples_of(tokenizer, {"messages": messages, "tools": [tool]}, "keep")
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
    assert [text for text, trained in parts if trained] == [
        f"<think>\nEasy.\n</think>\n\n{written}\n{written}<|im_end|>",
        "It is 3.<|im_end|>",
    ]
    assert (
        parts[0][0].startswith("<|im_start|>system\nBe kind.\n\nYou may call functions")
        and '"name": "add"' in parts[0][0]
    )
    assert [text for text, _ in examples_of(tokenizer, {"messages": messages[1:2] + messages[4:]})[0]] == [
        "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n", "It is 3.<|im_end|>", "\n",
    ]  # fmt: skip


@pytest.mark.parametrize("room", [512, 60], ids=["whole", "truncated"])
@pytest.mark.parametrize("damage", [damage_header, damage_end, damage_first, damage_all])
def test_misplaced_labels_of_calls_and_traces_are_found(tiny_tokenizer: Any, damage: Any, room: int) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = NAMED["hermes"]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    answer = {"role": "assistant", "content": "I add.", "reasoning_content": "Easy.", "tool_calls": [call]}
    if room == 60:  # an answer with calls is not truncated
        answer = {"role": "assistant", "content": "I add. " * 4, "reasoning_content": "Easy."}
    found = record({"role": "user", "content": "Add."}, answer)
    [outcome] = make(tokenizer, [found], Rules(room, "truncate"))
    assert outcome.outcome == ("kept" if room == 512 else "truncated")
    assert label_audit.find_wrong_labels(tokenizer, [found], [outcome]) == {}
    damage(outcome.examples[0].labels, outcome.examples[0].input_ids)
    assert list(label_audit.find_wrong_labels(tokenizer, [found], [outcome])) == [0]


@pytest.mark.parametrize("changes", ["space before each text", "case"])
@pytest.mark.parametrize("damage", [damage_header, damage_end, damage_first, damage_all])
def test_calls_and_traces_are_audited_against_the_tokenizers_own_decoding(changes: str, damage: Any) -> None:
    """Tokenizers of Llama 2, Mistral and Phi-3 put a space after each special
    token, so that the header of an answer decodes to another text."""
    from tokenizers import normalizers

    tokenizer = byte_fallback_model.tokenizer(NAMED["hermes"])
    change = normalizers.Prepend("▁") if changes == "space before each text" else normalizers.Lowercase()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([change, normalizers.Replace(" ", "▁")])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "B": "X y"}}}
    answer = {"role": "assistant", "content": "I add.", "reasoning_content": "Easy.", "tool_calls": [call]}
    found = record({"role": "user", "content": "Add."}, answer)
    [outcome] = make(tokenizer, [found], Rules(512))
    assert label_audit.find_wrong_labels(tokenizer, [found], [outcome]) == {}
    damage(outcome.examples[0].labels, outcome.examples[0].input_ids)
    assert list(label_audit.find_wrong_labels(tokenizer, [found], [outcome])) == [0]
