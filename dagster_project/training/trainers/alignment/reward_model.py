"""One number for an answer: by a reward model trained on people's preferences, or by a rule.

A reward model is a language model whose output layer is a single number, read at the last token (Bradley-Terry model of
pairs: the probability that one answer is preferred is sigmoid of the difference of their rewards; Ouyang et al. 2022,
arXiv 2203.02155, section 3.5).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import encode_prompt
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message, Messages, Tools, conversation_text
from dagster_project.core.progress import Progress
from dagster_project.core.records import CheckResult, write_json
from dagster_project.core.rendering import end_tokens
from dagster_project.core.text import STRICT_JSON
from dagster_project.core.words import split_words
from dagster_project.training.methods.build import add_adapter, peft_config, refuse_unmatched, widen_trained
from dagster_project.training.methods.load import frozen_4bit, nf4_config, refusing_attention, store_as
from dagster_project.training.methods.options import Quantization
from dagster_project.training.tokens.collators import batches_by_length, pad
from dagster_project.training.tokens.preference_pairs import Answered, answered, reply
from dagster_project.training.trainers.alignment.trl_trainers import shared_prompts
from dagster_project.training.trainers.alignment.trl_trainers.training import TrainerSpec
from dagster_project.training.trainers.harness import distributed
from dagster_project.training.trainers.harness.params import Sharding
from dagster_project.training.trainers.harness.session import put
from dagster_project.training.trainers.harness.sharding import ShardedModel
from dagster_project.training.trainers.harness.weight_audit import trainable

if TYPE_CHECKING:
    import torch

MODEL = "reward_model"
QUALITY = "quality.json"
"""File in the folder of a reward model with its failed checks."""


def write_quality(folder: Path, checks: Sequence[CheckResult]) -> None:
    """List the failed checks of severity "error". The stage that uses the model decides whether they block."""
    failed = {check.name: check.note for check in checks if not check.passed and check.severity == "error"}
    write_json(folder / QUALITY, {"failed_checks": failed})


def failed_checks(folder: Path) -> dict[str, str]:
    """Failed checks of a reward model -> their notes. Empty if all passed."""
    if not (folder / QUALITY).is_file():
        return {"quality": f"{QUALITY} is missing: run `dvc repro reward_model`"}
    found: dict[str, str] = json.loads((folder / QUALITY).read_text(encoding="utf-8"))["failed_checks"]
    return found


FIGURES = {"accuracy": "accuracy", "margin": "margin", "mean_reward": "reward"}
"""Metric as TRL logs it -> its name in the curve."""


def trainer_spec(center_rewards_coefficient: float | None) -> TrainerSpec:
    """TRL's trainer of reward models.

    Args:
        center_rewards_coefficient: weight of the squared sum of a pair's rewards in the loss; None: none.
    """
    import trl

    options = {"max_length": None, "center_rewards_coefficient": center_rewards_coefficient}
    outputs = shared_prompts.rewards
    return TrainerSpec("reward model", trl.RewardTrainer, trl.RewardConfig, options, FIGURES, outputs=outputs)


def build(
    folder: Path,
    peft: Mapping[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    quantization: Quantization = "none",
) -> Any:
    """A language model with a new output layer `score` of one number, ready for training.

    Args:
        folder: a standalone model.
        peft: keys of LoRA; None: every weight is trained.
        quantization: of the frozen weights.
    Raises:
        InputError: transformers has no such model, or PEFT refuses the keys for it.
    """
    import torch
    from peft import TaskType
    from transformers.utils import logging

    from dagster_project.training.methods.fused_lora import fuse

    held = torch.float32 if peft is None else dtype
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # the new output layer is intended
    if quantization == "nf4":
        keys = {"quantization_config": nf4_config(["score"]), "device_map": {"": device}}
        model = frozen_4bit(_load(folder, held, **keys))
    else:
        model = _load(folder, held).to(device)
    logging.set_verbosity(said)
    model.config.pad_token_id = tokenizer_of(folder).pad_token_id
    if peft is None:
        return model
    config = peft_config("lora", peft, where, model)
    others = [name for name in config.modules_to_save or () if name != "score"]
    config.task_type, config.modules_to_save = TaskType.SEQ_CLS, [*others, "score"]
    model = add_adapter(model, config, where)
    refuse_unmatched(model, peft, where)
    widen_trained(model)
    model.get_base_model().score.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    fuse(model)
    return model


def _load(folder: Path, dtype: torch.dtype, **keys: Any) -> Any:
    """A model with the output layer `score` of one number.

    Raises:
        InputError: transformers has none of this architecture, or none with the attention that is needed.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    missing = f"a {kind} model whose output layer `score` gives one number"
    what = f"{folder}: transformers has no reward model of type {kind}: {missing}"
    another = "set reward_model.model to a model of another architecture"
    hint = f"{another}, or reward answers by rules, without a reward model"
    keys |= {"num_labels": 1, "dtype": dtype, "attn_implementation": "sdpa"}
    try:
        with refusing_attention(folder):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, **keys
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise InputError(what, hint) from None
    if not hasattr(model, "score"):
        raise InputError(what, hint)
    return model


