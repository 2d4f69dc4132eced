"""`pedigree serve`: the official client gets the answers of `pedigree chat`
from the recorded model, and from no other one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders.servers import free_port
from conftest import pedigree, tool

from dagster_project.__main__ import main
from dagster_project.commands import chat
from dagster_project.commands.serve import (
    Served,
    choose_engine,
    command_of,
    environment_of,
    fields_of_requests,
    find_served,
)
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_file, md5_of_folder
from dagster_project.core.records import write_records
from dagster_project.orchestration.processes import is_running

QUESTIONS = ("Where is my parcel?", "a", "Ωß")
LONGEST = 12
SYSTEM = "Answer in letters."


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a recorded base model whose answers are letters, with a penalty on repetitions in its
    generation_config.json, and with training records that have one system prompt."""
    root = tmp_path_factory.mktemp("served") / "project"
    shutil.copytree(tiny_model, root / "models/tiny")
    write_letters(root / "models/tiny")
    settings = json.loads((root / "models/tiny/generation_config.json").read_text())
    (root / "models/tiny/generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.5}))
    shutil.copytree(root / "models/tiny", root / "data/base_model")
    listing = {file.name: md5_of_file(file) for file in (root / "data/base_model").iterdir()}
    out = {"path": "data/base_model", "hash": "md5", "md5": md5_of_folder(listing)}
    (root / "dvc.yaml").write_text("stages: {base_model: {cmd: x, outs: [data/base_model]}}")
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"base_model": {"cmd": "x", "outs": [out]}}}))
    (root / "params.yaml").write_text("{compute: {dtype: float32, threads: 1}, adapter: {lora: {}}, aligned: {}}")
    turns = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    write_records(root / "data/splits/train", [{"example_id": "1", "messages": turns}])
    return root


