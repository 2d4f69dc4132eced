"""ORPO and CPO, which includes SimPO: TRL's experimental trainers, in passes that read each pair once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.versions import require_version

if TYPE_CHECKING:
    import torch


def experimental(name: str) -> Any:
    """A module of trl.experimental, whose interface may change in any release of TRL."""
    require_version("trl", ">=1.16,<1.17", f"trl.experimental.{name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        return import_module(f"trl.experimental.{name}")


@cache
def pair_trainer(base: type, trains_prompts: bool) -> type:
    """TRL's trainer on pairs that are tokenized already.

    Args:
        base: TRL's ORPOTrainer or CPOTrainer.
        trains_prompts: whether its likelihood is that of prompt and chosen answer, as ORPO's, and not of the answer
            alone.
    """
    import torch

    class PairTrainer(base):
        session: Any
        """A TrlSession."""
        _total_train_tokens = 0
        """Tokens of all texts that were trained on, as TRL's other trainers count them."""

        @staticmethod
        def tokenize_row(row: Mapping[str, Any], model: None = None) -> dict[str, list[int]]:
            """Columns of a row for TRL's collator."""
            return _columns("chosen", row) | _columns("rejected", row)

        def concatenated_forward(self, model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
            """What TRL's loss reads of a batch.

            Returns:
                Log-probability of each chosen and each rejected answer, (pairs) each, divided by its tokens for losses
                that average; two means of logits, which nobody reads here; and the negative log-likelihood per token.
            """
            if self.session.outputs is None:
                return super().concatenated_forward(model, batch)
            texts = self.concatenated_inputs(batch)
            pairs = len(batch["chosen_labels"])
            log_probs = self.session.outputs(self.model, **batch, input_ids=texts["concatenated_input_ids"]).log_probs
            answers = texts["concatenated_labels"][:, 1:] != IGNORE
            of_answers = (log_probs * answers).sum(1)
            if trains_prompts or self.loss_type in {"ipo", "simpo"}:
                of_answers = of_answers / answers.sum(1)
            counted = texts["concatenated_attention_mask"][:pairs, 1:] if trains_prompts else answers[:pairs]
            nll = -(log_probs[:pairs] * counted).sum() / counted.sum()
            nothing = torch.zeros(())
            if not trains_prompts and self.cpo_alpha == 0:
                nll = nothing
            return of_answers[:pairs], of_answers[pairs:], nothing, nothing, nll

        def get_batch_loss_metrics(self, model: Any, batch: Mapping[str, Any], train_eval: str = "train") -> Any:
            if train_eval == "train":
                masks = (batch["chosen_attention_mask"], batch["rejected_attention_mask"])
                self._total_train_tokens += sum(int(mask.sum()) for mask in masks)
            return super().get_batch_loss_metrics(model, batch, train_eval)

        def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
            if "loss" in logs:
                logs["num_tokens"] = self._total_train_tokens
            super().log(logs, *arguments, **named)

    replaced = [name for name in vars(PairTrainer) if not name.startswith("_") and name != "session"]
    if missing := [name for name in replaced if not hasattr(base, name)]:
        raise AssertionError(f"written for trl 1.16: no {base.__name__}.{', '.join(missing)}")
    return PairTrainer


def _columns(side: str, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """Token ids, attention and labels of prompt and one answer; only the answer has labels."""
    prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
    ids = [*prompt, *answer]
    labels = [IGNORE] * len(prompt) + answer
    return {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": labels}
