"""Keys of the fine-tuning methods, and their validation from params.yaml alone: PEFT's keys are read from its source.

Methods are those of PEFT's table, short names for common variants, and methods of our own: `full`, `bitfit` and
`feature_extraction`. docs/methods.md lists what each method trains, its defaults and its source.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section, parse
from dagster_project.core.versions import require_version
from dagster_project.training.methods import feature_extraction

Quantization = Literal["none", "nf4"]

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "qlora": ("lora", {"target_modules": "all-linear"}),
    "qdora": ("lora", {"target_modules": "all-linear", "use_dora": True}),
    "layernorm": ("ln_tuning", {}),
}
"""Short name -> method of PEFT and the keys that the name implies."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "adalora": {"init_r": 24, "target_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "prefix_tuning": {"num_virtual_tokens": 20},
    "prompt_tuning": {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "p_tuning": {"num_virtual_tokens": 20},
    "cartridge": {"num_virtual_tokens": 20},
}

IMPLIES_NF4 = ("qlora", "qdora")

VIRTUAL = "trains virtual tokens, which cannot be stored in the base model's weights"

CANNOT_MERGE = {
    "prefix_tuning": VIRTUAL,
    "prompt_tuning": VIRTUAL,
    "p_tuning": VIRTUAL,
    "cartridge": VIRTUAL,
    "feature_extraction": "learns a separate layer, and does not change the base model",
    "adaption_prompt": "trains prompts inside the attention, which cannot be stored in the base model's weights",
    "beft": "trains biases for layers that may have none",
}
"""Method -> why it cannot be merged. The texts are stored in method.json."""

CANNOT_CHECKPOINT = ("prefix_tuning", "cartridge")
"""Methods that use the KV cache, which gradient checkpointing disables."""

CANNOT_MERGE_QUANTIZED = ("ia3", "adalora")

CANNOT_QUANTIZE = (
    "full", "bitfit", "adamss", "deft", "delora", "frod", "glora", "hira", "hra", "loha", "lokr", "osf", "peanut",
    "psoft", "supertuning", "tinylora", "unilora",
)  # fmt: skip
"""Methods that compute with the base model's own weights. On 4-bit weights most of them fail in PEFT; hira has no
effect in evaluation, unilora none at all."""

UNSUPPORTED_METHODS = {
    "xlora": "combines adapters that are already trained; one entry trains one adapter",
    "poly": "needs a task id for each example",
    "multitask_prompt_tuning": "needs a task id for each example",
    "lily": "weights its matrices by a mean over the whole row, which includes padding and other examples",
    "cpt": "trains on examples given as token ids, with its own loss",
    "shadow": "trains a second model in parallel, with its own loss",
}
"""Methods of PEFT that are not supported -> reason."""

RESERVED_KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "runtime_config", "total_step", "tokenizer_name_or_path",
}  # fmt: skip
"""Keys of PEFT that are set by this project, or that belong to loading."""

REFUSED_KEYS = {
    "tokenizer_kwargs": "can load code",
    "prompt_tuning_init_state_dict_path": "unpickles a file",
    "megatron_config": "imports a module by name",
    "megatron_core": "imports a module by name",
    "eva_config": "needs a pass over the data before training",
    "corda_config": "needs a pass over the data before training",
    "lora_ga_config": "needs a pass over the data before training",
    "alora_invocation_tokens": "needs a position in each prompt from which the adapter is active",
    "arrow_config": "combines adapters that are already trained",
    "use_bdlora": "is for serving on many GPUs",
    "sample_at_inference": "draws the adapter anew in each pass of evaluation, and no weights can be merged that do",
}
"""Keys of PEFT that are refused -> reason."""

UNTRAINED_KEYS = {
    "kasa_config": "adds a term to the loss, which is not computed here",
    "monteclora_config": "adds a term to the loss, which is not computed here",
    "use_asa": "removes subspaces in a callback, which is not run here",
    "velora_config": "computes its projections in the first pass of a training, and checkpoints do not contain them",
}
"""Keys of PEFT that need more than the loss of the records -> reason. Adapters of another trainer may have them."""

UNREAD_KEYS = {
    "adalora": ("alpha_pattern", "init_lora_weights", "lora_bias", "r", "rank_pattern", "use_qalora", "use_rslora")
}
"""Method -> keys that PEFT accepts for it, and computes the same with every value of. `init_lora_weights` is read if it
is true or false."""

