"""`pedigree chat`: a conversation with a model in the terminal, as it was
trained and measured: its own template, tokens and decoding."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_project.commands import why, why_pairs
from dagster_project.commands.model_files import TEXT_MODELS
from dagster_project.commands.model_ids import model_id
from dagster_project.commands.nearest_records import TrainingRecords, cut, nearest_text, opening
from dagster_project.core import params
from dagster_project.core.chat import encode_prompt
from dagster_project.core.documents import read_report
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Messages, Tools
from dagster_project.core.params import Compute
from dagster_project.core.rendering import end_ids
from dagster_project.core.text import many, shortened, visible
from dagster_project.evaluation.evaluator import EvaluatedModel, Settings
from dagster_project.lineage.history import md5_on_disk
from dagster_project.lineage.notes import read_note
from dagster_project.lineage.signing.target import refuse_in_output
from dagster_project.pipeline import VARIANTS_OF
from dagster_project.training.inference.answers import read_answer
from dagster_project.training.inference.decoding import Choose, decode
from dagster_project.training.inference.sampling import sampled, uniform_numbers
from dagster_project.training.methods.load import VirtualTokenModel

HELP = """\
/reset        begin a new conversation, with the same system prompt
/system TEXT  begin a new conversation with this system prompt; without TEXT, with none
/data [N]     the N training records (3) whose prompts are most like the last question
/why [PART]   the training records whose gradients are most like the last answer, or a part of it
/save FILE    append the conversation to a JSONL file that `pedigree check` reads
/quit         end; so does Ctrl-D. Ctrl-C stops an answer"""
WRONG_VALUE_ERRORS = (ValueError, KeyError, TypeError, AttributeError)
"""What transformers raises where it first uses a wrong value of a model's files."""
EXPORTED = re.compile(r"(base_model|merged(?:-.+)?)-[0-9a-f]{8}")
"""Id of the base model that an exported adapter names (`model_ids.model_id`). It names a supervised model if the
adapter is one of `aligned`."""
SHOWN = 3
"""Training records that `/data` and `/why` list."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character whose last ones are in later tokens."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: the most likely token, as in evaluation."""
    seed: int = 0

    def choose(self, number: int) -> Choose:
        """Args:
        number: of the answer in the conversation: each draws random numbers of its own.
        """
        if not self.temperature:
            return lambda logits, *_: [int(token) for token in logits.argmax(-1)]
        return sampled(uniform_numbers(f"{self.seed} {number}", [0], self.max_new_tokens), self.temperature)


@dataclass(frozen=True)
class Reply:
    """An answer to the last question."""

    message: dict[str, Any]
    """The canonical message: content, and trace and calls if there are any."""
    tokens: int
    seconds: float
    finished: bool
    """Whether the model ended it."""


