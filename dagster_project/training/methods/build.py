"""Which parameters learn: PEFT's own table of methods with its own keys, short names for what people ask for, and what is no adapter.

| method | learns | our defaults (a key in params.yaml wins) |
| --- | --- | --- |
| lora, rslora, dora | W + s BA; s is alpha/r, for rslora alpha/sqrt(r); dora: direction and magnitude apart | r 16, lora_alpha 32, lora_dropout 0.05, bias none, the attention's q, k, v, o |
| qlora, qdora | the same against a base model in 4-bit NormalFloat | the same, on all linear layers |
| adalora | P Lambda Q whose ranks move to where they matter | target_r 16 from init_r 24 (1.5 times), lora_alpha 32, q, k, v, o; ranks fall between a tenth and a half of the steps |
| prefix_tuning, prompt_tuning, p_tuning | virtual tokens | num_virtual_tokens 20; prompt_tuning starts from words of the vocabulary |
| ia3, ln_tuning (layernorm) and the rest of PEFT's table | see PEFT | PEFT's |
| full | every weight, or those whose name a regular expression of `trainable` finds | all |
| bitfit | every bias | all |
| feature_extraction | a linear layer on the frozen model, reading `category` | see training/methods/feature_extraction.py |

Sources: LoRA arXiv 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, QLoRA 2305.14314, AdaLoRA 2303.10512, IA3 2205.05638, BitFit 2106.10199, layer norms 2312.11420.
Rank 16 with alpha twice the rank and dropout 0.05 is what practice has settled on for models of this size; QLoRA's section 4 asks for adapters on all linear layers.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section, parse
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.attention import attention_for
from dagster_project.training.methods.load import AdapterInfo, hidden_states, load_base

if TYPE_CHECKING:
    import torch

Quantization = Literal["none", "nf4"]

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}

SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "qlora": ("lora", {"target_modules": "all-linear"}),
    "qdora": ("lora", {"target_modules": "all-linear", "use_dora": True}),
    "layernorm": ("ln_tuning", {}),
}
"""Name people ask for -> PEFT's method, and the keys it stands for."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "adalora": {"init_r": 24, "target_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "prefix_tuning": {"num_virtual_tokens": 20},
    "prompt_tuning": {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "p_tuning": {"num_virtual_tokens": 20},
    "cartridge": {"num_virtual_tokens": 20},
}

IMPLIES_NF4 = ("qlora", "qdora")

VIRTUAL = "learns virtual tokens, which no weight of the base model can hold"

CANNOT_MERGE = {
    "prefix_tuning": VIRTUAL,
    "prompt_tuning": VIRTUAL,
    "p_tuning": VIRTUAL,
    "cartridge": VIRTUAL,
    "feature_extraction": "learns a layer of its own, and leaves the base model as it is",
    "adaption_prompt": "learns prompts inside the attention, which no weight of the base model can hold",
    "beft": "learns biases for layers that may have none",
}
"""Method -> why no stand-alone model can be made of it."""

CANNOT_CHECKPOINT = ("prefix_tuning", "cartridge")
"""Methods that live in the cache, which gradient checkpointing switches off."""

CANNOT_MERGE_QUANTIZED = ("ia3", "adalora")

CANNOT_QUANTIZE = ("full", "bitfit", "adamss", "deft", "delora", "frod", "glora", "hira", "hra", "loha", "lokr", "osf", "peanut", "psoft",
                   "supertuning", "tinylora", "unilora")  # fmt: skip
"""Methods that calculate with the base model's own weights. In PEFT most then fail on 4-bit weights; hira does nothing in evaluation, unilora nothing at all."""

NOT_HERE = {
    "xlora": "mixes adapters that were trained before; one entry trains one adapter",
    "poly": "needs a task number for each example",
    "multitask_prompt_tuning": "needs a task number for each example",
    "lily": "weighs its matrices by a mean over the whole row, padding and neighbours included",
    "cpt": "learns from worked examples given as token ids, with a loss of its own",
    "shadow": "trains a second model beside the base model, with a loss of its own",
}
"""Methods of PEFT's table that this street does not train -> why."""

NOT_OURS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
            "runtime_config", "total_step", "tokenizer_name_or_path"}  # fmt: skip
"""Keys of PEFT that are set here, or that belong to loading."""