STARTS_FROM_DATA = re.compile(r"eva|corda.*|lora_ga", re.IGNORECASE)
"""Values of init_lora_weights that are computed from examples. PEFT leaves the start of `eva` random if nobody computes
it."""

MINIMUM = {
    "init_r": 2,
    **dict.fromkeys(("r", "target_r", "num_virtual_tokens", "lora_alpha", "deltaT"), 1),
    **dict.fromkeys(("tinit", "tfinal", "lora_dropout", "orth_reg_weight"), 0),
}
"""Key -> minimum value."""
TOKEN_NUMBERS = ("token_indices", "trainable_token_indices")
"""Keys with token ids, as a list or, by layer, as lists."""

STARTS_FROM_WEIGHTS = re.compile(r"pissa|olora|corda|loftq|eva|lora_ga|orthogonal", re.IGNORECASE)
"""Values of init_lora_weights that are computed from the base model's weights."""


class Full(Section):
    """Keys of `full`."""

    trainable: list[str] = Field(default=[])
    """Regular expressions. A weight is trained if one of them matches a part of its name. Empty: all weights are
    trained."""

    @field_validator("trainable")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None
        return patterns


class Bitfit(Section):
    """Keys of `bitfit`: none."""


OWN: dict[str, type[Section]] = {"full": Full, "bitfit": Bitfit, "feature_extraction": feature_extraction.Options}
"""Methods that are not part of PEFT -> their keys."""


@cache
def _peft_folder() -> Path:
    """Folder of PEFT's source.

    It is parsed, not imported: importing PEFT takes seconds, and every command validates params.yaml.
    """
    require_version("peft", ">=0.21.2,<0.22", "the layout of PEFT's source")
    spec = find_spec("peft")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@cache
