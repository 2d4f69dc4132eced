"""A base model with a fine-tuning method applied, ready for training; and an adapter as files."""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.training.methods import feature_extraction
from dagster_project.training.methods.adaptive_ranks import AdaptiveRanks
from dagster_project.training.methods.attention import attention_for, attention_of
from dagster_project.training.methods.hardware import adding_adapters
from dagster_project.training.methods.load import AdapterInfo, hidden_states, load_base, stored_dtypes
from dagster_project.training.methods.options import (
    CANNOT_MERGE,
    DEFAULTS,
    VIRTUAL,
    Full,
    Quantization,
    add_checked,
    check,
    place_of,
    quantization_of,
    resolve,
    why_not_merged,
)

if TYPE_CHECKING:
    import torch


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

    name, keys = resolve(method, where)
    add_checked(name, keys, options, where)
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
    name, _ = resolve(method, where)
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

    name, _ = resolve(record.method, where)
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

    ranks = AdaptiveRanks(model) if name == "adalora" else None

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
