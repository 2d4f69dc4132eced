"""`pedigree serve`: a model behind an OpenAI-compatible endpoint on loopback,
by a server that is installed: vLLM, `transformers serve` or llama.cpp's."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dagster_project.commands.chat import find_model, shown
from dagster_project.commands.extras import PACKAGES
from dagster_project.commands.model_files import MERGED
from dagster_project.commands.model_ids import model_id
from dagster_project.commands.nearest_records import TrainingRecords, opening
from dagster_project.core.bounded_templates import TemplateLimit
from dagster_project.core.chat import generation_prompt
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.rendering import THINKING, render
from dagster_project.lineage.history import md5_on_disk
from dagster_project.lineage.notes import read_note
from dagster_project.lineage.signing.target import find
from dagster_project.orchestration import ports
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.load import refuse_pickled_weights
from dagster_project.views.texts import text

log = logging.getLogger("pedigree")

HOST = "127.0.0.1"
QUESTION = "Where is my parcel?"
SECRET = re.compile(r"(^|_)(TOKENS?|KEYS?|PASSWORD|PASSWD|SECRETS?|CREDENTIALS?)(_|$)", re.IGNORECASE)
"""In the names of variables that the server does not get: HF_TOKEN,
PEDIGREE_SIGNING_KEY_PASSWORD, VLLM_API_KEY, with which vLLM would ask for a key."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""One of these, or a server may unpickle weights in another format."""
SECONDS_TO_END = 10.0
"""Time that the server has to end requests before it is killed."""
LONGEST_EXAMPLE = 1_500
"""Characters of the example; a system prompt that makes it longer is left out."""


@dataclass(frozen=True)
class Served:
    """A model that is served."""

    name: str
    folder: Path
    """Its folder, or its GGUF file."""
    digest: str
    """Content hash: md5 of a folder as DVC computes it ("<md5>.dir"), sha256 of a file."""
    recorded: bool
    """Whether dvc.lock records these bytes; otherwise the folder is not an output of the project."""

    @property
    def id(self) -> str:
        """Id of the model at the endpoint: its name and the first digits of its content hash."""
        return model_id(self.name, self.digest)

    def refuse_changed(self, root: Path) -> None:
        """Raises:
        PedigreeError: it is not, or not any more, what was hashed.
        """
        now = sha256_of_file(self.folder) if self.folder.is_file() else md5_on_disk(self.folder)
        if now != self.digest:
            raise PedigreeError(f"{shown(root, self.folder)} changed while it was loaded", "run the same command again")


def find_served(root: Path, model: str | None) -> Served:
    """Args:
        model: as for `pedigree chat`, or a GGUF file.
    Raises:
        InputError: there is no such model, it cannot be served, or it is not the one that dvc.lock recorded.
    """
    if model and model.endswith(".gguf"):
        if not (file := Path(model)).is_file():
            raise InputError(f"{model}: there is no such file", "name a GGUF file, or a model as for `pedigree chat`")
        return Served(file.stem, file.resolve(), sha256_of_file(file), recorded=False)
    name, folder = find_model(root, model)
    _refuse_not_complete(name, folder)
    target = find(root, str(folder.resolve()))
    if target.root is None:
        if folder != Path(name):  # a stage, not a folder
            raise InputError(
                f"{shown(root, folder)}: dvc.lock does not record {name}", f"make it again: `dvc repro {name}`"
            )
        if not any((folder / file).is_file() for file in WEIGHTS):
            raise InputError(
                f"{model}: no model.safetensors, and weights in other formats are not served",
                "save the model as safetensors",
            )
        refuse_pickled_weights(folder)
        return Served(folder.resolve().name, folder.resolve(), md5_on_disk(folder), recorded=False)
    target.refuse_unrecorded()
    return Served(target.address, folder.resolve(), target.md5, recorded=True)


def _refuse_not_complete(name: str, folder: Path) -> None:
    """Raises:
    InputError: an adapter or a classifier, which servers do not load as a model of its own.
    """
    if feature_extraction.is_head(folder):
        raise InputError(f"{name} is a classifier: it does not generate text", "`pedigree compare` shows its scores")
    if (folder / "adapter_config.json").is_file():
        stage, _, variant = name.partition("@")
        hint = f"serve {MERGED[stage]}@{variant}" if stage in MERGED and variant else "serve a variant that is merged"
        raise InputError(
            f"{name} is an adapter, and only complete models are served", f"{hint}; `pedigree chat` talks to it"
        )


