"""Online DPO: of the answers to a prompt, those with the best and the worst reward are a pair for the loss of DPO."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dagster_project.training.trainers.alignment.trl_trainers.answer_groups import group_trainer

if TYPE_CHECKING:
    import torch

OVERRIDDEN = ("_generate_and_score_completions", "_compute_loss")
"""Private methods of TRL."""


@cache
def online_pair_trainer(loss_type: str) -> type:
    """TRL's GRPOTrainer, which samples and rewards the answers of our loop, with the loss of DPO on pairs of them.

    Args:
        loss_type: `sigmoid` or `ipo`.
    """
    import torch
    import trl

    base = group_trainer(trl.GRPOTrainer, gives_log_probs=True)
    if missing := [name for name in OVERRIDDEN if not hasattr(base, name)]:
        raise AssertionError(f"written for trl 1.16: {version('trl')} has no GRPOTrainer.{', '.join(missing)}")

    class OnlinePairTrainer(base):  # type: ignore[misc, valid-type]
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            """Keep the place of each answer, by which groups are found again: TRL shuffles the answers of a batch."""
            found: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return {**found, "place": torch.arange(len(inputs), device=found["advantages"].device)}

        def _compute_loss(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            answers, mask = inputs["completion_ids"], inputs["completion_mask"]
            ids = torch.cat([inputs["prompt_ids"], answers], dim=1)
            attended = torch.cat([inputs["prompt_mask"], mask], dim=1)
            log_probs, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, attended, answers.shape[1], compute_entropy=True
            )
            ratios = (log_probs - inputs["ref_per_token_logps"]) * mask
            members = inputs["place"].argsort().view(-1, self.num_generations)
            margins = best_minus_worst(ratios.sum(1)[members], inputs["advantages"][members])
            loss = losses(margins, self.beta, loss_type).mean() if len(margins) else ratios.sum() * 0.0
            tokens = mask.sum().clamp(min=1)
            figures = {"kl": ratios.detach().sum() / tokens, "entropy": (entropies * mask).sum() / tokens}
            if len(margins):
                figures["rewards/accuracies"] = (margins > 0).float().mean()
                figures["rewards/margins"] = self.beta * margins.detach().mean()
            for name, value in figures.items():
                self._metrics["train"][name].append(float(value))
            return loss / self.current_gradient_accumulation_steps

    return OnlinePairTrainer


def best_minus_worst(ratios: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Log-ratio of the answer with the highest reward minus that of the lowest, for each group whose rewards differ.

    Args:
        ratios: log-probability under the policy minus that under the reference, (groups, answers).
        rewards: or what has the same order within a group, (groups, answers).
    """
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    differ = rewards.amax(1) > rewards.amin(1)
    return (ratios.gather(1, best) - ratios.gather(1, worst))[:, 0][differ]


def losses(margins: torch.Tensor, beta: float, loss_type: str) -> torch.Tensor:
    """Loss of each pair: sigmoid (arXiv 2305.18290, eq. 7) or ipo (arXiv 2310.12036, eq. 17, of whole answers).

    Args:
        margins: difference of the log-ratios of the chosen and the rejected answer.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * margins) if loss_type == "sigmoid" else (margins - 1 / (2 * beta)) ** 2
