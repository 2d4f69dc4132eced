"""GKD: TRL's experimental trainer with answers by our own loop, and logits only where answers are predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE
from dagster_project.training.trainers.alignment.trl_trainers.answer_groups import next_seed, own_answers
from dagster_project.training.trainers.alignment.trl_trainers.reference_free import experimental

if TYPE_CHECKING:
    import torch


def collate(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Prompts padded on the left and answers on the right, so that all answers begin in the same column.

    Returns:
        input_ids, attention_mask, position_ids and labels, (batch, seq) int64 each; only answers have labels.
    """
    import torch

    left, right = max(map(len, prompts)), max(map(len, answers))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        before, after = left - len(prompt), right - len(answer)
        rows["input_ids"].append([pad] * before + [*prompt, *answer] + [pad] * after)
        rows["attention_mask"].append([0] * before + [1] * (len(prompt) + len(answer)) + [0] * after)
        rows["labels"].append([IGNORE] * left + [*answer] + [IGNORE] * after)
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def collate_rows(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """Collate rows with `prompt_ids`, `answer_ids` and the number of their `pair`.

    The batch also has the prompts and numbers as they are, `prompts` and `pairs`.
    """
    prompts, pairs = [row["prompt_ids"] for row in rows], [row["pair"] for row in rows]
    return {**collate(prompts, [row["answer_ids"] for row in rows], pad), "prompts": prompts, "pairs": pairs}


def mean_divergence(
    model: Any, teacher: Any, batch: Mapping[str, Any], width: int, where: torch.Tensor, beta: float
) -> torch.Tensor:
    """Mean over tokens of the divergence of a policy from its teacher, TRL's `generalized_jsd_loss`.

    Args:
        batch: see `collate`.
        width: columns of the answers, which are the last ones.
        where: indices (tokens) of the tokens that count, in these columns row by row.
    """
    import torch

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}

    def logits(of: Any) -> torch.Tensor:
        found: torch.Tensor = of(**inputs, use_cache=False, logits_to_keep=width + 1).logits
        return found[:, :-1].flatten(0, 1)[where].float()

    with torch.no_grad():
        theirs = logits(teacher)
    loss: torch.Tensor = experimental("gkd").GKDTrainer.generalized_jsd_loss(logits(model), theirs, beta=beta)
    return loss


@cache
def student_trainer(base: type) -> type:
    """TRL's trainer on rows that are tokenized already.

    Args:
        base: TRL's GKDTrainer.
    """
    import torch

    class StudentTrainer(base):
        session: Any
        """A TrlSession."""
        loss_is_scaled_for_ga = False  # the loss of a pass is a mean over its own tokens, whoever wrote them
        batches = (0, 0)
        """The current step, and how many of its passes have begun."""

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            """With probability `lmbda` the answers of the pass are the policy's own.

            Random numbers depend only on seed, step and pass.
            """
            prompts, pairs, seed = inputs.pop("prompts"), inputs.pop("pairs"), next_seed(self)
            samples = Random(f"{seed} on policy").random() < self.lmbda
            if samples:
                answers = own_answers(self, prompts, seed, self.args.max_new_tokens)
                self.session.keep(self.state.global_step + 1, pairs, prompts, answers)
                inputs = collate(prompts, answers, self.session.tokenizer.pad_token_id)
            self._total_train_tokens += int(inputs["attention_mask"].sum())
            lengths = (inputs["labels"] != IGNORE).sum(1).float()
            self._metrics["train"]["on_policy"].append(float(samples))
            self._metrics["train"]["length"].append(float(lengths.mean()))
            # not that of GKDTrainer
            return super(base, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[arg-type]

        def compute_loss(
            self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            counted = inputs["labels"] != IGNORE
            width = int(counted.any(0).sum())
            where = counted[:, -width:].flatten().nonzero()[:, 0]
            loss = mean_divergence(model, self.teacher_model.eval(), inputs, width, where, self.beta)
            return (loss, None) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            with torch.no_grad():
                return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

        def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
            if "loss" in logs:
                logs["num_tokens"] = self._total_train_tokens
            super().log(logs, *arguments, **named)

    replaced = ("generalized_jsd_loss", "training_step", "compute_loss")
    if missing := [name for name in replaced if not hasattr(base, name)]:
        raise AssertionError(f"written for trl 1.16: no GKDTrainer.{', '.join(missing)}")
    return StudentTrainer
