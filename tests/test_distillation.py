"""GKD: the loss is the divergence of the paper from a larger model that is
pinned by hashes; other teachers are refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.gradients import assert_close
from builders.live_bytes import LiveBytes

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.params import Compute
from dagster_project.training.methods.load import INDEX, load_base
from dagster_project.training.planning.memory import TrainingSpec
from dagster_project.training.trainers.alignment import preference, teacher
from dagster_project.training.trainers.alignment.preference import AlignmentRun
from dagster_project.training.trainers.alignment.teacher import Teacher
from dagster_project.training.trainers.alignment.trl_trainers import answer_groups, distillation, training
from dagster_project.training.trainers.harness.params import PreferenceParams
from dagster_project.training.trainers.harness.sharding import ShardedModel

CPU = torch.device("cpu")
COMPUTE = Compute(seed=3, threads=1, dtype="float32")
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
PARAMS = PreferenceParams(
    learning_rate=1e-3,
    num_train_epochs=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    lr_scheduler_type="constant",
)
ANSWERED = [
    ([5, 6, 7, 8, 9], [10, 11, 12]),
    ([21] * 17, [30, 31, 40, 41, 42, 43, 44, 45]),
    ([7], [50, 51]),
    ([60, 61, 62], [70]),
    ([60, 61, 63], [76, 77, 78, 79]),
    ([9, 8, 7, 6], [5, 4]),
]
ROWS = [{"prompt_ids": prompt, "answer_ids": answer, "pair": i} for i, (prompt, answer) in enumerate(ANSWERED)]


@pytest.fixture(scope="module")
def built(tiny_model: Path) -> Any:
    """A policy whose adapter has an effect."""
    torch.manual_seed(1)
    model = preference.policy(tiny_model, LORA, CPU, torch.float32, "aligned.mine", "lora").model
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data + 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def large(tiny_model: Path) -> Any:
    """A teacher with other weights than the policy."""
    torch.manual_seed(7)
    model = load_base(tiny_model, CPU, torch.float32)
    for weight in model.parameters():
        weight.data = weight.data + 0.1 * torch.randn_like(weight)
    return model


def method(**options: Any) -> preference.Gkd:
    return preference.Gkd(teacher=Teacher(folder="models/large", sha256={}), **options)


def trained(policy: Any, large: Any, tokenizer: Any, params: PreferenceParams = PARAMS, **options: Any) -> Any:
    pairs = {"train": [{"example_id": str(row)} for row in range(len(ROWS))]}
    run = AlignmentRun(
        ShardedModel(policy, None, CPU), tokenizer, pairs, None, params, COMPUTE, None, teacher=lambda: large
    )  # type: ignore[arg-type]
    return training.train(method(**options).trainer_spec(run), run.shared, tokenizer, ROWS, ROWS[:3], params, COMPUTE)


def divergence(beta: float, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of rows of log-probabilities (arXiv 2306.13649, equation 1); at 0 and 1 its
    limits, up to a factor: the forward and the reverse KL divergence."""
    p, q = teacher.exp(), student.exp()
    if beta in (0, 1):
        return (p * (teacher - student) if beta == 0 else q * (student - teacher)).sum(-1)
    mixture = (beta * p + (1 - beta) * q).log()
    return beta * (p * (teacher - mixture)).sum(-1) + (1 - beta) * (q * (student - mixture)).sum(-1)


