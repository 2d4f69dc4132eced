"""feature_extraction: a linear layer that predicts the category from the base model's last hidden state of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dagster_project.core.chat import IGNORE, encode_prompt
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Messages, Tools
from dagster_project.core.params import Section
from dagster_project.core.progress import Progress
from dagster_project.training.methods.load import AdapterInfo, load_base
from dagster_project.training.tokens.collators import batches_by_length, pad

if TYPE_CHECKING:
    import torch

WEIGHTS, LABELS = "head.safetensors", "head.json"
ITERATIONS = 300
"""Maximum number of L-BFGS steps; the loss is convex, and fitting stops once it no longer decreases."""


class Options(Section):
    """Keys of feature_extraction."""

    l2: float = Field(default=0.1, ge=0)
    """Weight of half the squared norm of the layer's weights, added to the mean cross entropy. Features have variance
    1."""
    class_weight: Literal["balanced"] | None = None
    """`balanced`: every category counts equally in the loss, however many examples it has. null: every example counts
    equally."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts per forward pass."""


def split_prompts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[str], list[tuple[int, int]]]:
    """Extract the prompts of packed rows. Examples without a category are left out.

        ids [5, 6, 7, 8], labels [-100, -100, 7, 8], lengths [4], categories ["login"] -> [[5, 6]], ["login"], [(0, 0)]

    Args:
        rows: with input_ids, labels, lengths and categories (one per example, nullable).
    Returns:
        Token ids of each prompt (up to the last answer), its category, and its position (row, example in the row).
    """
    prompts, categories, positions = [], [], []
    for number, row in enumerate(rows):
        start = 0
        for position, (length, category) in enumerate(zip(row["lengths"], row["categories"], strict=True)):
            ids, labels = row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length
            trained = [i for i, label in enumerate(labels) if label != IGNORE]
            if category is None or not trained:
                continue
            first = next(i for i in range(trained[-1], -1, -1) if i == 0 or labels[i - 1] == IGNORE)
            prompts.append(list(ids[:first]))
            categories.append(category)
            positions.append((number, position))
    return prompts, categories, positions


def features(model: Any, prompts: Sequence[Sequence[int]], batch_size: int, what: str) -> torch.Tensor:
    """Last hidden state of the last token of each prompt, (prompts, hidden) float32.

    Padding is on the right and masked.
    """
    import torch

    states = torch.zeros(len(prompts), model.config.hidden_size)
    progress = Progress(what, len(prompts), "prompt")
    with torch.inference_mode():
        for batch in batches_by_length(prompts, batch_size):
            ids, mask = pad([prompts[i] for i in batch])
            read = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            hidden = model.base_model(**read, use_cache=False).last_hidden_state
            states[batch] = hidden[torch.arange(len(batch)), mask.sum(1) - 1].float().cpu()
            progress.advance(len(batch))
    return states.clone()