@dataclass
class Speaker:
    """A model in a conversation of its own."""

    name: str
    folder: Path
    model: EvaluatedModel
    messages: Messages = field(default_factory=list)
    reasoning: bool = False
    """Whether answers with a trace are expected, for which some templates begin an answer in another way."""
    finished: bool = True
    """Whether the model ended its last answer."""

    def ask(self, question: str, tools: Tools, decoding: Decoding, write: Callable[[str], None]) -> Reply:
        """Answer a question, and add both to the conversation. Ctrl-C ends the answer early; what was written stays.

        Args:
            tools: functions that are offered.
            write: gets the parts of the answer's text while it is generated.
        Raises:
            InputError: the conversation is not UTF-8 or does not fit into the
                model's context, or its template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            json.dumps([asked, tools], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(
                "the question, the system prompt or a tool has characters that are not UTF-8", "give the text in UTF-8"
            ) from None
        tokenizer = self.model.tokenizer
        prompt = encode_prompt(tokenizer, asked, tools, self.reasoning)
        room = tokenizer.model_max_length - len(prompt)
        if room < 1:
            raise InputError(
                f"{self.name}: the conversation has {len(prompt):,} tokens and leaves no room for an answer",
                "/reset begins anew" if len(self.messages) > 1 else "ask a shorter question",
            )
        text = _Text(tokenizer, write)
        choose = decoding.choose(len(self.messages))

        def chosen(*given: Any) -> list[int]:
            tokens = choose(*given)
            text.add(tokens[0])
            return tokens

        causal, prefix = self.model.model, None
        if isinstance(causal, VirtualTokenModel):
            causal, prefix = causal.causal, causal.new_cache(1)
        ends, start = end_ids(tokenizer), time.perf_counter()
        with suppress(KeyboardInterrupt):
            decode(causal, [prompt], chosen, min(room, decoding.max_new_tokens), ends, tokenizer.pad_token_id, prefix)
        seconds = time.perf_counter() - start
        text.end()
        message = read_answer(tokenizer, prompt, text.tokens, tools).message
        self.messages = [*asked, message]
        self.finished = bool(text.tokens) and text.tokens[-1] in ends
        return Reply(message, len(text.tokens), seconds, self.finished)


class _Text:
    """The text of tokens, as they come."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.written = ""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith(UNFINISHED) and text.startswith(self.written):
            self._write(text)

    def end(self) -> None:
        self._write(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        if new := text[len(self.written) :]:
            self.write(visible(new))
            self.written = text


def find_model(root: Path, name: str | None) -> tuple[str, Path]:
    """Name and folder of a model: a stage, such as release or merged@lora, or a folder.

    Args:
        name: None for the release, else the variant that `comparison` recommends, else the base model.
    Raises:
        InputError: there is no model that generates text.
    """
    if name is None:
        name = next((one for one in _usual(root) if _has_model(_folder(root, one))), None)
        if name is None:
            raise InputError(
                "no model was made here yet",
                "`pedigree run --all` makes one, `dvc repro base_model` at least fetches the base model",
            )
    folder = _folder(root, name)
    if _has_model(folder):
        _refuse_other_kinds(name, folder)
        return name, folder
    stage, _, variant = name.partition("@")
    if stage not in _MODELS:
        known = ", ".join(f"{one}@VARIANT" if one in VARIANTS_OF else one for one in _MODELS)
        raise InputError(f"{name}: there is no such folder with a model", f"give a folder, or one of {known}")
    if stage in VARIANTS_OF:
        section = VARIANTS_OF[stage]
        variants = params.variant_names(params.read(root), section, False)
        if variant not in variants:
            names = ", ".join(f"{stage}@{one}" for one in variants)
            wrong = f"params.yaml has no {section}.{variant}" if variant else "no variant is named"
            raise InputError(
                f"{name}: {wrong}", f"name one of {names}" if names else f"add a variant under `{section}`"
            )
    raise InputError(
        f"{name}: there is no model in {shown(root, folder)}",
        f"`dvc repro {name}` makes it, `dvc pull {name}` fetches it",
    )


def _refuse_other_kinds(name: str, folder: Path) -> None:
    """Raises:
    InputError: a reward model or a classifier, to which transformers would add an output layer with random weights.
    """
    kinds = read_note(folder / "config.json").get("architectures") or []  # an adapter has none
    if kinds and not any(str(kind).endswith(TEXT_MODELS) for kind in kinds):
        raise InputError(f"{name} does not generate text: {', '.join(map(str, kinds))}", "name a language model")


_MODELS = ("release", "base_model", "merged", "merged_aligned", "adapter")
"""Stages with models that answer. An adapter is used on the base model; one of `aligned` only once it is merged."""


def _recorded(speaker: Speaker) -> str:
    """The name or folder by which the lineage of a model is found."""
    return speaker.name if speaker.name.partition("@")[0] in _MODELS else str(speaker.folder)


def _usual(root: Path) -> Iterator[str]:
    yield "release"
    try:
        variant = read_report(root, "comparison")["recommended"]["variant"]
    except (InputError, KeyError, OSError):
        variant = None
    yield from (f"{stage}@{variant}" for stage in ("merged_aligned", "merged") if variant)
    yield "base_model"


def _folder(root: Path, name: str) -> Path:
    stage, _, variant = name.partition("@")
    if stage in _MODELS and "/" not in name and (not variant or params.is_variant_name(variant)):
        return root / "data" / stage / variant
    return Path(name)


def shown(root: Path, folder: Path) -> str:
    """A folder for a message, relative to the project if it is in it."""
    full = folder.resolve()
    return full.relative_to(root).as_posix() if full.is_relative_to(root) else str(folder)


def _has_model(folder: Path) -> bool:
    return folder.is_dir() and any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))


def load(root: Path, name: str, folder: Path) -> Speaker:
    """Args:
        name, folder: of a model, as `find_model` gives them.
    Raises:
        InputError: it is a classifier, or files of it or of its base model are missing or damaged.
    """
    from safetensors import SafetensorError

    values = params.read(root)
    settings = params.parse(Settings, values.get("evaluation"), "evaluation")
    compute = params.parse(Compute, values.get("compute"), "compute")
    base, is_adapter = root / "data/base_model", (folder / "adapter_config.json").is_file()
    try:
        if is_adapter and not _has_model(base := root / _base_of(root, name, folder)):
            raise InputError(
                f"{name} is an adapter, and its base model is not in {shown(root, base)}",
                f"`dvc repro {base.name if base.parent.name == 'data' else f'{base.parent.name}@{base.name}'}`"
                " makes it, `dvc pull` fetches it",
            )
        model = EvaluatedModel(folder, compute, settings, base)
    except (*WRONG_VALUE_ERRORS, OSError, ImportError, RuntimeError, SafetensorError) as error:
        is_of_system = isinstance(error, OSError) and error.errno is not None
        if is_of_system or isinstance(error, ModuleNotFoundError) or "memory" in str(error):
            raise
        read = shlex.join(shown(root, one) for one in (folder, *([base] if is_adapter else [])))
        raise InputError(
            f"{name}: the model in {shown(root, folder)} cannot be loaded: {shortened(' '.join(str(error).split()))}",
            f"if it is an output of the project, `dvc checkout --force {read}` restores it;"
            " otherwise copy all of its files again",
        ) from None
    if not model.writes:
        raise InputError(
            f"{name} is a classifier: it answers with one of its labels and cannot talk",
            "`pedigree compare` shows its scores",
        )
    return Speaker(name, folder, model)


