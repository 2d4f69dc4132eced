"""Fine-tuning methods: validation of their keys, and a base model with the method applied, ready for training.

Methods are those of PEFT's table, short names for common variants, and methods of our own: `full`, `bitfit` and
`feature_extraction`. docs/methods.md lists what each method trains, its defaults and its source.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section, parse
from dagster_project.core.versions import require_version
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.attention import attention_for, attention_of
from dagster_project.training.methods.hardware import adding_adapters
from dagster_project.training.methods.load import AdapterInfo, hidden_states, load_base, stored_dtypes

if TYPE_CHECKING:
    import torch

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


# ---- validation without the model


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
    name, keys = _resolve(method, where)
    _check_keys(name, keys, options, where)
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


def _resolve(method: str, where: str) -> tuple[str, dict[str, Any]]:
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


def _check_keys(name: str, keys: dict[str, Any], options: Mapping[str, Any], where: str) -> None:
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


# ---- building


def causal(model: Any) -> Any:
    """The language model inside a PeftModel; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> list[Any]:
    """A model's blocks, by the names of their classes that its architecture declares."""
    kinds = set(causal(model)._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def peft_config(
    method: str,
    options: Mapping[str, Any],
    where: str,
    base: Any = None,
    total_steps: int | None = None,
    tokenizer: str | None = None,
) -> Any:
    """The PEFT configuration of a method from its implied keys, our defaults, and the options, which take precedence.

    Args:
        method: PEFT's name or a short name, in any case, e.g. "lora".
        options: PEFT's keys, e.g. {"r": 16, "lora_alpha": 32}.
        where: dotted path in params.yaml, for messages.
        base: model whose architecture determines target_modules.
        total_steps: optimizer steps, for adalora's schedule.
        tokenizer: folder of the tokenizer, for prompt_tuning's initial words.
    Raises:
        InputError: unknown method or key, or a value that PEFT refuses.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType

    name, keys = _resolve(method, where)
    _check_keys(name, keys, options, where)
    keys = DEFAULTS.get(name, {}) | keys
    if name in {"lora", "adalora"} and keys.get("target_modules") is None and base is not None:
        keys["target_modules"] = _attention(base)
    if name == "ln_tuning" and keys.get("target_modules") is None and base is not None:
        keys["target_modules"] = _norms(base)
    if name == "adalora":
        keys = {"total_step": total_steps, "tinit": (total_steps or 0) // 10, "tfinal": (total_steps or 0) // 2} | keys
    if name == "prompt_tuning":
        keys["tokenizer_name_or_path"] = tokenizer
    if "target_modules" in keys and not keys["target_modules"]:
        del keys["target_modules"]
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())](task_type=TaskType.CAUSAL_LM, **keys)
    except (ValueError, TypeError) as error:
        raise InputError(f"{place_of(where, 'peft')}: {error}", "correct these values") from None


def _attention(base: Any) -> list[str] | None:
    """Names of the attention projections q, k, v and o; None, PEFT's choice, if the architecture uses other names."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    return [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in names] or None


def _norms(base: Any) -> list[str] | None:
    """Names of all normalization layers, without their path."""
    norms = [name for name, module in base.named_modules() if type(module).__name__.endswith("Norm")]
    return sorted({name.rpartition(".")[2] for name in norms}) or None


def _no_effect(_: Any) -> None:
    return None


@dataclass(frozen=True)
class PreparedModel:
    """A model with a method applied, and how to train, save and restore it."""

    model: Any
    """A PeftModel, the base model if its own weights are trained, or a classifier on top of it."""
    trainable: int
    """Number of trained parameters."""
    total: int
    """Number of all parameters."""
    save: Callable[[Path], None]
    """Write the trained weights to a folder as safetensors, with method.json. Does not change the model."""
    packs: bool = True
    """Whether a row may contain several examples. False if virtual tokens precede each example: use `collate_padded`.
    """
    callbacks: list[Any] = field(default_factory=list)
    """TrainerCallbacks of transformers that the method requires."""
    extra_loss: Callable[[Any], torch.Tensor | None] = _no_effect
    """model -> term to add to the loss of each forward pass in training, or None."""
    optim: str | None = None
    """transformers' name of an optimizer that replaces the configured one."""
    autocast: torch.dtype | None = None
    """dtype of the computation if trained weights are float32 in a model of another dtype."""
    fit: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], list[dict[str, float]]] | None = None
    """(train rows, validation rows) -> loss curve, for methods without optimizer steps. Rows need `categories`."""
    state: Callable[[], dict[str, torch.Tensor]] = dict
    """State of the method besides weights, for checkpoints."""
    restore: Callable[[dict[str, torch.Tensor]], None] = _no_effect
    """Restore the state that `state` returned."""

    @property
    def attention(self) -> str:
        """Name of the attention implementation, one of transformers' or of `attention_for`."""
        return attention_of(self.model.base if self.fit else self.model)

    def hidden_states(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Last hidden states of a batch. hidden_states[:, :-1] predicts labels[:, 1:].

        Args:
            inputs: batch of `collate_packed`, or of `collate_padded` if `packs` is False.
        Returns:
            (batch, seq, hidden) in the dtype of the output layer, without virtual tokens.
        """
        import torch

        network, ids = causal(self.model), inputs["input_ids"]
        if not self.packs:
            hidden = hidden_states(self.model, ids, inputs["attention_mask"])
        else:
            read = {name: inputs[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")}
            with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                hidden = network.base_model(**read, use_cache=False).last_hidden_state
        return hidden.to(network.get_output_embeddings().weight.dtype)


def build(
    method: str,
    options: Mapping[str, Any],
    base_model: Path,
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    quantization: Quantization | None = None,
    merge: bool = True,
    total_steps: int | None = None,
    categories: Sequence[str] = (),
    weights: bool = True,
    packs: bool = True,
    named: str = "data/base_model",
) -> PreparedModel:
    """Load the base model and apply the method.

    Args:
        method, options, quantization, merge: values of the variant's entry.
        total_steps: optimizer steps of the run, required by adalora.
        categories: classes of feature_extraction.
        weights: False builds everything on torch's meta device; then the model's configuration is sufficient.
        packs: False if rows are padded, as in generation and TRL's preference trainers.
        named: name of the base model in the adapter's configuration.
    Raises:
        InputError: `check` fails, PEFT refuses the keys for this model, or no parameter would be trained.
    """
    check(method, options, quantization, merge, where)
    quantized = quantization_of(method, quantization)
    reason = why_not_merged(method, options, quantization)
    why_not = "" if merge else reason or "params.yaml says merge: false"
    record = AdapterInfo(method=method.lower(), quantization=quantized, merge=merge, why_not=why_not)
    name, _ = _resolve(method, where)
    if name == "feature_extraction":
        settings = parse(feature_extraction.Options, dict(options), f"{where}.peft")
        return _head(record, settings, base_model, device, dtype, categories, weights)
    if name in {"full", "bitfit"}:
        patterns = [r"\bbias$"] if name == "bitfit" else parse(Full, dict(options), f"{where}.peft").trainable
        return _weights(record, patterns, base_model, device, dtype, where, weights)
    return _adapter(record, options, base_model, device, dtype, where, total_steps, weights, packs, named)


def _adapter(
    record: AdapterInfo,
    options: Mapping[str, Any],
    base_model: Path,
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    total_steps: int | None,
    weights: bool,
    packs: bool,
    named: str,
) -> PreparedModel:
    """The base model with an adapter of PEFT. Arguments are those of `build`."""
    from dagster_project.training.methods.fused_lora import fuse

    name, _ = _resolve(record.method, where)
    virtual = CANNOT_MERGE.get(name) == VIRTUAL
    attention = attention_for(device, dtype if weights else None) if packs and not virtual else "sdpa"
    base = load_base(base_model, device, dtype, record.quantization, attention, weights)
    config = peft_config(record.method, options, where, base, total_steps, str(base_model))
    model = add_adapter(base, config, where, weights)
    _name_feedforward(model, config, where)
    if record.merge:
        _refuse_unmergeable(model, config, where)
    for parameter_name, parameter in model.named_parameters():
        if ".ranknum." in parameter_name:  # a counter; PEFT makes it trainable on quantized layers but never saves it
            parameter.requires_grad_(False)
    trainable, total = model.get_nb_trainable_parameters()
    if not trainable:
        problem = f"{place_of(where, 'method')}: {record.method} leaves no parameter to train in this model"
        raise InputError(problem, "choose other target_modules")
    widened = widen_trained(model)
    fuse(model)

    ranks = _AdaptiveRanks(model) if name == "adalora" else None

    def save(folder: Path) -> None:
        if ranks:
            ranks.synchronize()
        save_adapter(model, folder, base_model=named)
        record.write(folder)

    return PreparedModel(
        model,
        trainable,
        total,
        save,
        packs=packs and not virtual,
        callbacks=[ranks.callback()] if ranks else [],
        extra_loss=ranks.orthogonality if ranks else _no_effect,
        optim="paged_adamw_8bit" if record.quantization == "nf4" and device.type == "cuda" else None,
        autocast=dtype if widened else None,
        state=ranks.state if ranks else dict,
        restore=ranks.restore if ranks else _no_effect,
    )


def add_adapter(base: Any, config: Any, where: str, weights: bool = True) -> Any:
    """PEFT's model of a base model.

    Raises:
        InputError: PEFT refuses the keys for this model, or the adapter could not be used as it is trained.
    """
    from peft import get_peft_model

    try:
        with adding_adapters():
            model = get_peft_model(base, config)
    # also of a wrong index or pattern
    except (ValueError, TypeError, NotImplementedError, LookupError, AssertionError, re.error) as error:
        if isinstance(error, NotImplementedError) and not weights:  # raised by the meta device, not by the keys
            raise
        raise InputError(f"{place_of(where, 'peft')}: {error}", "correct these keys") from None
    _refuse_order(model, config, where)
    _refuse_start(model, config, where)
    return model


def widen_trained(model: Any) -> bool:
    """Make trained weights float32: a bfloat16 weight cannot change by less than 1/256 of its value.

    Returns:
        Whether any was not.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    narrow = [parameter for parameter in trained if parameter.dtype != torch.float32]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    return bool(narrow)


def refuse_unmatched(model: Any, options: Mapping[str, Any], where: str) -> None:
    """PEFT ignores a name that no module has, if another one is found.

    Raises:
        InputError: a name in the options is that of no module, or a pattern or the number of a layer matches none that
            is adapted.
    """
    place = place_of(where, "peft")
    names = [name for name, _ in causal(model).named_modules()]
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        given = options.get(key)
        for entry in given if isinstance(given, list) else ():
            ending = entry if key == "modules_to_save" else f".{entry}"
            if not any(name == entry or name.endswith(ending) for name in names):
                last_parts = sorted({name.rpartition(".")[2] for name in names})
                near = difflib.get_close_matches(str(entry), last_parts, 3, 0.6)
                hint = f"nearest: {' or '.join(near)}" if near else "correct the name, or leave it out"
                raise InputError(f"{place}.{key}: this model has no module {entry!r}", hint)
    tuner = getattr(model, "base_model", None)
    adapted: list[str] = getattr(tuner, "targeted_module_names", [])
    parameters: list[str] = getattr(tuner, "targeted_parameter_names", [])
    for entry in options.get("target_parameters") or ():
        if not any(name == entry or name.endswith(f".{entry}") for name in parameters):
            what = f"{place}.target_parameters: this model has no weight {entry!r} that can be adapted"
            raise InputError(what, "correct the name, or leave it out")
    if not adapted and not parameters:
        return
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in options.get(key) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in (*adapted, *parameters)):
                what = f"{place}.{key}: {pattern!r} matches no module that is adapted"
                raise InputError(what, "correct it, or leave it out")
    layers = options.get("layers_to_transform")
    if not adapted or layers is None:
        return
    numbers = {part for name in adapted for part in name.split(".")}
    for layer in layers if isinstance(layers, list) else [layers]:
        if str(layer) not in numbers:
            count = len(decoder_layers(model))
            hint = f"layers of this model: 0 to {count - 1}" if count else "correct it, or leave it out"
            raise InputError(f"{place}.layers_to_transform: no module of layer {layer} is adapted", hint)