NOT_SAFE = {
    "tokenizer_kwargs": "could load code",
    "prompt_tuning_init_state_dict_path": "would unpickle a file",
    "megatron_config": "would import a module by name",
    "megatron_core": "would import a module by name",
    "eva_config": "needs a pass over the data before training",
    "corda_config": "needs a pass over the data before training",
    "lora_ga_config": "needs a pass over the data before training",
    "alora_invocation_tokens": "needs a place in each prompt from which on it works",
    "arrow_config": "mixes adapters that were trained before",
    "use_bdlora": "is for serving on many GPUs",
}
"""Keys of PEFT that are refused -> why."""

LEAST = {"r": 1, "init_r": 2, "target_r": 1, "num_virtual_tokens": 1, "lora_alpha": 1, "deltaT": 1, "tinit": 0, "tfinal": 0,
         "lora_dropout": 0, "orth_reg_weight": 0}  # fmt: skip
"""Key -> its least value."""

CHANGES_THE_BASE = re.compile(r"pissa|olora|corda|loftq|eva|lora_ga|orthogonal", re.IGNORECASE)
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
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class Bitfit(Section):
    """Keys of `bitfit`: none."""


OWN: dict[str, type[Section]] = {"full": Full, "bitfit": Bitfit, "feature_extraction": feature_extraction.Options}
"""Methods that are not PEFT's -> their keys."""


# ---- what can be known from params.yaml alone -------------------------------------------------------------------------------------------