def _base_of(root: Path, name: str, folder: Path) -> str:
    """The model that an adapter was trained on: for one of `aligned`, the supervised model.

    Raises:
        InputError: it was exported, and its base model is another one than that of the project.
    """
    config = json.loads((folder / "adapter_config.json").read_bytes())
    named = str(config.get("base_model_name_or_path")) if isinstance(config, dict) else ""
    if (exported := EXPORTED.fullmatch(named)) and exported[1] != "base_model":
        raise InputError(
            f"{name} is an adapter of {named}, not of the base model", "name merged_aligned@VARIANT, its complete model"
        )
    if exported and _has_model(root / "data/base_model"):
        here = model_id("base_model", md5_on_disk(root / "data/base_model"))
        if named != here:
            raise InputError(
                f"{name} is an adapter of {named}, and data/base_model is {here}",
                "name the folder of an adapter of this base model, or check out the version of the project that has it",
            )
    return named if named.startswith("data/") and ".." not in Path(named).parts else "data/base_model"


def read_tools(path: Path | None) -> Tools:
    """Tools of a JSON file: a list of functions as OpenAI writes them.

    Raises:
        InputError: it is something else.
    """
    if path is None:
        return None
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--tools {path}: {reason}", "give a JSON file with a list of tools") from None
    if not (isinstance(tools, list) and tools and all(map(_is_tool, tools))):
        raise InputError(
            f"--tools {path}: not a list of tools",
            'give [{"type": "function", "function": {"name": ..., "parameters": ...}}]',
        )
    return tools


def _is_tool(tool: Any) -> bool:
    """Whether a value is a function with a name, alone or in OpenAI's form."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("parameters", {}), dict | None)
    )


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    models: Sequence[str | None]
    """One or two; None for the usual one."""
    system: str | None
    """None: that of the training records, if all have the same."""
    tools: Tools
    decoding: Decoding


def begin(root: Path, options: Options) -> tuple[list[Speaker], TrainingRecords, str | None]:
    """The models, each at the beginning of its conversation; the training records; and the system prompt.

    Raises:
        InputError: there is no such model.
    """
    found = [find_model(root, name) for name in options.models]  # all, before one of them is loaded
    speakers, records = [load(root, name, folder) for name, folder in found], TrainingRecords(root)
    system = records.system_prompt() if options.system is None else options.system
    for speaker in speakers:
        speaker.messages = opening(system)
        speaker.reasoning = records.have_traces()
    return speakers, records, system or None


def once(root: Path, options: Options, question: str) -> dict[str, Any]:
    """The answers to one question.

    Returns:
        {"question", "system", "answers": for each model {"model", "folder",
        "answer": the message, "tokens", "finished"}}.
    """
    speakers, _, system = begin(root, options)
    answers = []
    for speaker in speakers:
        reply = speaker.ask(question, options.tools, options.decoding, lambda _: None)
        answers.append(
            {
                "model": speaker.name,
                "folder": shown(root, speaker.folder),
                "answer": reply.message,
                "tokens": reply.tokens,
                "finished": reply.finished,
            }
        )
    return {"question": question, "system": system, "answers": answers}


def once_text(document: Mapping[str, Any]) -> str:
    """The answers for the terminal; with two models, each below its name."""
    answers = document["answers"]
    lines = []
    for answer in answers:
        lines += [f"[{answer['model']}]"] if len(answers) > 1 else []
        lines += filter(None, [answer["answer"]["content"]])
        lines += [call_text(call) for call in answer["answer"].get("tool_calls", [])]
    return "\n".join(lines)


def call_text(call: Mapping[str, Any]) -> str:
    """A line for a call of a tool."""
    function = call["function"]
    arguments = function["arguments"]
    return (
        "call:"
        f" {function['name']}({arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)})"
    )


def talk(root: Path, options: Options) -> None:
    """The conversation on this terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them

    def write(text: str) -> None:
        print(text, end="", flush=True)

    speakers, records, system = begin(root, options)
    names = " and ".join(f"{speaker.name} ({shown(root, speaker.folder)})" for speaker in speakers)
    write(f"{names}. /help lists the commands, Ctrl-D ends.\n")
    if system and options.system is None:
        write(visible(f"System prompt, as in all training records: {cut(system)}\n"))
    Chat(records, speakers, options.tools, options.decoding, lambda: input("> "), write).talk()