def plainly(policy: Any, large: Any, beta: float, texts: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean divergence over the tokens of the answers of a pass, from one text at a time."""
    found = []
    for prompt, answer in texts:
        logs = []
        for model in (policy, large):
            ids = torch.tensor([prompt + answer])
            logs.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        found.append(divergence(beta, logs[0], logs[1].detach()))
    return torch.cat(found).mean()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.1, 1.0])
def test_without_own_answers_the_training_is_that_of_the_papers_formula_in_float64(
    beta: float, built: Any, large: Any, tiny_tokenizer: Any
) -> None:
    policy, plain, double = copy.deepcopy(built), copy.deepcopy(built).double(), copy.deepcopy(large).double()
    history = trained(policy, copy.deepcopy(large), tiny_tokenizer, lmbda=0.0, beta=beta)
    curve = [point for point in history.curve if "loss" in point]
    weights = [weight for weight in plain.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PARAMS.learning_rate, weight_decay=0)
    for point in curve:
        rows = [row for step, _, row in history.seen if step == point["step"]]
        passes = [[ANSWERED[row] for row in rows[start : start + 2]] for start in range(0, len(rows), 2)]
        losses = [plainly(plain, double, beta, texts) for texts in passes]
        for loss in losses:
            (loss / len(passes)).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(weights, PARAMS.max_grad_norm))
        expected = [sum(float(loss.detach()) for loss in losses) / len(passes), norm]
        assert [point["loss"], point["grad_norm"]] == pytest.approx(expected, rel=1e-3, abs=1e-6), point["step"]
        assert point["on_policy"] == 0
        optimizer.step()
        optimizer.zero_grad()
    own, other = (
        {name: w.detach().float() for name, w in m.named_parameters() if w.requires_grad} for m in (policy, plain)
    )
    assert_close(own, other, 1e-3)
    last = [float(plainly(plain, double, beta, ANSWERED[some]).detach()) for some in (slice(0, 2), slice(2, 3))]
    validation = [point["validation_loss"] for point in history.curve if "validation_loss" in point]
    assert validation[-1] == pytest.approx((2 * last[0] + last[1]) / 3, rel=1e-3, abs=1e-6)
    assert history.tokens == 2 * sum(len(prompt) + len(answer) for prompt, answer in ANSWERED)


def test_with_own_answers_the_first_loss_is_the_divergence_on_what_the_policy_sampled(
    built: Any, large: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], list[int]]] = []

    def noted(model: Any, prompts: Any, *others: Any) -> Any:
        answers = decode(model, prompts, *others)
        asked.extend(zip(prompts, answers, strict=True))
        return answers

    decode = answer_groups.decode
    monkeypatch.setattr(answer_groups, "decode", noted)
    params = PARAMS.model_copy(
        update={"max_steps": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    )
    plain, double = copy.deepcopy(built).double(), copy.deepcopy(large).double()
    history = trained(copy.deepcopy(built), copy.deepcopy(large), tiny_tokenizer, params, lmbda=1.0, max_new_tokens=5)
    first = history.curve[[("loss" in point) for point in history.curve].index(True)]
    assert [prompt for prompt, _ in asked] == [ANSWERED[row][0] for _, _, row in history.seen] and len(asked) == 4
    assert first["loss"] == pytest.approx(float(plainly(plain, double, 0.5, asked).detach()), rel=1e-3)
    assert first["on_policy"] == 1 and first["response_length"] == sum(len(answer) for _, answer in asked) / 4
    again = trained(copy.deepcopy(built), copy.deepcopy(large), tiny_tokenizer, params, lmbda=1.0, max_new_tokens=5)
    assert again.curve == history.curve and asked[:4] == asked[4:]


def test_lmbda_is_the_share_of_passes_with_own_answers(built: Any, large: Any, tiny_tokenizer: Any) -> None:
    params = PARAMS.model_copy(
        update={"num_train_epochs": 10, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    )
    history = trained(copy.deepcopy(built), copy.deepcopy(large), tiny_tokenizer, params, lmbda=0.3, max_new_tokens=2)
    shares = [point["on_policy"] for point in history.curve if "loss" in point]
    assert len(shares) == 60 and 8 <= sum(shares) <= 28  # binomial(60, 0.3), 3 standard deviations around 18


def test_a_teacher_equal_to_the_policy_teaches_nothing(tiny_model: Path, tiny_tokenizer: Any) -> None:
    torch.manual_seed(1)
    policy = preference.policy(tiny_model, LORA, CPU, torch.float32, "aligned.mine", "lora").model
    params = PARAMS.model_copy(update={"max_steps": 1})
    history = trained(policy, load_base(tiny_model, CPU, torch.float32), tiny_tokenizer, params, lmbda=0.0)
    assert [point["loss"] for point in history.curve if "loss" in point] == [pytest.approx(0, abs=1e-7)]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_predicted_memory_is_what_a_real_pass_has_at_the_same_time(
    beta: float, tiny_model: Path, built: Any, large: Any
) -> None:
    policy, rows, length, width = copy.deepcopy(built), 3, 90, 60
    spec = TrainingSpec(
        "cpu",
        torch.float32,
        tiny_model,
        "lora",
        LORA,
        [length] * rows,
        rows * width,
        timed=False,
        teacher=tiny_model,
        divergence=beta,
    )
    without = TrainingSpec("cpu", torch.float32, tiny_model, "lora", LORA, [length] * rows, rows * width, timed=False)
    predicted = spec.prediction.memory
    stored = sum(weight.nbytes for weight in large.parameters())
    assert predicted.weights - without.prediction.memory.weights == pytest.approx(stored, rel=0.1), "the teacher's"
    batch = distillation.collate([[5] * (length - width)] * rows, [[6] * width] * rows, 0)
    with LiveBytes() as live:
        distillation.mean_divergence(
            policy, large.requires_grad_(False), batch, width, torch.arange(rows * width), beta
        ).backward()
    assert predicted.activations + predicted.logits + predicted.gradients == pytest.approx(live.peak, rel=0.1)


def pinned(root: Path, model: Path) -> Teacher:
    """A teacher in a project."""
    folder = root / "models" / "large"
    shutil.copytree(model, folder)
    return Teacher(
        folder="models/large", sha256={name: sha256_of_file(folder / name) for name in teacher.files_of(folder)}
    )


def test_a_pinned_teacher_with_the_same_tokens_is_accepted(tmp_path: Path, tiny_model: Path) -> None:
    given = pinned(tmp_path, tiny_model)
    folder = teacher.locate(given, tmp_path, "aligned.x.options.teacher")
    teacher.verify(given, folder, tiny_model, "aligned.x.options.teacher")
    assert folder == (tmp_path / "models" / "large").resolve() and "model.safetensors" in given.sha256


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("outside", "is outside the project"),
        ("gone", "models/gone does not exist"),
        ("no weights", "has no config.json and safetensors files"),
        ("pickle", "has no config.json and safetensors files"),
        ("link", "model.safetensors is a link"),
        ("adapter", "this is an adapter"),
        ("not listed", r"sha256: not listed: model\.safetensors"),
        ("index", r"sha256: not listed: \.\./elsewhere\.safetensors"),
        ("changed", r"models/large/model\.safetensors has sha256 [0-9a-f]{64}, not "),
        ("other tokens", "has another tokenizer: 2 tokens differ"),
        ("other size", "predicts 9999 tokens"),
        ("unknown kind", "transformers cannot read models/large"),
    ],
)
def test_any_other_teacher_is_refused_with_a_message(
    fault: str, message: str, tmp_path: Path, tiny_model: Path
) -> None:
    given = pinned(tmp_path, tiny_model)
    folder, hashes = tmp_path / "models" / "large", dict(given.sha256)
    weights = folder / "model.safetensors"
    if fault in {"outside", "gone"}:
        given = Teacher(folder="../elsewhere" if fault == "outside" else "models/gone", sha256={})
    elif fault in {"no weights", "pickle"}:
        weights.rename(folder / ("pytorch_model.bin" if fault == "pickle" else "kept"))
    elif fault == "link":
        weights.rename(tmp_path / "kept")
        weights.symlink_to(tmp_path / "kept")
    elif fault == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif fault == "not listed":
        del hashes[weights.name]
    elif fault == "index":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
        hashes[INDEX] = sha256_of_file(folder / INDEX)
    elif fault == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    else:
        name, change = {
            "other tokens": ("tokenizer.json", swap_two_tokens),
            "other size": ("config.json", lambda document: {**document, "vocab_size": 9999}),
            "unknown kind": ("config.json", lambda document: {**document, "model_type": "none"}),
        }[fault]
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
        hashes[name] = sha256_of_file(folder / name)
    given = given if fault in {"outside", "gone"} else Teacher(folder="models/large", sha256=hashes)
    with pytest.raises(InputError, match=message):
        teacher.verify(
            given, teacher.locate(given, tmp_path, "aligned.x.options.teacher"), tiny_model, "aligned.x.options.teacher"
        )


@pytest.mark.parametrize("fault", ["missing", "smaller", "damaged"])
def test_a_teacher_whose_weights_are_not_those_of_its_configuration_is_refused(
    fault: str, tmp_path: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "large")
    path = tmp_path / "large" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "down_proj" in name)
    if fault == "missing":
        del weights[name]
    elif fault == "smaller":
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, path, {"format": "pt"})
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        InputError,
        match=f"lack 1 weights of the model, such as {name}" if fault == "missing" else "cannot load the model",
    ):
        teacher.load(tmp_path / "large", CPU, torch.float32)
    assert not any(weight.requires_grad for weight in teacher.load(tiny_model, CPU, torch.float32).parameters())


def swap_two_tokens(document: dict[str, Any]) -> dict[str, Any]:
    vocabulary = document["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return document
