"""Loading models: a base model, a base model with an adapter, or standalone weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section
from dagster_project.core.versions import require_version
from dagster_project.training.methods.hardware import adding_adapters
from dagster_project.training.methods.logits import refuse_other_logits

if TYPE_CHECKING:
    import torch

RECORD = "method.json"
INDEX = "model.safetensors.index.json"


class AdapterInfo(Section):
    """How a folder of weights was trained; stored next to the weights, in method.json."""

    method: str = "lora"
    quantization: Literal["none", "nf4"] = "none"
    """Quantization of the base model's weights during training."""
    merge: bool = True
    """Whether the trained weights are merged into the base model's."""
    why_not: str = ""
    """The reason if `merge` is false."""

    @classmethod
    def read(cls, folder: Path) -> AdapterInfo:
        """Read method.json of a folder; the defaults if there is none."""
        path = folder / RECORD
        return cls.model_validate_json(path.read_text()) if path.is_file() else cls()

    def write(self, folder: Path) -> None:
        (folder / RECORD).write_text(self.model_dump_json(indent=2) + "\n")


def refuse_pickled_weights(folder: Path) -> None:
    """Check that only safetensors are read.

    `use_safetensors=True` is not enough: transformers opens whatever files an index names, and PEFT adapter_model.bin
    if there is nothing else.

    Raises:
        InputError: weights of the folder would be unpickled.
    """
    if (folder / "adapter_config.json").is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            raise InputError(
                f"{folder}: no adapter_model.safetensors, and weights in other formats are not read",
                "save it as safetensors",
            )
    elif other := next((name for name in sorted(files_in_index(folder)) if not name.endswith(".safetensors")), None):
        raise InputError(
            f"{folder}: {INDEX} names {other[:200]!r}, and weights in other formats are not read",
            "save the model as safetensors",
        )


def files_in_index(folder: Path) -> set[str]:
    """Names of the files with weights in the index of a model; none without an index.

    Raises:
        InputError: it is not an index.
    """
    if not (folder / INDEX).is_file():
        return set()
    try:
        return {str(name) for name in json.loads((folder / INDEX).read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{folder}: {INDEX} is not an index of weights", "save the model again") from None


def load_tokenizer(folder: Path, templates: Path) -> Any:
    """The tokenizer of a model, with the chat template of another folder if that has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for template in templates.glob("chat_template.jinja"):
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def load_base(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
    attention: str = "sdpa",
    weights: bool = True,
) -> Any:
    """Load a base model in `dtype`, or with linear layers in 4-bit NormalFloat (QLoRA, arXiv 2305.14314, section 3).

    nf4: blocks of 64 weights, double quantization, products in bfloat16; the output layer and other weights are
    float32.

    Args:
        folder: folder of the model; with `weights` False its config.json is sufficient.
        weights: False: only shapes and dtypes, on torch's meta device.
    Raises:
        InputError: transformers does not have this attention for the model, its logits are computed in another way, its
            weights are pickled, or its own configuration quantizes them.
    """
    if weights:
        refuse_pickled_weights(folder)
    try:
        with refusing_attention(folder):
            base = _load_base(folder, device, dtype, quantization, attention, weights)
    except KeyError as error:  # of Falcon and GPT-Neo, which list the names of attention that they know
        if error.args != (attention,):
            raise
        problem = "the attention of this model cannot be replaced in transformers, which training on packed rows needs"
        raise InputError(f"{folder}: {problem}", "use another model") from None
    if weights:
        is_quantized = any(getattr(base, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
        if quantization == "none" and is_quantized:
            raise InputError(
                f"{folder}: config.json asks for weights that bitsandbytes quantizes, which is not supported",
                "use the model without quantization; `method: qlora` quantizes it for training",
            )
        refuse_other_logits(base, folder)
    return base


@contextmanager
def refusing_attention(folder: Path) -> Iterator[None]:
    """While open, the model of a folder can be loaded.

    Raises:
        InputError: transformers does not have the attention for the model.
    """
    try:
        yield
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        name, needed = str(error).split()[0], "attention by torch's scaled_dot_product_attention"
        raise InputError(
            f"{folder}: {name} has no {needed} in transformers, which is needed", "use another model"
        ) from None


def _load_base(
    folder: Path, device: torch.device, dtype: torch.dtype, quantization: str, attention: str, weights: bool
) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    kind: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    stored: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, **kind}
    if quantization == "none" and weights:
        return AutoModelForCausalLM.from_pretrained(folder, **stored).to(device)
    nf4 = nf4_config()
    if weights:
        where = {"": device}
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map=where, **stored)
    else:
        from transformers import AutoConfig

        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            base = AutoModelForCausalLM.from_config(config, **kind)
        if quantization == "none":
            return base
        _quantize(base, nf4)
    return frozen_4bit(base)


def nf4_config(skipped: Sequence[str] | None = None) -> Any:
    """transformers' configuration for weights in 4-bit NormalFloat.

    Args:
        skipped: names of linear layers that are not quantized; None: the output layer.
    """
    import torch
    from transformers import BitsAndBytesConfig

    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skipped)


def frozen_4bit(base: Any) -> Any:
    """A model with 4-bit weights, ready for an adapter: frozen, other weights in float32."""
    from peft import prepare_model_for_kbit_training

    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # otherwise the first evaluation on a CPU repacks the weights in place for a kernel without a backward pass
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _quantize(base: Any, config: Any) -> None:
    """Apply a quantization_config to a model on the meta device, as from_pretrained does to a real one."""
    import torch
    from bitsandbytes.functional import name2qmap
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    output = next(name for name, module in base.named_modules() if module is base.get_output_embeddings())
    replace_with_bnb_linear(base, [output], config)
    require_version("bitsandbytes", ">=0.50.2,<1", "Params4bit._quantize")
    # quantizing on the meta device adds tables without values, which later models could not use
    tables = dict(name2qmap)
    with torch.device("cpu"):
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.weight = module.weight._quantize("meta")
    name2qmap.clear()
    name2qmap.update(tables)
    base.is_loaded_in_4bit = True


def stored_dtypes(folder: Path) -> Callable[[str], torch.dtype]:
    """A function from the name of a weight to the number format in which the model of this folder stores it.

    That is the model's own, except for weights that transformers keeps in float32, such as routers of mixtures of
    experts.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32
    if dtype == torch.float32:
        return lambda _: torch.float32
    safe = {"use_safetensors": True, "trust_remote_code": False}
    empty = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="meta", **safe)
    found = {name: weight.dtype for name, weight in empty.state_dict().items() if weight.is_floating_point()}
    return lambda name: found.get(name, dtype)


def store_as(model: Any, folder: Path) -> Any:
    """Convert the weights of a model in place to the number formats of the model in a folder, and return it."""
    dtype_of = stored_dtypes(folder)
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype_of(name))
    return model