@dataclass
class Chat:
    """The conversation at the terminal."""

    records: TrainingRecords
    speakers: Sequence[Speaker]
    tools: Tools
    decoding: Decoding
    read: Callable[[], str]
    """The next line; EOFError at the end."""
    write: Callable[[str], None]
    """Gets text."""
    question: str = ""
    """The last one."""
    attributed: dict[str, why.Attributed] = field(default_factory=dict)
    """Models that `/why` loaded."""

    def talk(self) -> None:
        """Read lines until the end."""
        while True:
            try:
                line = self.read().strip()
                line.encode()  # in some locales Python reads other bytes as surrogates
            except UnicodeError:
                self.write("the line has bytes that are not UTF-8: write it in UTF-8\n")
                continue
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n")
                continue
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._ask(line)
            except InputError as error:
                self.write(visible(f"{error}\n"))

    def _ask(self, question: str) -> None:
        self.question = question
        for speaker in self._named_speakers():
            reply = speaker.ask(question, self.tools, self.decoding, self.write)
            self.write("\n")
            for call in reply.message.get("tool_calls", []):
                self.write(visible(f"{call_text(call)}\n"))
            end = "" if reply.finished else ", not finished"
            self.write(
                f"({many(reply.tokens, 'token')}, {reply.tokens / max(reply.seconds, 1e-9):.0f} a second{end})\n"
            )

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self._begin([message for message in self.speakers[0].messages[:1] if message["role"] == "system"])
        elif name == "/system":
            self._begin(opening(rest))
        elif name == "/data":
            self._data(rest)
        elif name == "/why":
            self._why(rest)
        elif name == "/save":
            self._save(rest)
        elif name == "/help":
            self.write(f"{HELP}\n")
        else:
            raise InputError(f"{name}: unknown", "/help lists what there is")

    def _begin(self, messages: Messages) -> None:
        for speaker in self.speakers:
            speaker.messages = list(messages)
        self.write("a new conversation\n")

    def _data(self, rest: str) -> None:
        if not self.question:
            raise InputError("/data: nothing was asked yet", "ask something first")
        if rest and not (rest.isascii() and rest.isdecimal() and int(rest)):
            raise InputError(f"/data {rest}: not a number of records", "e.g. /data 5")
        for speaker in self._named_speakers():
            nearest = self.records.nearest(_recorded(speaker), self.question, int(rest or SHOWN))
            self.write(visible(f"{nearest_text(nearest)}\n"))

    def _why(self, part: str) -> None:
        """The training records that are most like the last answer of each model, by gradients and words.

        Args:
            part: of the answer; empty for all of it.
        """
        for speaker in self._named_speakers():
            if not any(message["role"] == "assistant" for message in speaker.messages):
                raise InputError("/why: nothing was answered yet", "ask something first")
            document = self._attributed(speaker).answer(
                speaker.messages, speaker.finished, self.tools, part or None, SHOWN
            )
            self.write(visible(why.as_text(document) + "\n"))

    def _attributed(self, speaker: Speaker) -> why.Attributed:
        """Loaded for the first `/why`, and kept for the next."""
        model = _recorded(speaker)
        if model not in self.attributed:
            found = why_pairs.asked(self.records.root, model)
            if not found.store.is_begun():
                raise InputError(
                    f"/why: the gradients of {found.run.address} were not computed yet",
                    f"run `pedigree why {model} --index`",
                )
            self.attributed[model] = why.Attributed.read(found)
        return self.attributed[model]

    def _named_speakers(self) -> Iterator[Speaker]:
        """All models; if there are two, with the name of each before what is written about it."""
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                self.write(f"[{speaker.name}]\n")
            yield speaker

    def _save(self, rest: str) -> None:
        if not rest:
            raise InputError("/save: no file", "e.g. /save conversations.jsonl")
        lines = [
            self._row(speaker) for speaker in self.speakers if any(m["role"] == "assistant" for m in speaker.messages)
        ]
        if not lines:
            raise InputError("/save: there is no conversation yet", "ask something first")
        try:
            path = Path(rest).expanduser()
            refuse_in_output(self.records.root, "/save", path, "file", may_be_source=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        except (OSError, ValueError, RuntimeError) as error:  # a null character, a user who does not exist
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"/save {rest}: {reason}", "give a file that can be written") from None
        self.write(visible(f"appended {many(len(lines), 'conversation')} to {rest}\n"))

    def _row(self, speaker: Speaker) -> Mapping[str, Any]:
        return {"messages": speaker.messages, **({"tools": self.tools} if self.tools else {}), "model": speaker.name}
