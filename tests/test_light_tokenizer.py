"""`pedigree check` counts tokens and renders templates like transformers, and
imports neither it nor torch, DVC or Dagster."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from dagster_project.core.template_process import compiled
from dagster_project.curation.checks import token_counts
from dagster_project.curation.checks.light_tokenizer import PLAIN_CLASSES, PLAIN_MODELS, read_tokenizer

HEAVY = ["torch", "transformers", "trl", "peft", "accelerate", "dagster", "dvc", "great_expectations"]
TEXTS = ["", "Hi", "<|im_start|>user Hi<|im_end|>", "你好 wörld 👋🏽\n\n x", " two  spaces\t\n"]
CHATS = [
    [{"role": "user", "content": "Hi <b>\n"}, {"role": "assistant", "content": " Hello é"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "B"},
    ],
    [{"role": "assistant", "content": "Hi"}],
    [{"role": "tool", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|>"}],
]


def outcome(call: Any) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001  what fails must fail alike
        return type(error).__name__, str(error)


def test_counts_special_tokens_and_misfits_are_those_of_transformers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_tokenizer(tiny_model) is not None
    light = token_counts.tokens_of(tiny_model)
    monkeypatch.setattr(token_counts, "read_tokenizer", lambda folder: None)
    heavy = token_counts.tokens_of(tiny_model)
    assert light.special == heavy.special != frozenset()
    assert light.count(TEXTS) == heavy.count(TEXTS)
    for chat in CHATS:
        assert light.rendered and light.misfit and heavy.rendered and heavy.misfit
        assert (light.rendered(chat, None), light.misfit(chat, None)) == (
            heavy.rendered(chat, None),
            heavy.misfit(chat, None),
        )


@pytest.mark.parametrize("is_light", [True, False], ids=["light", "transformers"])
def test_what_training_cut_and_padded_to_does_not_limit_the_count(
    is_light: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    state = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (model / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    if not is_light:
        monkeypatch.setattr(token_counts, "read_tokenizer", lambda folder: None)
    texts = ["Hi", "word " * 50]
    assert token_counts.tokens_of(model).count(texts) == token_counts.tokens_of(tiny_model).count(texts)


TEMPLATES = sorted(
    file.name for file in files("trl").joinpath("chat_templates").iterdir() if file.name.endswith(".jinja")
)


def test_every_template_of_trl_renders_as_in_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    named, failed = {"bos_token": "<s>", "eos_token": "</s>"}, 0
    assert len(TEMPLATES) > 50
    for name in TEMPLATES:
        template = files("trl").joinpath("chat_templates", name).read_text(encoding="utf-8")
        light = compiled(template)
        for chat in CHATS:
            here, there = (
                outcome(
                    lambda: light.render(messages=chat, tools=None, documents=None, add_generation_prompt=True, **named)  # noqa: B023
                ),
                outcome(
                    lambda: render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **named)[  # noqa: B023
                        0
                    ][0]
                ),
            )
            assert here == there, name
            failed += isinstance(here, tuple)
    assert 0 < failed < len(TEMPLATES) * len(CHATS)


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = namespace(_a=1) %}{{ x._a }}",
        "{% set x = namespace(a=1) %}{% set x.a = 2 %}{{ x.a }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict(a=1).a }}{{ dict.fromkeys(['b'], 2) }}{{ dict.mro }}",
        "{{ raise_exception('no') }}",
        "{{ {'a': '<é>'}|tojson }}{% for x in [1, 2] %}{% break %}{% endfor %}",
        "{% generation %}Hi{% endgeneration %}",
        "{% generation %}",
    ],
)
def test_templates_have_the_same_restrictions_as_in_transformers(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    here = outcome(
        lambda: compiled(template).render(messages=CHATS[0], tools=None, documents=None, add_generation_prompt=False)
    )
    assert here == outcome(lambda: render_jinja_template([CHATS[0]], chat_template=template)[0][0])


@pytest.mark.parametrize("name", sorted(PLAIN_CLASSES))
@pytest.mark.parametrize("model_type", sorted(PLAIN_MODELS))
def test_transformers_does_not_modify_the_tokenizer_of_these_models(
    model_type: str, name: str, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, TokenizersBackend

    change(tiny_model, tmp_path, "config.json", model_type=model_type)
    change(tiny_model, tmp_path, "tokenizer_config.json", tokenizer_class=name)
    shutil.copy(tiny_model / "tokenizer.json", tmp_path)
    assert read_tokenizer(tmp_path) is not None
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is TokenizersBackend


def change(folder: Path, target: Path, name: str, **values: Any) -> None:
    (target / name).write_text(
        json.dumps({**json.loads((folder / name).read_text(encoding="utf-8")), **values}), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"model_type": "qwen2"}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"eos_token": "<|another|>"}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<|another|>"]}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "x"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "<|another|>", "special": True}}}),
        ("tokenizer_config.json", {"eos_token": 3}),
    ],
)
def test_a_tokenizer_that_transformers_modifies_is_loaded_by_transformers(
    name: str, values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(tiny_model / file, tmp_path)
    assert read_tokenizer(tmp_path) is not None
    change(tiny_model, tmp_path, name, **values)
    assert read_tokenizer(tmp_path) is None


BLOCKED = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from dagster_project.__main__ import main
model = ["--base-model", sys.argv[1]]
for arguments in ([], ["--json", "--against", "b.jsonl", "--report", "a.html", *model], ["--show", "1", *model],
                  ["--show", "1", "--template", "chatml"]):
    assert main(["check", "a.jsonl", *arguments]) == 0
assert not {{name.partition(".")[0] for name in sys.modules}} & {{*{HEAVY!r}}}
"""


def test_a_check_works_where_torch_dagster_and_dvc_are_not_installed(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"instruction": "Where is my garden kite?", "output": "It is on its way to you."}) + "\n"
    )
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"key": 1, "prompt": "Write no commas.", "instruction_id_list": ["x"], "kwargs": [{}]}) + "\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tiny_model)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (document,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert "tokens" in document["profile"]["lengths"], "counted by the tokenizer, not estimated"
    assert (tmp_path / "a.html").is_file()


def test_named_templates_of_a_model_are_part_of_the_identity_of_its_counts(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = token_counts.tokens_of(model).identity
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/rag.jinja").write_text("{{ messages[0].content }}")
    tokens = token_counts.tokens_of(model)
    assert tokens.identity != before
    make, given = tokens.__reduce__()  # as another process makes it
    assert make(*given).identity == tokens.identity