def choose_engine(served: Served, engine: str | None) -> str:
    """The server for a model: the one that was asked for, else llama.cpp's for
    a GGUF file, vLLM where it and a GPU are, else transformers'.

    Raises:
        InputError: it is not installed, or does not read such a model.
        ModuleNotFoundError: a library of the extra `serve` is not installed.
    """
    is_gguf = served.folder.suffix == ".gguf"
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    chosen = engine or ("llama.cpp" if is_gguf else "vllm" if _program("vllm") and has_gpu else "transformers")
    if is_gguf != (chosen == "llama.cpp"):
        other = "a folder with safetensors" if is_gguf else "a GGUF file"
        raise InputError(
            f"--engine {chosen} does not serve {served.folder.name}: it needs {other}",
            "leave out --engine, or name another model",
        )
    if chosen == "transformers":
        for package in ("torch", "transformers", *PACKAGES["serve"]):
            if find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    program = {"vllm": "vllm", "llama.cpp": "llama-server"}.get(chosen)
    if program and not _program(program):
        raise InputError(
            (
                f"--engine {chosen}: {program} is not on PATH"
                if engine
                else f"{served.folder.name}: llama-server, which serves GGUF files, is not on PATH"
            ),
            "install it (docs/serve.md), or serve the folder of the model by transformers",
        )
    return chosen


def _program(name: str) -> str | None:
    """Path of a program: next to this Python, else on PATH."""
    return shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def command_of(engine: str, served: Served, root: Path, links: Path, port: int) -> list[str]:
    """The command line of a server.

    Args:
        links: folder in which the model's id is a link to its folder.
    """
    place = ["--host", HOST, "--port", str(port)]
    if engine == "vllm":
        no_pages = ["--allowed-origins", "[]"]  # by default scripts of any web page may read its answers
        return [str(_program("vllm")), "serve", str(served.folder), "--served-model-name", served.id, *no_pages, *place]
    if engine == "llama.cpp":
        return [str(_program("llama-server")), "--model", str(served.folder), "--alias", served.id, "--jinja", *place]
    own = [sys.executable, "-P", "-m", "dagster_project.commands.served", "--project", str(root)]
    return [*own, "--links", str(links), "--model", served.id, *place]


def environment_of(scratch: Path) -> dict[str, str]:
    """Environment of a server: no access to the Hub, an empty cache of it, no
    secrets, and this package, not one in the current folder."""
    kept = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(scratch / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    caches = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_ENDPOINT")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    others = {
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LLAMA_ARG_CORS_ORIGINS": "localhost",
        "PYTHONPATH": path,
    }
    return {name: value for name, value in kept.items() if name not in caches} | offline | others


def serve(
    root: Path, model: str | None, port: int, engine: str | None, announce: Callable[[dict[str, Any]], None]
) -> None:
    """Serve a model until Ctrl-C or SIGTERM.

    Args:
        announce: called once the server answers, with {"url", "model": id, "name", "folder", "md5" or "sha256",
            "recorded", "engine", "system", "request": as `fields_of_requests`, "pid", "example"}.
    Raises:
        InputError: as `find_served` and `choose_engine`, or the port is in use.
        PedigreeError: the server ended, or the model changed while it was loaded.
    """
    served = find_served(root, model)
    chosen = choose_engine(served, engine)
    ports.bound(HOST, port, "--port", 8000).close()
    with tempfile.TemporaryDirectory(prefix="pedigree-serve-") as folder:
        scratch = Path(folder)
        (scratch / "links").mkdir()
        (scratch / "links" / served.id).symlink_to(served.folder)
        command = command_of(chosen, served, root, scratch / "links", port)
        log.info(f"starting {chosen}, which loads {served.id}")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server = subprocess.Popen(
            command,
            env=environment_of(scratch),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            start_new_session=True,
            preexec_fn=None if chosen == "transformers" else _end_with_parent(),
        )
        try:
            _wait(server, chosen, served, port)
            served.refuse_changed(root)
            announce(_document(root, served, chosen, port, server.pid))
            server.wait()
            raise PedigreeError(
                f"{chosen}: the server ended with exit code {server.returncode}", "see its messages above"
            )
        except KeyboardInterrupt:
            log.info("stopped")
        finally:
            _end(server)