def fit(
    inputs: torch.Tensor, targets: torch.Tensor, classes: int, options: Options
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Multinomial logistic regression with an L2 penalty, by L-BFGS in float64 from zero.

    The problem is convex, so the result is unique.

    Args:
        inputs: (n, hidden) features.
        targets: (n,) class indices, int64.
    Returns:
        Weight (classes, hidden) and bias (classes,), both float32, for unscaled features; the loss of each iteration.
    """
    import torch
    from torch.nn.functional import cross_entropy

    x = inputs.double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    x = (x - mean) / scale
    counts = torch.bincount(targets, minlength=classes).double()
    balance = len(targets) / (classes * counts.clamp_min(1)) if options.class_weight else None
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    exact = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([weight, bias], max_iter=1, **exact)

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = cross_entropy(x @ weight.T + bias, targets, weight=balance) + options.l2 / 2 * weight.square().sum()
        value.backward()
        return value

    losses: list[float] = []
    while len(losses) < ITERATIONS and (len(losses) < 2 or losses[-2] - losses[-1] > 1e-9):
        losses.append(float(solver.step(loss)))
    weight, bias = weight.detach() / scale, bias.detach()
    return weight.float(), (bias - weight @ mean).float(), losses


class Classifier:
    """A frozen base model and the linear layer `score`, (hidden) -> (labels)."""

    def __init__(self, base: Any, labels: Sequence[str], options: Options) -> None:
        import torch

        self.base = base.requires_grad_(False).eval()
        self.labels = list(labels)
        self.options = options
        self.device = base.device
        self.score = torch.nn.Linear(base.config.hidden_size, len(labels))

    def parameters(self) -> list[Any]:
        """The trained parameters."""
        return list(self.score.parameters())

    def named_parameters(self) -> list[tuple[str, Any]]:
        return [*self.base.named_parameters(prefix="base"), *self.score.named_parameters(prefix="score")]

    def state_dict(self, keep_vars: bool = False) -> dict[str, Any]:
        base, score = (module.state_dict(keep_vars=keep_vars) for module in (self.base, self.score))
        return {f"base.{name}": base[name] for name in base} | {f"score.{name}": score[name] for name in score}

    def fit(
        self, train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, float]]:
        """Train on packed rows, in place.

        Returns:
            The loss curve in the format of `sft.train`: the loss of each iteration, and the validation loss before and
            after.
        Raises:
            InputError: no example has a category, or a validation example has a category that train lacks.
        """
        import torch
        from torch.nn.functional import cross_entropy

        prompts, categories, _ = split_prompts(train)
        validation_prompts, validation_categories, _ = split_prompts(validation)
        if not prompts:
            problem = "feature_extraction needs categories, and no example has one"
            raise InputError(problem, "use sources with a `category`")
        unknown = sorted({*categories, *validation_categories} - set(self.labels))
        if unknown:
            raise InputError(
                f"feature_extraction: categories without a class: {', '.join(unknown)}",
                "a class is a category of the training split: add examples of these to raw_examples.sources",
            )
        number = {name: i for i, name in enumerate(self.labels)}
        targets = torch.tensor([number[name] for name in categories])
        validation_targets = torch.tensor([number[name] for name in validation_categories])
        size = self.options.batch_size
        if validation_prompts:
            validation_inputs = features(self.base, validation_prompts, size, "validation features")

        def validate(step: int) -> list[dict[str, float]]:
            if not validation_prompts:
                return []
            with torch.no_grad():
                loss = cross_entropy(self.score(validation_inputs), validation_targets)
            return [{"step": step, "validation_loss": float(loss)}]

        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
        curve = validate(0)
        inputs = features(self.base, prompts, size, "features")
        weight, bias, losses = fit(inputs, targets, len(self.labels), self.options)
        with torch.no_grad():
            self.score.weight.copy_(weight)
            self.score.bias.copy_(bias)
        curve += [{"step": step, "loss": loss, "learning_rate": 1.0} for step, loss in enumerate(losses, 1)]
        return curve + validate(len(losses))

    def save(self, folder: Path) -> None:
        """Write head.safetensors (score.weight, score.bias; float32) and head.json (labels in order, and options)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = {f"score.{name}": value.contiguous() for name, value in sorted(self.score.state_dict().items())}
        save_file(state, folder / WEIGHTS)
        about = {"labels": self.labels, "options": self.options.model_dump()}
        (folder / LABELS).write_text(json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


class Predictor:
    """Predicts categories with a saved classifier."""

    def __init__(self, classifier: Classifier, tokenizer: Any) -> None:
        self.classifier, self.tokenizer = classifier, tokenizer

    def predict(
        self,
        conversations: Sequence[Messages],
        what: str = "categories",
        tools: Sequence[Tools] | None = None,
        reasoning: Sequence[bool] | None = None,
    ) -> list[str]:
        """Predict the category of each conversation, given up to the answer and tokenized as in training.

        Args:
            tools: of each conversation; None if none has any.
            reasoning: whether an answer with a trace is expected to each; None if to none.
        """
        import torch

        if not conversations:
            return []
        head = self.classifier
        offers = zip(conversations, tools or repeat(None), reasoning or repeat(False), strict=False)
        prompts = [encode_prompt(self.tokenizer, *offer) for offer in offers]
        with torch.inference_mode():
            scores = head.score(features(head.base, prompts, head.options.batch_size, what))
        return [head.labels[i] for i in scores.argmax(1).tolist()]


def is_head(folder: Path) -> bool:
    """Whether a folder contains a saved classifier."""
    return (folder / LABELS).is_file()


def load(folder: Path, base_model: Path, device: torch.device, dtype: torch.dtype) -> Predictor:
    """Load the classifier in `folder` with its base model."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    about = json.loads((folder / LABELS).read_text())
    base = load_base(base_model, device, dtype, AdapterInfo.read(folder).quantization)
    classifier = Classifier(base, about["labels"], Options.model_validate(about["options"]))
    state = {name.removeprefix("score."): value for name, value in load_file(folder / WEIGHTS).items()}
    classifier.score.load_state_dict(state)
    return Predictor(classifier, AutoTokenizer.from_pretrained(base_model, trust_remote_code=False))
