"""Chat templates are code of strangers: they are rendered like transformers
does, with limits of time and memory, wherever they are."""

from __future__ import annotations

import copy
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from dagster_project.__main__ import main
from dagster_project.core import bounded_templates, rendering, template_process
from dagster_project.core.bounded_templates import Refused, TemplateLimit
from dagster_project.core.chat import encode_prompt, examples_of
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.curation.checks.token_counts import tokens_of

LONG = 4
"""Messages from which a hostile template is hostile: conversations that are only tested are shorter."""
HOSTILE = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one endless operation": "{% set n = 10 ** (10 ** (messages|length + 5)) %}",
    "endless comparison": (
        "{% set n = namespace(a=[0], b=[0]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b]"
        " %}{% endfor %}{{ n.a == n.b }}"
    ),
    "memory": "{% set n = namespace(a='ab') %}{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "memory at once": "{% set n = 'a' * 10 ** 12 %}",
    "much text": "{% for i in range(9000) %}{{ messages[0].content * 999 }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second and 256 MiB, in a process of its own."""
    monkeypatch.setattr(bounded_templates, "SECONDS", 1.0)
    monkeypatch.setattr(bounded_templates, "MEMORY", 1 << 28)
    monkeypatch.setattr(bounded_templates, "_renderer", None)


def test_an_interpreter_that_does_not_start_is_not_called_a_fault_of_the_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_templates.sys, "executable", "/bin/false")
    with pytest.raises(PedigreeError, match="does not start") as error:
        bounded_templates.render("{{ 1 }}", {})
    assert not isinstance(error.value, TemplateLimit)


def conversation(turns: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"Turn {i}."} for i in range(turns)]