def _refuse_order(model: Any, config: Any, where: str) -> None:
    """Of several patterns that match a module, PEFT takes the first.

    DVC compares parameters without the order of their keys, and the saved configuration has another one, so that the
    adapter would be loaded with other values than it was trained with.

    Raises:
        InputError: several patterns with different values match a module.
    """
    tuner = model.base_model
    adapted = [*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(config, key, None) or {}
        for module in adapted:
            matching = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
            if len({repr(patterns[pattern]) for pattern in matching}) > 1:
                raise InputError(
                    f"{place_of(where, 'peft')}.{key}: {' and '.join(map(repr, matching))} match {module}, and which of"
                    " them counts would depend on their order",
                    "write regular expressions of which one at most matches, or give them the same value",
                )


def _refuse_start(model: Any, config: Any, where: str) -> None:
    """PEFT computes the start of `olora` from weights as (out, in); those of GPT-2's layers are (in, out).

    Raises:
        InputError: as described.
    """
    start = getattr(config, "init_lora_weights", None)
    olora = isinstance(start, str) and start.lower() == "olora"
    if olora and any(getattr(module, "fan_in_fan_out", False) for module in model.modules()):
        raise InputError(
            f"{place_of(where, 'peft')}.init_lora_weights: {start} is not supported for this model: PEFT does not"
            " transpose weights that are stored as (in, out)",
            "use another value, such as pissa",
        )


def _name_feedforward(model: Any, config: Any, where: str) -> None:
    """Leave names that no adapted module has out of `feedforward_modules`.

    PEFT takes those of ia3 from its own table, whatever the target modules are, and does not load an adapter with names
    that are not among these.

    Raises:
        InputError: an adapted module has such a name, but target_modules calls it otherwise.
    """
    given, targets = getattr(config, "feedforward_modules", None), getattr(config, "target_modules", None)
    if not isinstance(given, set) or not isinstance(targets, set):
        return
    adapted = model.base_model.targeted_module_names
    config.feedforward_modules = {name for name in given if any(module.endswith(name) for module in adapted)}
    if other := sorted(config.feedforward_modules - targets):
        raise InputError(
            f"{place_of(where, 'peft')}.feedforward_modules: PEFT's names for this model are not those of"
            f" target_modules: {', '.join(other)}",
            "set feedforward_modules to the modules of target_modules whose inputs are scaled, or to []",
        )


def _refuse_unmergeable(model: Any, config: Any, where: str) -> None:
    """Check that a trained adapter could be merged.

    Raises:
        InputError: the model has no weights of its own for what is trained.
    """
    if _adapts_shared_weight(causal(model)):
        raise InputError(
            f"{place_of(where, 'peft')}: this adapter cannot be merged: word embeddings and output layer of this model"
            " share one weight",
            "leave embed_tokens and lm_head out of target_modules (modules_to_save can be merged), or set merge: false",
        )
    if config.peft_type == "LN_TUNING" and config.modules_to_save:
        raise InputError(
            f"{place_of(where, 'peft')}.modules_to_save: this adapter cannot be merged: PEFT leaves these modules"
            " wrapped when it merges normalization layers",
            "leave modules_to_save out, or set merge: false",
        )
    if getattr(config, "lora_bias", False) and (unbiased := _without_bias(model)):
        raise InputError(
            f"{place_of(where, 'peft')}.lora_bias: this adapter cannot be merged: {unbiased} has no bias to which the"
            " trained one could be added",
            "leave lora_bias out, or set merge: false",
        )


def _adapts_shared_weight(base: Any) -> bool:
    """Whether an update is added to word embeddings or output layer alone, although both use one weight.

    Trained rows of the embeddings (trainable_tokens) are put into both, those of the output layer are not, unless they
    are the same ones.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    rows = [isinstance(layer, TrainableTokensLayer | TrainableTokensWrapper) for layer in ends]
    pairs = list(zip(ends, rows, strict=True))
    adapted = any(isinstance(layer, BaseTunerLayer) for layer, of_rows in pairs if not of_rows)
    numbers = [getattr(layer, "token_adapter", layer).token_indices for layer, of_rows in pairs if of_rows]
    differ = rows == [False, True] or (all(rows) and numbers[0] != numbers[1])
    return (adapted or differ) and bool(base.config.get_text_config().tie_word_embeddings)


def _without_bias(model: Any) -> str:
    """Name of an adapted layer that has no bias; empty if all have one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = ((name, module) for name, module in causal(model).named_modules() if isinstance(module, BaseTunerLayer))
    return next((name for name, module in adapted if getattr(module.get_base_layer(), "bias", None) is None), "")


def _weights(
    record: AdapterInfo,
    patterns: Sequence[str],
    base_model: Path,
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    weights: bool,
) -> PreparedModel:
    """Train the base model's own weights: all, or those that match a pattern.

    They are float32, computation is in `dtype`; saved in the base model's number formats.
    """
    import torch

    attention = attention_for(device, dtype if weights else None)
    model = load_base(base_model, device, torch.float32, attention=attention, weights=weights)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied weights have several names
        names.setdefault(id(parameter), []).append(name)
    for pattern in patterns:
        if any(re.search(pattern, name) for aliases in names.values() for name in aliases):
            continue
        if record.method == "bitfit":
            problem = f"{place_of(where, 'method')}: bitfit trains biases, and this model has none"
            raise InputError(problem, "use method: layernorm")
        problem = f"params.yaml: {where}.peft.trainable: {pattern!r} matches no weight"
        raise InputError(problem, "use the names of the weights in model.safetensors")
    for parameter in model.parameters():
        aliases = names[id(parameter)]
        parameter.requires_grad_(
            not patterns or any(re.search(pattern, name) for pattern in patterns for name in aliases)
        )

    def save(folder: Path) -> None:
        dtype_of, state = stored_dtypes(base_model), model.state_dict()
        for name, value in state.items():
            if value.is_floating_point():
                state[name] = value.to(dtype_of(name))
        model.save_pretrained(folder, state_dict=state)
        for file in sorted(base_model.iterdir()):  # training does not change the configuration
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(file, folder / file.name)
        record.write(folder)

    return PreparedModel(
        model,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        sum(parameter.numel() for parameter in model.parameters()),
        save,
        autocast=dtype if dtype != torch.float32 else None,
    )


def _head(
    record: AdapterInfo,
    options: feature_extraction.Options,
    base_model: Path,
    device: torch.device,
    dtype: torch.dtype,
    categories: Sequence[str],
    weights: bool,
) -> PreparedModel:
    labels = sorted(set(categories))
    if len(labels) < 2:
        raise InputError(
            f"feature_extraction needs at least 2 categories, the training split has {len(labels)}",
            "use sources with a `category`, or another method",
        )
    base = load_base(base_model, device, dtype, record.quantization, weights=weights)
    classifier = feature_extraction.Classifier(base, labels, options)

    def save(folder: Path) -> None:
        classifier.save(folder)
        record.write(folder)

    trainable = sum(parameter.numel() for parameter in classifier.parameters())
    total = trainable + base.num_parameters()
    return PreparedModel(classifier, trainable, total, save, packs=False, fit=classifier.fit)


class _AdaptiveRanks:
    """The parts of AdaLoRA that a Trainer does not do: ranks by importance, and the penalty on P and Q."""

    def __init__(self, model: Any) -> None:
        self.model, self.tuner = model, model.base_model
        self.config, self.allocator = model.peft_config["default"], model.base_model.rankallocator

    def callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        tuner = self.tuner

        class Ranks(TrainerCallback):
            def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                """Update the ranks. Gradients still exist here, and global_step does not yet include this step."""
                strict = torch.get_deterministic_debug_mode()
                # kthvalue's index is nondeterministic on GPUs; only its value is used
                torch.set_deterministic_debug_mode("default")
                try:
                    tuner.update_and_allocate(state.global_step + 1)
                finally:
                    torch.set_deterministic_debug_mode(strict)

        return Ranks()

    def orthogonality(self, _: Any) -> torch.Tensor:
        """The penalty that keeps P and Q orthogonal, as PEFT's own forward adds it (arXiv 2303.10512, eq. 4).

        It is orth_reg_weight times the mean Frobenius norm of (P^T P - I) and (Q Q^T - I).
        """
        import torch

        terms = []
        for name, weight in self.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = weight @ weight.T if ".lora_A." in name else weight.T @ weight
                identity = torch.eye(len(product), device=product.device, dtype=product.dtype)
                terms.append(torch.linalg.norm(product - identity))
        return self.config.orth_reg_weight * torch.stack(terms).mean()

    def synchronize(self) -> None:
        """Set the ranks to save to those of the current weights.

        PEFT updates them only when it removes ranks. In between ranks grow again, and a checkpoint may have restored
        earlier weights.
        """
        weights, names = dict(self.tuner.model.named_parameters()), self.config.rank_pattern or {}
        self.config.rank_pattern = {name: (weights[name] != 0).flatten().tolist() for name in names} or None

    def state(self) -> dict[str, torch.Tensor]:
        """Smoothed importances, their uncertainties, and the remaining ranks, by name of the weight."""
        import torch

        kept = {"sensitivity": self.allocator.exp_avg_ipt, "uncertainty": self.allocator.exp_avg_unc}
        tensors = {f"{kind}:{name}": value for kind, values in kept.items() for name, value in values.items()}
        ranks = self.config.rank_pattern or {}
        return tensors | {f"ranks:{name}": torch.tensor(mask) for name, mask in ranks.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        import torch

        def of(kind: str) -> dict[str, torch.Tensor]:
            names = [name for name in state if name.startswith(f"{kind}:")]
            return {name.removeprefix(f"{kind}:"): state[name] for name in names}

        self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc = of("sensitivity"), of("uncertainty")
        self.allocator.ipt = {name: torch.zeros_like(value) for name, value in of("sensitivity").items()}
        self.config.rank_pattern = {name: mask.tolist() for name, mask in of("ranks").items()} or None


def save_adapter(model: Any, folder: Path, base_model: str) -> None:
    """Save adapter weights and configuration reproducibly.

    PEFT writes sets in hash order and the base model's absolute path, which differ between runs.
    """
    was_training = model.training
    model.eval()  # PEFT computes the virtual tokens while saving, which must not apply dropout
    model.save_pretrained(folder, safe_serialization=True)
    model.train(was_training)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_model
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = base_model
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