def write_letters(folder: Path) -> None:
    """Let a model answer with lower-case letters: their embeddings, which are
    also the weights of the output layer, are large."""
    import torch
    from safetensors.torch import load_file, save_file

    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    weights = {
        name: tensor * 10 if tensor.dim() == 2 else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    scale = torch.full((len(vocabulary), 1), 0.01)
    scale[[vocabulary[letter] for letter in string.ascii_lowercase]] = 1.0
    weights["model.embed_tokens.weight"] *= scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@contextmanager
def serving(root: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command, once it has printed its document."""
    log = root.parent / "serve.log"
    command = [sys.executable, "-m", "dagster_project", "serve", *arguments, "--port", str(free_port()), "--json"]
    environment = {**os.environ, "HF_TOKEN": "hf_secretsecret", "TMPDIR": str(root.parent)}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            # tests that a script started with `&` ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield process, json.loads(line)
    finally:
        process.terminate()
        process.wait(60)


def within_a_minute(holds: Callable[[], bool]) -> bool:
    """Whether something becomes true."""
    until = time.monotonic() + 60
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def served(made: Path) -> Iterator[dict[str, Any]]:
    tool("fastapi")
    with serving(made) as (_, document):
        yield document


@pytest.fixture(scope="module")
def client(served: dict[str, Any]) -> Any:
    return tool("openai").OpenAI(base_url=served["url"], api_key="none", max_retries=0, timeout=120)


def recorded(root: Path, stage: str) -> str:
    return str(json.loads((root / "dvc.lock").read_text())["stages"][stage]["outs"][0]["md5"])


def test_the_endpoint_lists_one_model_whose_id_has_the_hash_of_dvc_lock(
    made: Path, served: dict[str, Any], client: Any
) -> None:
    digest = recorded(made, "base_model")
    assert [model.id for model in client.models.list()] == [f"base_model-{digest[:8]}"] == [served["model"]]
    assert (served["md5"], served["recorded"], served["folder"]) == (digest, True, "data/base_model")
    assert served["url"].startswith("http://127.0.0.1:") and served["model"] in served["example"]


def test_answers_are_those_of_chat_streamed_or_not(made: Path, served: dict[str, Any], client: Any) -> None:
    answers = []
    for question in QUESTIONS:
        said = chat.once(made, chat.Options(["base_model"], None, None, chat.Decoding(LONGEST)), question)
        expected = said["answers"][0]["answer"]["content"]
        messages = [{"role": "system", "content": served["system"]}, {"role": "user", "content": question}]
        asked = {
            "model": served["model"],
            "messages": messages,
            "temperature": 0,
            "max_tokens": LONGEST,
            **served["request"],
        }
        whole = client.chat.completions.create(**asked)
        parts = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)]
        assert whole.choices[0].message.content == "".join(filter(None, parts)) == expected
        assert (whole.model, whole.usage.completion_tokens, len(expected)) == (served["model"], LONGEST, LONGEST)
        answers.append(expected)
        del asked["frequency_penalty"]
        assert client.chat.completions.create(**asked).choices[0].message.content != expected
    assert len(set(answers)) == len(QUESTIONS) and served["system"] == SYSTEM


@pytest.mark.parametrize("other", ["hf-internal-testing/tiny-random-gpt2", "models/tiny", "base_model"])
def test_a_request_for_another_model_is_refused(client: Any, other: str) -> None:
    with pytest.raises(tool("openai").BadRequestError) as refusal:
        client.chat.completions.create(model=other, messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
    assert "pinned" in refusal.value.response.json()["detail"]


def test_the_server_downloads_nothing_and_has_no_token(served: dict[str, Any]) -> None:
    body = json.dumps({"model": "hf-internal-testing/tiny-random-gpt2"}).encode()
    request = urllib.request.Request(
        served["url"].replace("/v1", "/load_model"), body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert b'"status": "error"' in answer.read()
    environment = Path(f"/proc/{served['pid']}/environ").read_text().split("\0")
    assert "HF_HUB_OFFLINE=1" in environment and not any("hf_secret" in one for one in environment)


@pytest.mark.parametrize(
    ("path", "header", "value"),
    [
        ("v1/models", "Origin", "https://example.org"),
        ("reset", "Origin", "https://example.org"),  # a form of another page can send it, and the model is unloaded
        ("v1/models", "Host", "example.org"),  # DNS rebinding: a name of another website that leads to loopback
    ],
)
def test_requests_of_web_pages_are_refused(served: dict[str, Any], path: str, header: str, value: str) -> None:
    method, url = "POST" if path == "reset" else "GET", served["url"].replace("v1", path)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, headers={header: value}, method=method), timeout=60)
    assert refused.value.code == 403 and "Access-Control-Allow-Origin" not in refused.value.headers
    if method == "GET":
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.status == 200


def test_the_printed_example_is_a_request_that_works(served: dict[str, Any]) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    done = subprocess.run(
        ["sh", "-c", f"{served['example']} -s"], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>{% if m.reasoning_content %}
{{ m.reasoning_content }}{% endif %}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>{{ '\\n' if enable_thinking | default(true) else '</think>' }}{% endif %}"""
"""Begins an answer with a trace, unless it is told not to, as the templates of Nemotron 3 do."""


def test_requests_begin_an_answer_as_in_training(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "models/tiny", tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text(THINKS)
    served = Served("m", tmp_path / "m", "6d292c09" + "0" * 24, False)
    off = {"enable_thinking": False, "thinking": False}
    assert fields_of_requests(served, "vllm", False) == {"repetition_penalty": 1, "chat_template_kwargs": off}
    assert fields_of_requests(served, "transformers", True) == {"frequency_penalty": 0}, (
        "as the template does by itself"
    )
    (tmp_path / "m/generation_config.json").write_text("{")
    assert fields_of_requests(served, "vllm", True) == {}
    (tmp_path / "m/chat_template.jinja").write_text("{{ raise_exception('think again') }}")
    assert fields_of_requests(served, "vllm", False) == {}, "a template that refuses the question"
    assert fields_of_requests(Served("m", made / "params.yaml", "0" * 64, False), "llama.cpp", False) == {}, "a file"


def test_a_port_in_use_is_one_message(made: Path, served: dict[str, Any]) -> None:
    port = served["url"].rpartition(":")[2].removesuffix("/v1")
    done = pedigree(made, "serve", "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        f"cannot listen on 127.0.0.1:{port}" in done.stderr
        and "--port" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "ending", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.long) for one in (signal.SIGINT, signal.SIGKILL))]
)
def test_the_server_ends_with_the_command(made: Path, ending: signal.Signals) -> None:
    tool("fastapi")
    with serving(made, "models/tiny") as (process, document):
        assert is_running(document["pid"]) and not document["recorded"] and document["model"].startswith("tiny-")
        process.send_signal(ending)
        code = process.wait(60)
        assert code == (0 if ending != signal.SIGKILL else -signal.SIGKILL)
        assert within_a_minute(lambda: not is_running(document["pid"])), "after SIGKILL, the kernel ends it"
        port = int(document["url"].split(":")[2].partition("/")[0])
        assert within_a_minute(lambda: is_free(port)), "its last threads release it"
    assert "Traceback" not in (made.parent / "serve.log").read_text()