def with_template(tiny_model: Path, folder: Path, hostile: str) -> Path:
    """The model with a template that is hostile to long conversations only."""
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text())
    settings["chat_template"] = f"{{% if messages|length >= {LONG} %}}{hostile}{{% endif %}}" + template_of(tiny_model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def template_of(model: Path) -> str:
    if (model / "chat_template.jinja").is_file():
        return (model / "chat_template.jinja").read_text()
    return str(json.loads((model / "tokenizer_config.json").read_text())["chat_template"])


@pytest.mark.parametrize("kind", HOSTILE)
def test_check_of_data_refuses_a_template_without_bounds_in_one_message(
    kind: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with_template(tiny_model, folder, HOSTILE[kind])
    rows = [{"messages": conversation(LONG)} for _ in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["check", str(tmp_path / "a.jsonl"), "--base-model", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("the chat template ") == 1 and "hint: " in said and "Traceback" not in said
    wanted = (
        "takes more than 1 s"
        if kind.startswith(("endless", "one"))
        else "writes more than"
        if kind == "much text"
        else "needs more than"
    )
    assert wanted in said


def test_preparing_pairs_prompts_and_labels_stops_at_the_same_limits(tiny_tokenizer: Any) -> None:
    hostile = copy.deepcopy(tiny_tokenizer)
    hostile.chat_template = (
        f"{{% if messages|length >= {LONG} %}}{HOSTILE['endless loops']}{{% endif %}}{{{{ '' }}}}"
        + hostile.chat_template
    )
    assert encode_prompt(hostile, conversation(1))
    with pytest.raises(TemplateLimit, match="takes more than 1 s of processor time"):
        examples_of(hostile, {"messages": conversation(LONG)})
    started = bounded_templates._renderer
    with pytest.raises(TemplateLimit, match="takes more than 1 s of processor time"):  # remembered, not tried again
        encode_prompt(hostile, conversation(LONG + 1))
    assert bounded_templates._renderer is started
    assert encode_prompt(tiny_tokenizer, conversation(LONG + 1))


def test_many_slow_conversations_exceed_the_limit_together() -> None:
    slow = "{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}{% endfor %}" + "{{ messages }}"
    with pytest.raises(TemplateLimit, match="takes more than 1 s of processor time"):
        for i in range(1000):
            bounded_templates.render(slow, {"messages": i})


def test_an_error_of_a_template_refuses_one_conversation(tiny_model: Path, tmp_path: Path) -> None:
    misfit = tokens_of(with_template(tiny_model, tmp_path, "{{ raise_exception('too\n long') }}")).misfit
    assert misfit is not None
    assert misfit(conversation(LONG), None) == "the chat template refuses it: too long"
    assert misfit(conversation(2), None) is None
    with pytest.raises(Refused, match=r"^x{300}"):
        bounded_templates.render("{{ raise_exception('x' * 999) }}", {})


def test_a_template_reads_no_environment_and_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-to-be-seen")
    assert bounded_templates.render("{{ 1 }}", {}) == "1"
    assert bounded_templates._renderer
    process = Path("/proc", str(bounded_templates._renderer.process.pid))
    assert b"not-to-be-seen" not in (process / "environ").read_bytes()
    limits = {line[:26].strip(): line[26:47].strip() for line in (process / "limits").read_text().splitlines()}
    assert (limits["Max file size"], limits["Max open files"]) == ("0", "8")


def test_ctrl_c_in_a_conversation_leaves_no_reply_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(stream: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(template_process, "read", interrupted)
        bounded_templates.render("{{ a }}", {"a": "first"})
    assert bounded_templates.render("{{ a }}", {"a": "second"}) == "second"


def test_ctrl_c_at_a_terminal_reaches_the_command_alone_and_not_the_process_that_renders() -> None:
    """A command that ignores it, as after `&` in a script, goes on."""
    assert bounded_templates.render("{{ 1 }}", {}) == "1" and bounded_templates._renderer
    assert os.getpgid(bounded_templates._renderer.process.pid) != os.getpgid(0)


def test_a_forked_process_renders_in_a_process_of_its_own() -> None:
    assert bounded_templates.render("{{ a }}", {"a": "before"}) == "before"
    child = os.fork()
    if not child:
        os._exit(bounded_templates.render("{{ a }}", {"a": "inside"}) != "inside")
    assert os.waitpid(child, 0)[1] == 0
    assert bounded_templates.render("{{ a }}", {"a": "after"}) == "after"


TEMPLATES = sorted(
    file.name for file in files("trl").joinpath("chat_templates").iterdir() if file.name.endswith(".jinja")
)
CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "f", "arguments": {"x": [1, None, "\ud83d\ude00"]}}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}},
}
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    (conversation(4), None),
    (
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": " Yes", "reasoning_content": "Hm."},
            {"role": "user", "content": "é"},
        ],
        None,
    ),
    (
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "7", "tool_call_id": "a1b2c3d4e", "name": "f"},
        ],
        [TOOL],
    ),
    ([], None),
]


def test_every_template_of_trl_gives_the_same_text_as_transformers(tiny_tokenizer: Any) -> None:
    tokenizer, equal = copy.deepcopy(tiny_tokenizer), 0
    for name in TEMPLATES:
        tokenizer.chat_template = files("trl").joinpath("chat_templates", name).read_text(encoding="utf-8")
        form = rendering.form_of(tokenizer)
        template = rendering.with_constant_date(tokenizer.chat_template)
        for messages, tools in CONVERSATIONS:
            read = [rendering._as_read(message, form) for message in messages]
            for thinking in (None, True):
                options = rendering.THINKING[thinking] if thinking else {}
                try:
                    there = tokenizer.apply_chat_template(
                        read, tokenize=False, tools=tools, chat_template=template, add_generation_prompt=True, **options
                    )
                except Exception as error:  # noqa: BLE001  what fails must fail alike
                    with pytest.raises(InputError) as refusal:
                        rendering.render(tokenizer, messages, True, tools, thinking)
                    assert " ".join(str(error).split())[:100] in refusal.value.what, name
                else:
                    assert rendering.render(tokenizer, messages, True, tools, thinking) == there, name
                    equal += 1
    assert equal > 4 * len(TEMPLATES)
