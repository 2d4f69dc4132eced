"""What adapter@X saved -> a model that can be asked: base and adapter together, or weights that stand alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section

if TYPE_CHECKING:
    import torch

RECORD = "method.json"


class AdapterInfo(Section):
    """How a folder of weights was tuned; beside the weights, in method.json."""

    method: str = "lora"
    quantization: Literal["none", "nf4"] = "none"
    """What the base model's weights were held in while the method trained against them."""
    merge: bool = True
    """Fold what was learnt into the base model's weights."""
    why_not: str = ""
    """Why not, where `merge` is false."""

    @classmethod
    def read(cls, folder: Path) -> AdapterInfo:
        """The record in a folder; the defaults where there is none."""
        path = folder / RECORD
        return cls.model_validate_json(path.read_text()) if path.is_file() else cls()

    def write(self, folder: Path) -> None:
        (folder / RECORD).write_text(self.model_dump_json(indent=2) + "\n")


def load_base(
    folder: Path, device: torch.device, dtype: torch.dtype, quantization: str = "none", attention: str = "sdpa", weights: bool = True
) -> Any:
    """The base model, its weights in `dtype`, or those of its linear layers in 4-bit NormalFloat (QLoRA, arXiv 2305.14314, section 3).

    nf4: blocks of 64 weights, their scales quantized too, products in bfloat16; what is not quantized in float32. The output layer is not quantized.

    Args:
        folder: of the model; without weights its config.json will do.
        weights: False: shapes and dtypes alone, on torch's meta device.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how: dict[str, Any] = {"attn_implementation": attention}
    stored: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, **how}
    if quantization == "none" and weights:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **stored).to(device)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    if weights:
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=dtype, device_map={"": device}, **stored)
    else:
        from transformers import AutoConfig

        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=dtype, **how)
        if quantization == "none":
            return base
        _quantize(base, nf4)
    from peft import prepare_model_for_kbit_training

    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # or the first evaluation on a CPU packs the weights in place for a kernel without a backward pass, and training goes on blindly
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _quantize(base: Any, how: Any) -> None:
    """What from_pretrained does with a quantization_config, for a model on the meta device."""
    import torch
    from bitsandbytes.functional import name2qmap
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    output = next(name for name, module in base.named_modules() if module is base.get_output_embeddings())
    replace_with_bnb_linear(base, [output], how)
    with torch.device("cpu"), patch.dict(name2qmap):  # tables are kept there for later models, who need their values
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.weight = module.weight._quantize("meta")
    base.is_loaded_in_4bit = True


def load(folder: Path, base_model: Path | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A model as evaluation asks it: `model(ids)`, `model.base_model(...)`, `model.get_output_embeddings()`.

    Args:
        folder: weights that stand alone, or an adapter as PEFT writes it.
        base_model: what an adapter stands on.
    Raises:
        InputError: an adapter, and no base model.
    """
    if not (folder / "adapter_config.json").is_file():
        return load_base(folder, device, dtype).eval()
    if base_model is None:
        raise InputError(f"{folder.name} is an adapter that was not merged, and no base model was named for it", "name the base model")
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base_model, device, dtype, AdapterInfo.read(folder).quantization), folder).eval()
    return Prompted(model) if model.active_peft_config.is_prompt_learning else model.get_base_model()


def hidden_states(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states behind virtual tokens, (batch, tokens, size): one for each of `input_ids` and none for a virtual token.

    Prefix tuning puts learnt keys and values before those of the tokens in every layer (arXiv 2101.00190, section 4.1); prompt tuning and p-tuning
    put learnt embeddings before those of the tokens (arXiv 2104.08691, 2103.10385).

    Args:
        model: a PeftModel of a method that learns virtual tokens.
        attention_mask: 0 where `input_ids` is padding, which stands on the right.
    """
    import torch

    causal, virtual, batch = model.get_base_model(), model.active_peft_config.num_virtual_tokens, len(input_ids)
    mask = torch.cat((attention_mask.new_ones(batch, virtual), attention_mask), 1)
    learnt = model.get_prompt(batch)
    if not isinstance(learnt, torch.Tensor):
        return causal.base_model(input_ids=input_ids, attention_mask=mask, cache=learnt, use_cache=False).last_hidden_state
    words = causal.get_input_embeddings()(input_ids)
    rows = torch.cat((learnt.to(words.dtype), words), 1)
    return causal.base_model(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state[:, virtual:]


class Prompted:
    """A model behind learnt virtual tokens, asked as if there were none.

    What they do to later tokens lies in their keys and values: computed once, these are what every cache begins with.
    """

    def __init__(self, model: Any) -> None:
        """Args:
        model: a PeftModel of a method that learns virtual tokens, in evaluation mode.
        """
        import torch

        self.causal = model.get_base_model()
        self.config, self.device, self.virtual = self.causal.config, self.causal.device, model.active_peft_config.num_virtual_tokens
        with torch.inference_mode():
            learnt = model.get_prompt(1)
            if isinstance(learnt, torch.Tensor):
                rows = learnt.to(self.causal.get_input_embeddings().weight.dtype)
                learnt = self.causal.base_model(inputs_embeds=rows, use_cache=True).cache
        self._learnt = learnt

    def behind(self, batch: int) -> Any:
        """A cache of `batch` rows that holds the virtual tokens."""
        cache = copy.deepcopy(self._learnt)
        cache.batch_repeat_interleave(batch)
        return cache

    def _seen(self, mask: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat((mask.new_ones(len(mask), self.virtual), mask), 1)

    def get_output_embeddings(self) -> Any:
        return self.causal.get_output_embeddings()

    def base_model(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        return self.causal.base_model(
            input_ids=input_ids, attention_mask=self._seen(attention_mask), cache=self.behind(len(input_ids)), use_cache=use_cache
        )

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """Logits of `input_ids` (batch, tokens)."""
        return self.causal(input_ids, use_cache=use_cache, cache=self.behind(len(input_ids)))