def unquantized(model: Any, folder: Path, peft: Mapping[str, Any]) -> Any:
    """The adapter and output layer of a quantized model in an unquantized one, on the CPU.

    Args:
        folder, peft: as for `build`.
    """
    import torch

    whole = build(folder, peft, torch.device("cpu"), torch.float32, "reward_model")
    put(whole, trainable(model))
    return whole


def save(model: Any, folder: Path, out: Path) -> None:
    """Save the reward model as a standalone model with its tokenizer.

    Args:
        folder: the model that it was trained from, whose number formats it gets.
    """
    alone = model.float().merge_and_unload() if hasattr(model, "merge_and_unload") else model
    store_as(alone, folder).save_pretrained(out)
    for file in sorted(folder.glob("*")):
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "LICENSE")):
            shutil.copyfile(file, out / file.name)
    if len(end_tokens(tokenizer_of(folder))) > 1:  # without it, a tokenizer does not know all tokens that end a turn
        shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class RewardModel:
    """A reward model for scoring. Divided among processes, it must only be used in `sharding.in_step` with `shared`."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, sharding: Sharding | None = None
    ) -> None:
        """
        Args:
            folder: of the model. With `sharding`, the other processes only need a folder with a model of the same
                architecture.
            sharding: divides the model among the processes, which all create it at the same time.
        """
        self.tokenizer, self.device = tokenizer_of(folder), device
        self.model = _load(folder, dtype).eval()
        self.shared = ShardedModel(self.model, sharding, device)
        if sharding is None:
            self.model.to(device)
            return
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        for weight in self.model.parameters():
            distributed.from_first(weight.data)
        self.shared.divide()

    def __call__(
        self,
        conversations: Sequence[Messages],
        batch_size: int = 32,
        what: str = "",
        tools: Sequence[Tools] | None = None,
    ) -> list[float]:
        """The reward of the answer that each conversation ends with.

        Args:
            what: name in progress lines; empty: no progress lines.
            tools: of each conversation; None if none has any.
        """
        return self._score(answered(self.tokenizer, conversations, tools), batch_size, what)

    def of_answers(self, pairs: Sequence[Mapping[str, Any]], answers: Sequence[Message], what: str = "") -> list[float]:
        """The reward of generated answers to the prompts of these pairs.

        Args:
            what: as for `__call__`.
        """
        both = zip(pairs, answers, strict=True)
        return self._score([_generated(self.tokenizer, pair, answer) for pair, answer in both], what=what)

    def _score(self, encoded: Sequence[Answered], batch_size: int = 32, what: str = "") -> list[float]:
        """The reward of each answer.

        Texts longer than the context are truncated at the beginning; padding is on the right and masked.
        """
        import torch

        texts = [[*prompt, *answer][-self.tokenizer.model_max_length :] for prompt, answer in encoded]
        rewards = [0.0] * len(texts)
        progress = Progress(what, len(texts), "answer") if what else None
        with torch.inference_mode():
            for batch in batches_by_length(texts, batch_size):
                ids, mask = pad([texts[i] for i in batch])
                # the mask hides padding, but the model uses the id to find the last token
                ids = ids.masked_fill(mask == 0, self.model.config.pad_token_id)
                ids, mask = ids.to(self.device), mask.to(self.device)
                found = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for i, value in zip(batch, found[:, 0].float().tolist(), strict=True):
                    rewards[i] = value
                if progress:
                    progress.advance(len(batch))
        return rewards


def _generated(tokenizer: Any, pair: Mapping[str, Any], answer: Message) -> Answered:
    """Encode a generated answer as the template writes it, or as text if the template refuses it.

    It refuses e.g. a call whose arguments are not JSON.
    """
    tools = pair.get("tools")
    try:
        return answered(tokenizer, [[*pair["prompt"], answer]], [tools])[0]
    except InputError:
        prompt = encode_prompt(tokenizer, pair["prompt"], tools, bool(answer.get("reasoning_content")))
        ids: list[int] = tokenizer(conversation_text([answer]), add_special_tokens=False)["input_ids"]
        # which ends as turns of the template end
        [(_, plain)] = answered(tokenizer, [[*pair["prompt"], *reply("Yes")]], [tools])
        return prompt, [*ids, plain[-1]]


def judged_text(answer: Message) -> str:
    """The text of an answer for the rules: its content, and calls as JSON, without the trace."""
    return conversation_text([{key: value for key, value in answer.items() if key != "reasoning_content"}])


# ---- rules


def valid_json(answer: str) -> float:
    """1 if an answer is one JSON value, else 0."""
    try:
        STRICT_JSON.decode(answer)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def distinct(answer: str, n: int = 3) -> float:
    """Share of distinct three-word runs of an answer; 1 if it has none.

    >>> distinct("a b c a b c"), distinct("yes"), distinct("好的好的好的")
    (0.75, 1.0, 0.5)
    """
    words = split_words(answer)
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def brief(answer: str) -> float:
    """1 for an answer of no words, falling to 0 at a hundred."""
    return max(0.0, 1 - len(split_words(answer)) / 100)


RULES: dict[str, Callable[[str], float]] = {"valid_json": valid_json, "distinct": distinct, "brief": brief}
"""Rules: name -> reward of an answer."""