def _peft_classes(file: str) -> dict[str, ast.ClassDef]:
    """The classes that a source file of PEFT defines, by name."""
    tree = ast.parse((_peft_folder() / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def peft_methods() -> dict[str, tuple[str, str]]:
    """PEFT's table of methods: name -> (configuration class, file that defines it)."""
    table = {}
    for path in sorted(_peft_folder().glob("tuners/*/__init__.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            if isinstance(call.func, ast.Name) and call.func.id == "register_peft_method":
                arguments = {keyword.arg: keyword.value for keyword in call.keywords}
                name, config = arguments["name"], arguments["config_cls"]
                assert isinstance(name, ast.Constant) and isinstance(config, ast.Name)
                table[str(name.value)] = (config.id, f"tuners/{path.parent.name}/config.py")
    return table


@cache
def peft_keys(method: str) -> dict[str, ast.expr]:
    """Key of a PEFT method -> annotated type."""
    name, file = peft_methods()[method]
    files = ("config.py", "tuners/lycoris_utils.py", "tuners/lora/config.py", file)
    classes = {name: node for source in files for name, node in _peft_classes(source).items()}

    def fields(class_name: str) -> dict[str, ast.expr]:
        if class_name not in classes:
            return {}
        node, found = classes[class_name], dict[str, ast.expr]()
        for base in node.bases:
            found |= fields(base.id) if isinstance(base, ast.Name) else {}
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found[line.target.id] = line.annotation
        return found

    return {key: kind for key, kind in fields(name).items() if key not in RESERVED_KEYS | REFUSED_KEYS.keys()}


def _fits(value: Any, kind: ast.expr) -> bool:
    """Whether a value has the annotated type.

    Types other than plain types and choices between them are left to PEFT.
    """
    scalars: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    match kind:
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id=name) if name in scalars:
            return isinstance(value, scalars[name]) and not isinstance(value, bool)
        case ast.Name(id="dict" | "list" as name):
            return isinstance(value, dict if name == "dict" else list)
        case ast.BinOp(left=left, right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return value is None or _fits(value, inner)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=kinds)):
            return any(_fits(value, option) for option in kinds)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            allowed = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            constants = [node.value for node in allowed if isinstance(node, ast.Constant)]
            return any(type(constant) is type(value) and constant == value for constant in constants)
        case ast.Subscript(value=ast.Name(id="dict" | "list" as name)):
            return isinstance(value, dict if name == "dict" else list)
    return True


def methods() -> list[str]:
    """All supported values of `method`, sorted."""
    return sorted({*peft_methods(), *ALIASES, *OWN} - UNSUPPORTED_METHODS.keys())


def check(
    method: str,
    options: Mapping[str, Any],
    quantization: Quantization | None,
    merge: bool,
    where: str,
    gradient_checkpointing: bool = False,
) -> None:
    """Validate an entry from params.yaml alone, in milliseconds: PEFT's methods and keys are parsed from its source.

    Args:
        method: name in any case.
        options: the entry's `peft`.
        quantization: None means the default of the method.
        where: dotted path of the entry, e.g. "adapter.lora".
    Raises:
        InputError: unknown method or keys (all of them); a value of the wrong type or out of range; quantization, merge
            or gradient checkpointing that the method does not support.
    """
    name, keys = resolve(method, where)
    add_checked(name, keys, options, where)
    if method.lower() in IMPLIES_NF4 and quantization == "none":
        problem = f"params.yaml: {where}.quantization: {method} trains on 4-bit weights"
        raise InputError(problem, "use nf4, or method: lora")
    quantized = quantization_of(method, quantization) == "nf4"
    if quantized and name in CANNOT_QUANTIZE:
        raise InputError(
            f"params.yaml: {where}.quantization: {method} computes with the base model's weights and does not support"
            " 4-bit weights",
            "set quantization: none, or use a method that adds to the layers' output, such as qlora",
        )
    start = keys.get("init_lora_weights", True)
    if quantized and isinstance(start, str) and STARTS_FROM_WEIGHTS.search(start):
        raise InputError(
            f"params.yaml: {where}.peft.init_lora_weights: {start} is computed from the base model's full-precision"
            " weights and does not support 4-bit weights",
            "set quantization: none, or remove init_lora_weights",
        )
    if merge and (why := why_not_merged(method, keys, quantization)):
        raise InputError(
            f"params.yaml: {where}.merge: {method} {why}",
            f"set merge: false in {where}; evaluation then loads base and adapter",
        )
    if gradient_checkpointing and name in CANNOT_CHECKPOINT:
        raise InputError(
            f"params.yaml: {where}.gradient_checkpointing: {method} uses the KV cache, which checkpointing disables",
            "set gradient_checkpointing: false",
        )


def refuse_untrained(options: Mapping[str, Any], where: str) -> None:
    """Refuse keys that the trainers here accept and do not act on. A training command may.

    Raises:
        InputError: as described.
    """
    for key, value in sorted(options.items()):
        if key in UNTRAINED_KEYS and value not in (None, False):
            problem = f"params.yaml: {where}.peft.{key}: is not supported: it {UNTRAINED_KEYS[key]}"
            raise InputError(problem, "leave it out")
        if key == "init_lora_weights" and isinstance(value, str) and STARTS_FROM_DATA.fullmatch(value):
            raise InputError(
                f"params.yaml: {where}.peft.{key}: {value} is not supported: it needs a pass over the data before"
                " training",
                "leave it out, or use another value, such as pissa",
            )


def quantization_of(method: str, quantization: Quantization | None) -> Quantization:
    """The quantization of an entry; None means the default of the method."""
    return quantization or ("nf4" if method.lower() in IMPLIES_NF4 else "none")


def why_not_merged(method: str, options: Mapping[str, Any], quantization: Quantization | None) -> str:
    """Why the method cannot be merged, as the end of a sentence; empty if it can. The text is stored in method.json."""
    name = ALIASES.get(method.lower(), (method.lower(), {}))[0]
    if name in CANNOT_MERGE:
        return f"cannot be merged: it {CANNOT_MERGE[name]}"
    if name in CANNOT_MERGE_QUANTIZED and quantization_of(method, quantization) == "nf4":
        return "cannot be merged once trained against quantized weights: it scales their outputs"
    if options.get("layer_replication"):
        return "with layer_replication cannot be merged: several layers share one weight"
    return ""


def place_of(where: str, key: str) -> str:
    """Where a value was given, as the beginning of a message: params.yaml, or an option such as `--method lora`."""
    return where if where.startswith("--") else f"params.yaml: {where}.{key}"


def resolve(method: str, where: str) -> tuple[str, dict[str, Any]]:
    """Full name of a method and the keys that its name implies."""
    name, keys = ALIASES.get(method.lower(), (method.lower(), {}))
    place, hint = place_of(where, "method"), f"methods: {', '.join(methods())}"
    if name in UNSUPPORTED_METHODS:
        raise InputError(f"{place}: {name} {UNSUPPORTED_METHODS[name]}", hint)
    if name not in methods():
        near = difflib.get_close_matches(name, methods(), 3, 0.6)
        hint += f"; nearest: {' or '.join(near)}" if near else ""
        raise InputError(f"{place}: unknown method {method!r}", hint)
    return name, dict(keys)


def add_checked(name: str, keys: dict[str, Any], options: Mapping[str, Any], where: str) -> None:
    """Validate the options of a method and add them to `keys`, which the method's name implies."""
    if name in OWN:
        parse(OWN[name], dict(options), f"{where}.peft")
        keys.update(options)
        return
    known, wrong, hints = peft_keys(name), [], []
    for key, value in sorted(options.items()):
        path = f"params.yaml: {where}.peft.{key}"
        if key in REFUSED_KEYS:
            wrong.append(f"{path}: is not supported: it {REFUSED_KEYS[key]}")
        elif key not in known:
            wrong.append(f"{path}: unknown key of {name}")
            hints.append(f"keys of {name}: {', '.join(sorted(known))}")
        elif key == "init_lora_weights" and isinstance(value, str) and value.startswith("pissa_niter"):
            why = "it starts from a random approximation, and a loaded adapter from another one"
            wrong.append(f"{path}: {value} is not supported: {why}")
            hints.append("use pissa")
        elif not _fits(value, known[key]):
            wrong.append(f"{path}: must be {ast.unparse(known[key])} (got {value!r})")
        elif key in UNREAD_KEYS.get(name, ()) and _is_set(key, value):
            wrong.append(f"{path}: has no effect with {name}")
            hints.append("set init_r and target_r" if key == "r" else "leave it out, or use method: lora")
        elif key in MINIMUM and isinstance(value, int | float) and value < MINIMUM[key]:
            wrong.append(f"{path}: must be at least {MINIMUM[key]} (got {value!r})")
        elif key in TOKEN_NUMBERS and re.search(r"-\d", str(value)):
            wrong.append(f"{path}: a token id cannot be negative (got {value!r})")
        elif key == "random_loc_seed" and value is None:
            wrong.append(f"{path}: must be a number (got null)")
        elif key == "loftq_config" and value:
            wrong += [f"{path}: {what}" for what in _wrong_loftq(value, {**keys, **options})]
        elif key == "lora_dropout" and isinstance(value, int | float) and value >= 1:
            wrong.append(f"{path}: must be below 1 (got {value!r})")
        elif key in keys and key.startswith("use_") and value != keys[key]:
            wrong.append(f"{path}: {value!r} contradicts the method")
            hints.append(f"use method: {name}")
    keys.update(options)
    if isinstance(keys.get("target_modules"), str) and keys.get("layers_to_transform") is not None:
        wrong.append(f"params.yaml: {where}.peft.layers_to_transform: requires a list of target_modules")
        hints.append("list the names of the modules")
    first, last = ((DEFAULTS["adalora"] | keys)[rank] for rank in ("init_r", "target_r"))
    if name == "adalora" and isinstance(first, int) and isinstance(last, int) and first <= last:
        path = f"params.yaml: {where}.peft.init_r"
        wrong.append(f"{path}: must be above target_r, so that ranks can be removed (got {first!r})")
    if wrong:
        raise InputError("\n".join(wrong), "; ".join(dict.fromkeys(hints)) or "correct these values")


def _is_set(key: str, value: Any) -> bool:
    """Whether a key has a value other than off; true is the usual start of weights."""
    return value not in (None, False) and (key != "init_lora_weights" or isinstance(value, str))


def _wrong_loftq(value: Any, keys: Mapping[str, Any]) -> Iterator[str]:
    if keys.get("init_lora_weights") != "loftq":
        yield "has no effect without init_lora_weights: loftq"
    elif not isinstance(value, Mapping) or value.keys() != {"loftq_bits", "loftq_iter"}:
        yield f"must have the keys loftq_bits and loftq_iter, and no others (got {value!r})"
    else:
        if value["loftq_bits"] not in (4, 8):
            yield f"loftq_bits must be 4 or 8 (got {value['loftq_bits']!r})"
        if type(value["loftq_iter"]) is not int or value["loftq_iter"] < 1:
            yield f"loftq_iter must be a whole number from 1 on (got {value['loftq_iter']!r})"