def load(folder: Path, base_model: Path | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model for evaluation, with `model(ids)`, `model.base_model(...)` and `model.get_output_embeddings()`.

    Args:
        folder: standalone weights, or an adapter in PEFT's format.
        base_model: base model of an adapter.
    Raises:
        InputError: an adapter without a base model, or weights that would be unpickled.
    """
    if not (folder / "adapter_config.json").is_file():
        return load_base(folder, device, dtype).eval()
    if base_model is None:
        problem = f"{folder.name} is an adapter that was not merged, and its base model is missing"
        raise InputError(problem, "give the base model")
    from peft import PeftModel

    refuse_pickled_weights(folder)
    base = load_base(base_model, device, dtype, AdapterInfo.read(folder).quantization)
    with adding_adapters():
        model = PeftModel.from_pretrained(base, folder).eval()
    return VirtualTokenModel(model) if model.active_peft_config.is_prompt_learning else model.get_base_model()


def hidden_states(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states of a model with virtual tokens.

    Prefix tuning prepends trained keys and values in every layer (arXiv 2101.00190, section 4.1); prompt tuning and
    p-tuning prepend trained embeddings (arXiv 2104.08691, 2103.10385).

    Args:
        model: PeftModel of a method with virtual tokens.
        input_ids: (batch, seq), int64.
        attention_mask: (batch, seq), 0 for padding, which is on the right.
    Returns:
        (batch, seq, hidden), without the virtual tokens.
    """
    import torch

    causal, virtual, batch = model.get_base_model(), model.active_peft_config.num_virtual_tokens, len(input_ids)
    mask = torch.cat((attention_mask.new_ones(batch, virtual), attention_mask), 1)
    trained = model.get_prompt(batch)
    if not isinstance(trained, torch.Tensor):
        read = {"input_ids": input_ids, "attention_mask": mask, "cache": trained}
        return causal.base_model(**read, use_cache=False).last_hidden_state
    words = causal.get_input_embeddings()(input_ids)
    rows = torch.cat((trained.to(words.dtype), words), 1)
    return causal.base_model(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state[:, virtual:]


class VirtualTokenModel:
    """A model with trained virtual tokens and the interface of a model without.

    Virtual tokens affect later tokens only through their keys and values, which are computed once and start every
    cache.
    """

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: PeftModel of a method with virtual tokens, in evaluation mode.
        """
        import torch

        self.causal = model.get_base_model()
        self.config = self.causal.config
        self.device = self.causal.device
        self.virtual = model.active_peft_config.num_virtual_tokens
        with torch.inference_mode():
            trained = model.get_prompt(1)
            if isinstance(trained, torch.Tensor):
                rows = trained.to(self.causal.get_input_embeddings().weight.dtype)
                trained = self.causal.base_model(inputs_embeds=rows, use_cache=True).cache
        self._trained = trained

    def new_cache(self, batch: int) -> Any:
        """A KV cache with `batch` rows that contains the virtual tokens."""
        cache = copy.deepcopy(self._trained)
        cache.batch_repeat_interleave(batch)
        return cache

    def get_output_embeddings(self) -> Any:
        return self.causal.get_output_embeddings()

    def base_model(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        import torch

        mask = torch.cat((attention_mask.new_ones(len(attention_mask), self.virtual), attention_mask), 1)
        cache = self.new_cache(len(input_ids))
        return self.causal.base_model(input_ids=input_ids, attention_mask=mask, cache=cache, use_cache=use_cache)

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """Logits (batch, seq, vocabulary) of `input_ids` (batch, seq)."""
        return self.causal(input_ids, use_cache=use_cache, cache=self.new_cache(len(input_ids)))