def refused(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that is refused."""
    assert main(["serve", *arguments, "--port", str(free_port()), "--project", str(root)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ")
    return said.err


def test_a_changed_model_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    weights = root / "data/base_model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    said = refused(root, capsys, "base_model")
    assert (
        "data/base_model: not what dvc.lock recorded for base_model" in said
        and "dvc checkout --force data/base_model" in said
    )


def test_a_model_that_is_not_there_names_the_command_that_makes_it(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "dvc repro merged@lora" in refused(made, capsys, "merged@lora")
    assert "there is no such file" in refused(made, capsys, "nothing.gguf")


def test_an_output_that_is_not_recorded_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    shutil.copytree(root / "models/tiny", root / "data/release")
    assert "dvc.lock does not record release" in refused(root, capsys)


def test_an_adapter_is_refused_with_the_model_to_serve(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    (root / "data/adapter/lora").mkdir(parents=True)
    (root / "data/adapter/lora/adapter_config.json").write_text("{}")
    assert "serve merged@lora" in refused(root, capsys, "adapter@lora")


def test_a_missing_library_names_the_extra(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    said = refused(made, capsys, "base_model")
    assert "requires fastapi" in said and "pedigree-llm[serve]" in said


def test_an_engine_that_is_not_installed_or_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder, file = Served("release", tmp_path, "a" * 32, True), Served("m", tmp_path / "m.gguf", "b" * 64, False)
    for served, engine, message in (
        (folder, "vllm", "vllm is not on PATH"),
        (file, None, "llama-server, which serves GGUF files, is not on PATH"),
        (file, "transformers", "needs a folder"),
        (folder, "llama.cpp", "needs a GGUF file"),
    ):
        with pytest.raises(InputError, match=message):
            choose_engine(served, engine)


LLAMA_SERVER = """\
#!{python}
import http.server, json, sys
alias, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--alias", "--port"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({{"data": [{{"id": alias}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer((sys.argv[sys.argv.index("--host") + 1], int(port)), Handler).serve_forever()
"""


def test_a_gguf_file_is_served_by_the_program_of_llama_cpp_under_its_hash(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for llama-server, which takes the same options: what is tested
    is how it is started, named and ended."""
    program, file = tmp_path / "llama-server", tmp_path / "tiny.gguf"
    program.write_text(LLAMA_SERVER.format(python=sys.executable))
    program.chmod(0o755)
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with serving(made, str(file)) as (process, document):
        assert (
            document["model"].startswith("tiny-")
            and document["engine"] == "llama.cpp"
            and len(document["sha256"]) == 64
        )
        process.kill()
        process.wait(60)
        assert within_a_minute(lambda: not is_running(document["pid"]))


def test_a_model_that_changes_while_it_is_loaded_is_not_announced(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, file = tmp_path / "llama-server", tmp_path / "tiny.gguf"
    changes = "open(sys.argv[sys.argv.index('--model') + 1], 'ab').write(b'!')\n"
    start, serve_forever = LLAMA_SERVER.format(python=sys.executable).split("http.server.HTTPServer(")
    program.write_text(f"{start}{changes}http.server.HTTPServer({serve_forever}")
    program.chmod(0o755)
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    port = free_port()
    done = pedigree(made, "serve", str(file), "--port", str(port), "--json")
    assert (
        done.returncode == 1
        and json.loads(done.stdout).keys() == {"error", "hint"}
        and "changed while it was loaded" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert within_a_minute(lambda: is_free(port))


def test_weights_that_a_server_would_unpickle_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "no model.safetensors" in refused(made, capsys, str(tmp_path))


def test_a_number_that_is_no_port_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "base_model", "--port", "70000", "--project", str(made)]) == 2
    assert "--port 70000: not a port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("merged@lora", "merged-lora-6d292c09"),
        ("Modell ä", "Modell-6d292c09"),
        ("\u6a21\u578b", "model-6d292c09"),
        ("--", "model-6d292c09"),
    ],
)
def test_an_id_is_no_option_of_a_server(tmp_path: Path, name: str, expected: str) -> None:
    assert Served(name, tmp_path, "6d292c09" + "0" * 24, False).id == expected


def test_vllm_gets_the_folder_under_the_id_on_loopback(tmp_path: Path) -> None:
    command = command_of("vllm", Served("merged@lora", tmp_path, "6d292c09" + "0" * 24, True), tmp_path, tmp_path, 8000)
    named = ["serve", str(tmp_path), "--served-model-name", "merged-lora-6d292c09", "--allowed-origins", "[]"]
    assert command[1:] == [*named, "--host", "127.0.0.1", "--port", "8000"]


def test_the_environment_of_a_server_has_no_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    secret = (
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "PEDIGREE_SIGNING_KEY",
        "PEDIGREE_SIGNING_KEY_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "VLLM_API_KEY",
    )
    for name in (*secret, "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "x")
    found = environment_of(tmp_path)
    assert not found.keys() & {*secret} and found["TOKENIZERS_PARALLELISM"] == "x"
    assert found["LLAMA_ARG_CORS_ORIGINS"] == "localhost" and "HF_HUB_CACHE" not in found
    assert found["HF_HOME"].startswith(str(tmp_path)) and found["HF_HUB_OFFLINE"] == "1"


def test_the_usual_model_is_that_of_chat_and_a_path_is_the_output_that_it_is(made: Path) -> None:
    assert find_served(made, None).name == find_served(made, f"{made}/data/base_model/").name == "base_model"
    folder = find_served(made, f"{made}/models/tiny/")
    assert (folder.name, folder.recorded) == ("tiny", False) and folder.digest == recorded(made, "base_model"), (
        "a copy with the same bytes"
    )
