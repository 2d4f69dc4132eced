"""The parts of AdaLoRA that a Trainer does not do: ranks by importance, and the penalty on P and Q."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class AdaptiveRanks:
    """Of a PeftModel with the method adalora."""

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