@cache
def _source(file: str) -> dict[str, ast.ClassDef]:
    """The classes that a file of PEFT defines. Read, not imported: importing PEFT takes seconds, and this is asked at every command."""
    spec = find_spec("peft")
    assert spec is not None and spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def peft_methods() -> dict[str, tuple[str, str]]:
    """PEFT's table of methods: name -> (its configuration class, the file of that class)."""
    spec = find_spec("peft")
    assert spec is not None and spec.submodule_search_locations
    found = {}
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("tuners/*/__init__.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id == "register_peft_method":
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                name, config = given["name"], given["config_cls"]
                assert isinstance(name, ast.Constant) and isinstance(config, ast.Name)
                found[str(name.value)] = (config.id, f"tuners/{path.parent.name}/config.py")
    return found


@cache
def peft_keys(method: str) -> dict[str, ast.expr]:
    """The keys of one of PEFT's methods -> their annotated type."""
    name, file = peft_methods()[method]
    shared = {**_source("config.py"), **_source("tuners/lycoris_utils.py"), **_source("tuners/lora/config.py")}

    def fields(of: str) -> dict[str, ast.expr]:
        node = _source(file).get(of) or shared.get(of)
        if node is None:
            return {}
        found = {key: kind for base in node.bases if isinstance(base, ast.Name) for key, kind in fields(base.id).items()}
        return found | {n.target.id: n.annotation for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}

    return {key: kind for key, kind in fields(name).items() if key not in NOT_OURS | NOT_SAFE.keys()}


def _fits(value: Any, kind: ast.expr) -> bool:
    """Is a value of the annotated type? What is neither plain nor a choice between plain types is left to PEFT."""
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
            return any(_fits(value, one) for one in kinds)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            allowed = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return any(isinstance(one, ast.Constant) and type(one.value) is type(value) and one.value == value for one in allowed)
        case ast.Subscript(value=ast.Name(id="dict" | "list" as name)):
            return isinstance(value, dict if name == "dict" else list)
    return True


def methods() -> list[str]:
    """Every name of `method` that is trained here."""
    return sorted({*peft_methods(), *SHORT, *OWN} - NOT_HERE.keys())


def check(
    method: str,
    options: Mapping[str, Any],
    quantization: Quantization | None,
    merge: bool,
    where: str,
    gradient_checkpointing: bool = False,
) -> None:
    """Refuse what can be known to be wrong from params.yaml alone. Takes milliseconds: PEFT's table and keys are read from its source.

    Args:
        method: in any case.
        options: the entry's `peft`.
        quantization: None: what the method implies.
        where: dotted place of the entry, e.g. "adapter.lora".
    Raises:
        InputError: unknown method; unknown keys, all at once; a value of the wrong type or out of range; quantization that the method cannot
            train against, or contradicts; a merge that cannot be; gradient checkpointing with prefix tuning.
    """
    name, keys = _resolve(method, where)
    _check_keys(name, keys, options, where)
    if method.lower() in IMPLIES_NF4 and quantization == "none":
        raise InputError(f"params.yaml: {where}.quantization: {method} is training against 4-bit weights", "use nf4, or method: lora")
    quantized = quantization_of(method, quantization) == "nf4"
    if quantized and name in CANNOT_QUANTIZE:
        raise InputError(
            f"params.yaml: {where}.quantization: {method} calculates with the base model's weights, and 4-bit weights are no numbers",
            "set quantization: none, or use a method that adds to what they give, such as qlora",
        )
    start = keys.get("init_lora_weights", True)
    if quantized and isinstance(start, str) and CHANGES_THE_BASE.search(start):
        raise InputError(
            f"params.yaml: {where}.peft.init_lora_weights: {start} starts from the base model's weights, which are not what 4 bits hold",
            "set quantization: none, or leave it out",
        )
    if merge and (why := why_not_merged(method, keys, quantization)):
        raise InputError(
            f"params.yaml: {where}.merge: {method} {why}", f"set merge: false in {where}; evaluation then loads base and adapter"
        )
    if gradient_checkpointing and name in CANNOT_CHECKPOINT:
        raise InputError(
            f"params.yaml: {where}.gradient_checkpointing: {method} lives in the cache, which checkpointing switches off",
            "set gradient_checkpointing: false",
        )


def quantization_of(method: str, quantization: Quantization | None) -> Quantization:
    return quantization or ("nf4" if method.lower() in IMPLIES_NF4 else "none")


def why_not_merged(method: str, options: Mapping[str, Any], quantization: Quantization | None) -> str:
    """Why the method cannot become a stand-alone model, as the end of a sentence; empty where it can."""
    name = SHORT.get(method.lower(), (method.lower(), {}))[0]
    if name in CANNOT_MERGE:
        return f"cannot be merged: it {CANNOT_MERGE[name]}"
    if name in CANNOT_MERGE_QUANTIZED and quantization_of(method, quantization) == "nf4":
        return "cannot be merged once trained against quantized weights: it scales what they give"
    if options.get("layer_replication"):
        return "with layer_replication cannot be merged: one weight stands for several layers"
    return ""


def _resolve(method: str, where: str) -> tuple[str, dict[str, Any]]:
    """PEFT's (or our own) name of a method and the keys its name stands for."""
    name, keys = SHORT.get(method.lower(), (method.lower(), {}))
    if name in NOT_HERE:
        raise InputError(f"params.yaml: {where}.method: {name} {NOT_HERE[name]}", f"methods: {', '.join(methods())}")
    if name not in methods():
        near = difflib.get_close_matches(name, methods(), 3, 0.6)
        raise InputError(
            f"params.yaml: {where}.method: unknown method {method!r}",
            f"methods: {', '.join(methods())}" + (f"; nearest: {' or '.join(near)}" if near else ""),
        )
    return name, dict(keys)


def _check_keys(name: str, keys: dict[str, Any], options: Mapping[str, Any], where: str) -> None:
    """Check the options of a method and add them to `keys`, which the method's name stands for."""
    if name in OWN:
        parse(OWN[name], dict(options), f"{where}.peft")
        keys.update(options)
        return
    known, wrong, hints = peft_keys(name), [], []
    for key, value in sorted(options.items()):
        place = f"params.yaml: {where}.peft.{key}"
        if key in NOT_SAFE:
            wrong.append(f"{place}: is not supported: it {NOT_SAFE[key]}")
        elif key not in known:
            wrong.append(f"{place}: unknown key of {name}")
            hints.append(f"keys of {name}: {', '.join(sorted(known))}")
        elif not _fits(value, known[key]):
            wrong.append(f"{place}: must be {ast.unparse(known[key])} (got {value!r})")
        elif key in LEAST and isinstance(value, int | float) and value < LEAST[key]:
            wrong.append(f"{place}: must be at least {LEAST[key]} (got {value!r})")
        elif key == "lora_dropout" and isinstance(value, int | float) and value >= 1:
            wrong.append(f"{place}: must be below 1 (got {value!r})")
        elif key in keys and key.startswith("use_") and value != keys[key]:
            wrong.append(f"{place}: {value!r} is another method than the one named")
            hints.append(f"use method: {name}")
    keys.update(options)
    if isinstance(keys.get("target_modules"), str) and keys.get("layers_to_transform") is not None:
        wrong.append(f"params.yaml: {where}.peft.layers_to_transform: goes with a list of target_modules only")
        hints.append("list the names of the modules")
    ranks = DEFAULTS["adalora"] | keys
    if (
        name == "adalora"
        and isinstance(ranks["init_r"], int)
        and isinstance(ranks["target_r"], int)
        and ranks["init_r"] <= ranks["target_r"]
    ):
        wrong.append(
            f"params.yaml: {where}.peft.init_r: must be above target_r, so that there are ranks to take away (got {ranks['init_r']!r})"
        )
    if wrong:
        raise InputError("\n".join(wrong), "; ".join(dict.fromkeys(hints)) or "correct the values named")


# ---- building ---------------------------------------------------------------------------------------------------------------------------


def causal(model: Any) -> Any:
    """The language model inside a PeftModel; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def peft_config(
    method: str, options: Mapping[str, Any], where: str, base: Any = None, total_steps: int | None = None, tokenizer: str | None = None
) -> Any:
    """The PEFT configuration of a method: what its name stands for, our defaults, and the options, which win.

    Args:
        method: a name of PEFT's table or a short name, in any case, e.g. "lora".
        options: its keys as PEFT names them, e.g. {"r": 16, "lora_alpha": 32}.
        where: dotted place in params.yaml, for messages.
        base: the model, where target_modules are to be found by its architecture.
        total_steps: optimizer steps; adalora plans by them.
        tokenizer: folder of the tokenizer; prompt_tuning reads words by it.
    Raises:
        InputError: unknown method or key, or a value PEFT refuses.
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
        raise InputError(f"params.yaml: {where}.peft: {error}", "correct the values named") from None


def _attention(base: Any) -> list[str] | None:
    """The attention's q, k, v, o where the architecture names them so; None: PEFT's own choice."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    return [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in names] or None


def _norms(base: Any) -> list[str] | None:
    """Every normalization layer, by its last name."""
    return sorted({name.rpartition(".")[2] for name, module in base.named_modules() if type(module).__name__.endswith("Norm")}) or None


def _nothing(_: Any) -> None:
    return None


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to learn, and what the rest of the street must know about how it does."""

    model: Any
    """A PeftModel, the base model itself where its own weights learn, or a classifier on top of it."""
    trainable: int
    """Parameters that learn."""
    total: int
    save: Callable[[Path], None]
    """Write what was learnt into a folder, as safetensors, with a record of how (method.json). Changes nothing of the model."""
    packs: bool = True
    """Rows may hold several examples. False (virtual tokens stand in front of each example): collate with `collate_padded`."""
    callbacks: list[Any] = field(default_factory=list)
    """transformers' TrainerCallbacks that the method lives by."""
    extra_loss: Callable[[Any], torch.Tensor | None] = _nothing
    """model -> a term to add to the loss of each forward pass in training."""
    optim: str | None = None
    """transformers' name of the optimizer to use whatever the recipe names."""
    autocast: torch.dtype | None = None
    """Weights that learn are float32; compute in this instead."""
    fit: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], list[dict[str, float]]] | None = None
    """(train rows, validation rows) -> the curve, for what is not trained by optimizer steps. Rows need `categories`."""
    state: Callable[[], dict[str, torch.Tensor]] = dict
    """What the method remembers beside weights, as a checkpoint must keep it."""
    restore: Callable[[dict[str, torch.Tensor]], None] = _nothing
    """Take up what `state` gave."""

    @property
    def attention(self) -> str:
        """Which one computes, as transformers names it or `attention_for` does."""
        base = self.model.base if self.fit else self.model  # a classifier is no transformers model itself
        return str(base.config._attn_implementation)

    def hidden_states(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The last hidden states of a batch, (rows, tokens, size), in the dtype of the output layer: one for each of its input_ids, whatever the
        method puts before them.

        Labels are those of `inputs`, next tokens as ever: hidden_states[:, :-1] predicts labels[:, 1:].

        Args:
            inputs: as `collate_packed` makes it, or `collate_padded` where `packs` is False.
        """
        import torch

        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not self.packs:
            found = hidden_states(self.model, inputs["input_ids"], inputs["attention_mask"])
        else:
            with torch.autocast(inputs["input_ids"].device.type, dtype=self.autocast, enabled=self.autocast is not None):
                found = causal.base_model(
                    input_ids=inputs["input_ids"],
                    position_ids=inputs["position_ids"],
                    cu_seq_lens_q=inputs["cu_seq_lens_q"],
                    max_length_q=inputs["max_length_q"],
                    use_cache=False,
                ).last_hidden_state
        return found.to(causal.get_output_embeddings().weight.dtype)


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
    """Load the base model and put the method on it.

    Args:
        method, options, quantization, merge: as the variant's entry has them.
        total_steps: optimizer steps of the run; adalora needs them.
        categories: the classes of feature_extraction.
        weights: False: all on torch's meta device, as training on `device` would have it; the base model's configuration will do.
        packs: False: rows will be padded, as generation and TRL's trainers of preferences have them.
        named: what the adapter's configuration calls the base model.
    Raises:
        InputError: `check` refuses, PEFT refuses the keys for this model, or nothing would learn.
    """
    import torch

    check(method, options, quantization, merge, where)
    held = quantization_of(method, quantization)
    reason = why_not_merged(method, options, quantization)
    record = AdapterInfo(
        method=method.lower(), quantization=held, merge=merge, why_not="" if merge else reason or "params.yaml says merge: false"
    )
    optim = "paged_adamw_8bit" if held == "nf4" and device.type == "cuda" else None
    name, _ = _resolve(method, where)
    if name == "feature_extraction":
        return _head(
            record, parse(feature_extraction.Options, dict(options), f"{where}.peft"), base_model, device, dtype, categories, weights
        )
    if name in {"full", "bitfit"}:
        patterns = [r"\bbias$"] if name == "bitfit" else parse(Full, dict(options), f"{where}.peft").trainable
        return _weights(record, patterns, base_model, device, dtype, where, weights)

    from peft import get_peft_model

    from dagster_project.training.methods.fused_lora import fuse

    virtual = CANNOT_MERGE.get(name) == VIRTUAL
    attention = attention_for(device, dtype if weights else None) if packs and not virtual else "sdpa"
    base = load_base(base_model, device, dtype, held, attention, weights)
    config = peft_config(method, options, where, base, total_steps, str(base_model))
    try:
        model = get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) and not weights:  # of the meta device, not of the keys
            raise
        raise InputError(f"params.yaml: {where}.peft: {error}", "correct the keys named") from None
    for parameter_name, parameter in model.named_parameters():
        if ".ranknum." in parameter_name:  # a count; on quantized layers PEFT lets it learn, and never saves it
            parameter.requires_grad_(False)
    trainable, total = model.get_nb_trainable_parameters()
    if not trainable:
        raise InputError(f"params.yaml: {where}: {method} leaves no parameter to train in this model", "choose other target_modules")
    # a step smaller than 1/256 of a bfloat16 weight is lost: what learns is float32
    low = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dtype != torch.float32]
    for parameter in low:
        parameter.data = parameter.data.float()
    fuse(model)

    ranks = _AdaptiveRanks(model) if name == "adalora" else None

    def save(folder: Path) -> None:
        if ranks:
            ranks.settle()
        save_adapter(model, folder, base_model=named)
        record.write(folder)

    return PreparedModel(
        model,
        trainable,
        total,
        save,
        packs=packs and not virtual,
        callbacks=[ranks.callback()] if ranks else [],
        extra_loss=ranks.orthogonality if ranks else _nothing,
        optim=optim,
        autocast=dtype if low else None,
        state=ranks.state if ranks else dict,
        restore=ranks.restore if ranks else _nothing,
    )


def _weights(
    record: AdapterInfo, patterns: Sequence[str], base_model: Path, device: torch.device, dtype: torch.dtype, where: str, weights: bool
) -> PreparedModel:
    """The base model's own weights learn: all, or those that a pattern finds. In float32, computing in `dtype`; stored as the base model is."""
    import torch
    from transformers import AutoConfig

    model = load_base(base_model, device, torch.float32, attention=attention_for(device, dtype if weights else None), weights=weights)
    stored = AutoConfig.from_pretrained(base_model, trust_remote_code=False).dtype or torch.float32
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied weights have several names
        names.setdefault(id(parameter), []).append(name)
    for pattern in patterns:
        if not any(re.search(pattern, name) for found in names.values() for name in found):
            raise InputError(
                *(
                    (f"params.yaml: {where}.method: bitfit trains biases, and this model has none", "use method: layernorm")
                    if record.method == "bitfit"
                    else (f"params.yaml: {where}.peft.trainable: {pattern!r} finds no weight", "weights are named as in model.safetensors")
                )
            )
    for parameter in model.parameters():
        parameter.requires_grad_(not patterns or any(re.search(pattern, name) for pattern in patterns for name in names[id(parameter)]))

    def save(folder: Path) -> None:
        state = {name: value.to(stored) if value.is_floating_point() else value for name, value in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state)
        for file in sorted(base_model.iterdir()):  # tuning changes no configuration
            if not file.name.endswith((".safetensors", ".safetensors.index.json")):
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
            f"feature_extraction learns the category of a prompt, and the training split has {len(labels)} of them",
            "use sources with a `category`, or another method",
        )
    base = load_base(base_model, device, dtype, record.quantization, weights=weights)
    classifier = feature_extraction.Classifier(base, labels, options)

    def save(folder: Path) -> None:
        classifier.save(folder)
        record.write(folder)

    trainable = sum(parameter.numel() for parameter in classifier.parameters())
    return PreparedModel(classifier, trainable, trainable + base.num_parameters(), save, packs=False, fit=classifier.fit)