def _end_with_parent() -> Callable[[], None]:
    """What another program does before it starts, so that it ends with this process; `served` asks for it itself."""
    from dagster_project.orchestration.processes import end_with_parent

    return end_with_parent


def _wait(server: subprocess.Popen[bytes], engine: str, served: Served, port: int) -> None:
    """Wait until the server lists the model, not only until something answers.

    Another process may have taken the port meanwhile.

    Raises:
        PedigreeError: it ended.
    """
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        with (
            suppress(urllib.error.URLError, OSError, ValueError, KeyError, TypeError),
            ask.open(f"http://{HOST}:{port}/v1/models", timeout=5) as answer,
        ):
            if served.id in {one["id"] for one in json.load(answer)["data"]}:
                return
        time.sleep(0.2)
    raise PedigreeError(
        f"{engine}: the server ended with exit code {server.returncode} before it answered", "see its messages above"
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started; kill them if requests do not end in time, or at another Ctrl-C."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(SECONDS_TO_END)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _document(root: Path, served: Served, engine: str, port: int, pid: int) -> dict[str, Any]:
    url, records = f"http://{HOST}:{port}/v1", TrainingRecords(root)
    system, request = records.system_prompt(), fields_of_requests(served, engine, records.have_traces())
    return {
        "url": url,
        "model": served.id,
        "name": served.name,
        "folder": shown(root, served.folder),
        "sha256" if served.folder.is_file() else "md5": served.digest,
        "recorded": served.recorded,
        "engine": engine,
        "system": system,
        "request": request,
        "pid": pid,
        "example": _example(url, served.id, system, request),
    }


def fields_of_requests(served: Served, engine: str, reasoning: bool) -> dict[str, Any]:
    """What a request needs, besides a temperature of 0, for the answers of evaluation.

    It switches off a penalty on repetitions in the model's generation_config.json, and lets the chat template begin an
    answer as in training.

    Args:
        reasoning: whether the model was trained on answers with a trace.
    """
    if served.folder.is_file():
        return {}
    found: dict[str, Any] = {}
    # servers ignore a file that they cannot read
    if read_note(served.folder / "generation_config.json").get("repetition_penalty") not in (None, 1):
        found |= {"frequency_penalty": 0} if engine == "transformers" else {"repetition_penalty": 1}
    if variables := _template_variables(served.folder, reasoning):
        found["chat_template_kwargs"] = variables
    return found


def _template_variables(folder: Path, reasoning: bool) -> dict[str, bool]:
    """The variables with which the chat template begins an answer as in training; none if it does so by itself."""
    files = [file for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json") if file.is_file()]
    if not any(b"think" in file.read_bytes() for file in files):
        return {}
    asked = [{"role": "user", "content": QUESTION}]
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        trained, by_itself = generation_prompt(tokenizer, asked, None, reasoning), render(tokenizer, asked, True)
        switched = [(one, render(tokenizer, asked, True, None, switch)) for switch, one in THINKING.items()]
    except (ImportError, OSError, ValueError, InputError, TemplateLimit):
        return {}  # vLLM may be installed elsewhere, and read what is not read here
    return {} if trained == by_itself else next((one for one, text in switched if text == trained), {})


def _example(url: str, model: str, system: str | None, request: Mapping[str, Any]) -> str:
    """A request by curl, with the system prompt of the training records, because the model was trained with it.

    Args:
        request: further fields.
    """
    for given in filter(lambda one: one is not None, (system, "")):
        messages = [*opening(given), {"role": "user", "content": QUESTION}]
        body = {"model": model, "temperature": 0, **request, "messages": messages}
        line = (
            f"curl {url}/chat/completions -H 'Content-Type: application/json'"
            f" -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
        )
        if len(line) <= LONGEST_EXAMPLE:
            break
    return line


def as_text(document: Mapping[str, Any]) -> str:
    """The text for the terminal once the server answers."""
    return text("serve", **document)