class _AdaptiveRanks:
    """What AdaLoRA does beside learning, and no Trainer does for it: taking ranks away by importance, and keeping P and Q orthogonal."""

    def __init__(self, model: Any) -> None:
        self.model, self.tuner = model, model.base_model
        self.config, self.allocator = model.peft_config["default"], model.base_model.rankallocator

    def callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        tuner = self.tuner

        class Ranks(TrainerCallback):
            def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                """Gradients are still there, and the step is not counted yet."""
                strict = torch.are_deterministic_algorithms_enabled()
                torch.use_deterministic_algorithms(False)  # kthvalue is refused on GPUs for its index; only its value is used
                try:
                    tuner.update_and_allocate(state.global_step + 1)
                finally:
                    torch.use_deterministic_algorithms(strict)

        return Ranks()

    def orthogonality(self, _: Any) -> torch.Tensor:
        """orth_reg_weight times the mean Frobenius norm of (P^T P - I) and (Q Q^T - I), as PEFT's own forward adds it (arXiv 2303.10512, eq. 4)."""
        import torch

        terms = []
        for name, weight in self.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = weight @ weight.T if ".lora_A." in name else weight.T @ weight
                terms.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device, dtype=product.dtype)))
        return self.config.orth_reg_weight * torch.stack(terms).mean()

    def settle(self) -> None:
        """Let the ranks that are left be those of the weights as they are. PEFT notes them at each cut, and stores no others: but between two
        cuts they grow again, and the weights may be those of an earlier step."""
        weights = dict(self.tuner.model.named_parameters())
        self.config.rank_pattern = {name: (weights[name] != 0).flatten().tolist() for name in self.config.rank_pattern or {}} or None

    def state(self) -> dict[str, torch.Tensor]:
        """Smoothed importances and their uncertainties, and which ranks are left; all by the name of the weight."""
        import torch

        kept = {"sensitivity": self.allocator.exp_avg_ipt, "uncertainty": self.allocator.exp_avg_unc}
        found = {f"{kind}:{name}": value for kind, values in kept.items() for name, value in values.items()}
        return found | {f"ranks:{name}": torch.tensor(mask) for name, mask in (self.config.rank_pattern or {}).items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        import torch

        def of(kind: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(f"{kind}:"): value for name, value in state.items() if name.startswith(f"{kind}:")}

        self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc = of("sensitivity"), of("uncertainty")
        self.allocator.ipt = {name: torch.zeros_like(value) for name, value in of("sensitivity").items()}
        self.config.rank_pattern = {name: mask.tolist() for name, mask in of("ranks").items()} or None


def save_adapter(model: Any, folder: Path, base_model: str) -> None:
    """Adapter weights and configuration, the same bytes for the same weights.

    PEFT writes sets in hash order and the base model's absolute path; both would differ from run to run.
    """
    learning = model.training
    model.eval()  # PEFT computes the virtual tokens that it saves: without dropout
    model.save_pretrained(folder, safe_serialization=True)
    model.train(learning)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_model
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = base_model
    config = {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value for key, value in config.items()
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
