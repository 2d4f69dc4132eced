"""preferences or splits + reward_model + merged@SFT -> aligned@X.

Preference training of an SFT model, which is also its reference; compares the answers before and after.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, refuse_names_of_one_file
from dagster_project.core.records import (
    CheckResult,
    Report,
    read_preferences,
    remove,
    write_json,
    write_table,
    write_text,
)
from dagster_project.evaluation.paired import alignment
from dagster_project.evaluation.paired.bootstrap import FEWEST, unit
from dagster_project.training.methods import options as methods
from dagster_project.training.methods.build import PreparedModel
from dagster_project.training.methods.hardware import (
    import_libraries,
    peak_memory,
    prepare,
    return_large_blocks,
    reuse_large_blocks,
)
from dagster_project.training.tokens.preference_pairs import answered, both, refuse_misfits
from dagster_project.training.trainers.alignment import preference, tasks, teacher, trl_options
from dagster_project.training.trainers.alignment.preference import (
    AlignmentMethod,
    AlignmentRun,
    StoppedHistory,
)
from dagster_project.training.trainers.alignment.ready_rewards import ReadyReward, refuse_missing_targets
from dagster_project.training.trainers.alignment.reward_functions import (
    FOLDER,
    TIME_KEY,
    RewardFunction,
    sha256_of_functions,
    started,
)
from dagster_project.training.trainers.alignment.reward_model import MODEL, RewardModel, failed_checks, tokenizer_of
from dagster_project.training.trainers.alignment.rewards import Rewards, check, reads_files, ready
from dagster_project.training.trainers.alignment.sampled_answers import FOLDER as FOLDER_OF_ANSWERS
from dagster_project.training.trainers.alignment.sampled_answers import SampledAnswers
from dagster_project.training.trainers.alignment.trl_trainers.shared_prompts import has_router
from dagster_project.training.trainers.alignment.trl_trainers.training import document_of, preference_identity
from dagster_project.training.trainers.harness import sharding, weight_audit
from dagster_project.training.trainers.harness.checkpoint import Checkpoints, refuse_full_disk
from dagster_project.training.trainers.harness.curve import write_curve
from dagster_project.training.trainers.harness.distributed import claim_gpu, place
from dagster_project.training.trainers.harness.history import TrainingHistory
from dagster_project.training.trainers.harness.launch import (
    is_first_host,
    portable,
    refuse_differences,
    report_document,
    report_of_group,
    settings_document,
    start_others,
)
from dagster_project.training.trainers.harness.params import PreferenceParams, refuse_unmerged, refuse_warmup
from dagster_project.training.trainers.harness.session import Diverged, Interrupted, advice_on_memory
from dagster_project.training.trainers.harness.sharding import ShardedModel
from dagster_project.training.trainers.harness.weight_audit import WeightAudit, WeightChange, unmoved

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pedigree")

CHECK_DESCRIPTIONS = {
    "starts_as_the_reference": (
        "Before the first step policy and SFT model are equal: KL 0 and, for dpo without a router, loss ln 2. Not for "
        "orpo, simpo, cpo and gkd, which have no reference."
    ),
    "learned": "Every loss and every trained weight is finite.",
    "trained_what_it_should": "Every group of trainable weights moved, and no frozen weight did.",
    "prefers_as_people_do": (
        "On held-out pairs the chosen answer is more likely per token in significantly more than half of them."
    ),
    "solves_more_held_out_tasks": (
        "With `reward_target: response`: rewards of at least 30 held-out answers, near-copies counted once, are"
        " significantly higher than before."
    ),
    "reward_is_not_gamed": (
        "The rewards of held-out answers did not rise through length, repetition or unfinished answers."
    ),
    "rewards_differ": (
        "Online: answers that are compared with each other had different rewards, so that there was something to learn."
    ),
    "reward_model_is_reliable": "The reward model used for training or monitoring passed its checks.",
}

ONLINE_KEYS = ("rewards", "reward_target", TIME_KEY, "constant_reward_steps")
"""Keys of an entry that only online methods use."""
EVALUATION_BATCH = 16
"""Answers per forward pass without training."""


class Params(PreferenceParams):
    """One entry per variant; no adapter may have its name.

    The name becomes `aligned@NAME`, `merged_aligned@NAME` and `evaluation_aligned@NAME`. `aligned: {}` for none. See
    docs/alignment.md.
    """

    method: preference.MethodName
    """The alignment method."""
    adapter: str = Field(pattern=r"^[\w-]+$")
    """Name of the SFT variant that training starts from and, but for orpo, simpo, cpo and gkd, uses as its reference.
    It must be merged."""
    options: dict[str, Any] = {}
    """The method's own keys, listed below. For ppo they include learning rate, batch size and checkpoints, which are
    then refused in the entry itself."""
    peft: dict[str, Any] = {}
    """Keys of LoRA for the new adapter, as PEFT names them."""
    rewards: dict[str, float | dict[str, Any]] = {MODEL: 1.0}
    """Rewards of online methods, each with its weight: reward_model; valid_json, 1 for an answer that is JSON;
    distinct, the share of three-word runs that are not repeated; brief, falling from 1 to 0 at a hundred words. These
    rules score an answer's content and its calls, as JSON, without the trace. Ready-made ones that can be verified,
    with a weight or a mapping of `weight` and their options: exact_match, number_match, regex, json_schema, tool_call,
    reasoning_format, length_window and unit_tests, see docs/alignment.md. Your own function:
    data/rewards/FILE.py:FUNCTION."""
    reward_target: Literal["chosen", "response"] = "chosen"
    """Online: where prompts come from, and what exact_match, number_match and tool_call compare answers with. chosen:
    preference pairs, and their chosen answers. response: records of the training split of `splits`, and their
    responses; answers to records of its validation split are measured before and after. No pair is read then, see
    docs/alignment.md."""
    reward_seconds: float = Field(default=60.0, gt=0, le=86_400)
    """Longest time that a function in data/rewards may take for the answers of one call, in seconds."""
    constant_reward_steps: int | None = Field(default=10, ge=1)
    """Online: steps (ppo: iterations) in a row after which training stops because there was nothing to learn: all
    answers to each prompt, for ppo all answers of the iteration, had the same reward. Raise it for rewards that are
    rare at first. null: never stop."""
    trl: dict[str, Any] = {}
    """Further arguments of TRL's configuration of the method, under TRL's names, see docs/alignment.md. Only those that
    are verified to act on Pedigree's passes are accepted; not for ppo."""
    samples: int = Field(default=64, ge=1)
    """Held-out prompts that are answered before and after training."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest of these answers, in tokens. Prompts that leave no room for it in the context are truncated at the
    beginning."""

    def parsed_method(self, where: str, given: Collection[str] = ()) -> AlignmentMethod:
        """The method with its options; `given`: keys that the entry itself names."""
        return preference.parse_method(self.method, self.options, self, where, given)


@dataclass(frozen=True)
class Sources:
    """Folders that an alignment reads."""

    preferences: Path
    reward_model: Path | None
    """None in a project without one."""
    sft: Path
    functions: Path | None = None
    """Folder of reward functions and of files for rewards, if the method uses any."""
    larger: Path | None = None
    """The teacher of a distillation."""
    splits: Path | None = None
    """Folder of instruction records, if they are the tasks."""


def validate(params: Params, ctx: ValidationContext) -> None:
    where = ctx.section
    if ctx.name in ctx.values["adapter"]:
        raise InputError(f"params.yaml: {where}: adapter.{ctx.name} has the same name", "rename one of them")
    refuse_names_of_one_file([*map(str, ctx.values["adapter"]), ctx.name], "adapter and aligned")
    refuse_unmerged(ctx.values["adapter"], params.adapter, f"{where}.adapter")
    refuse_warmup(params, where)
    methods.refuse_untrained(params.peft, where)
    methods.check("lora", params.peft, params.quantization, True, where)
    method = params.parsed_method(where, ctx.value)
    options, accumulated = method.model_dump(), params.gradient_accumulation_steps
    trl_options.refuse(params.method, params.trl, options, params.optim, f"{where}.trl", accumulated)
    if params.sharding and not method.can_shard:
        reason = "needs the whole model in each process" if method.learns_from_rewards else "does not support it"
        problem = f"params.yaml: {where}.sharding: {params.method} {reason}"
        raise InputError(problem, "use dpo, kto or ppo, or leave it out")
    sharding.check(params, ctx.compute, where, "lora", "adamw_torch" if "optim" in method.ignored_params else None)
    if method.given_teacher:
        teacher.locate(method.given_teacher, ctx.root, f"{where}.options.teacher")
    if method.learns_from_rewards:
        check(params.rewards, f"{where}.rewards", ctx.root)
        if "unit_tests" in params.rewards and params.reward_target != tasks.RESPONSE:
            problem = f"params.yaml: {where}.rewards.unit_tests: pairs have no tests"
            raise InputError(problem, "set reward_target: response")
        if params.rewards.get(MODEL) and MODEL not in ctx.values:
            problem = f"params.yaml: {where}.rewards: {params.method} learns from {MODEL}, and there is no such section"
            raise InputError(problem, "add it, or reward by rules alone: rewards: {distinct: 1.0}")
    elif unused := next((key for key in ONLINE_KEYS if key in ctx.value), None):
        raise InputError(f"params.yaml: {where}.{unused}: {params.method} learns from pairs alone", "leave it out")


def run(ctx: StageContext) -> Report:
    params = ctx.variant_params("aligned", Params)
    where = f"aligned.{ctx.variant}"
    given = params.parsed_method(where).given_teacher
    sources = Sources(
        ctx.output_of("preferences"),
        ctx.output_of("reward_model") if MODEL in ctx.values and _is_used(params) else None,
        ctx.outputs_of("merged") / params.adapter,
        functions=ctx.root / FOLDER if reads_files(params.rewards) else None,
        larger=teacher.locate(given, ctx.root, f"{where}.options.teacher") if given else None,
        splits=ctx.output_of("splits") if params.reward_target == tasks.RESPONSE else None,
    )
    places = ctx.out, ctx.plot("alignment"), ctx.checkpoints, ctx.live, ctx.pages
    return produce(str(ctx.variant), params, ctx.compute, sources, *places)


def _is_used(params: Params) -> bool:
    """Whether the reward model scores answers: those that are learned from, or held-out ones.

    Tasks are measured by the rewards alone.
    """
    return params.reward_target != tasks.RESPONSE or bool(params.rewards.get(MODEL))


def produce(
    variant: str,
    params: Params,
    compute: Compute,
    sources: Sources,
    out: Path,
    curve_file: Path,
    checkpoints: Path,
    live: Path | None = None,
    pages: Path | None = None,
) -> Report:
    """Train one variant, in several processes if the parameters say so.

    Args:
        checkpoints: the variant's folder, which survives a killed run. It is removed unless a check blocks.
    """
    where = f"aligned.{variant}"
    takes_part = params.sharding or params.parsed_method(where).shares_processes
    if compute.processes > 1 and takes_part and place().size == 1:
        places = {"out": out, "curve_file": curve_file, "checkpoints": checkpoints, "live": live, "pages": pages}
        return report_of_group(__name__, params, compute, {**vars(sources), **places}, variant=variant)
    import_libraries()
    method = params.parsed_method(where)
    pairs, counts = _examples(params, method, sources, where)
    usable, reliable = _examine(sources, params, method, where)
    if reliable and reliable.blocking and not reliable.passed:
        return Report(checks=[reliable])
    called = started(sources.functions, params.rewards, params.reward_seconds, f"{where}.rewards")
    claim_gpu()
    device, dtype = prepare(compute)
    reuse_large_blocks()
    with advice_on_memory():
        prepared, shared = _policy(sources.sft, params, device, dtype, where)
    _refuse_full_disk(prepared, params, method, checkpoints, out, where)
    policies = alignment.Policies(prepared.model, tokenizer_of(sources.sft), EVALUATION_BATCH)
    start: dict[str, float] = {}

    def begin() -> None:
        start.update(sharding.in_step([shared], lambda: _initial_difference(policies, pairs["train"][:8])))

    if method.has_reference and not params.sharding:
        begin()
    audit = WeightAudit(prepared.model, checkpoints)
    identity = _identity(params, compute, method, sources, device, dtype)
    kept = Checkpoints(checkpoints, identity, params.save_total_limit, sharded=params.sharding is not None)
    _start_others(params, compute, sources, checkpoints, usable, identity)
    load_judge = partial(_judge, sources.reward_model, params, device, dtype, usable)
    judge = load_judge() if method.learns_from_rewards else None
    rewards = _rewards(sources, params, judge, called, f"{where}.rewards") if method.learns_from_rewards else None
    sampled, names = method.sampled_answers(params.constant_reward_steps), [*rewards.weights] if rewards else []
    larger = partial(teacher.load, sources.larger, device, dtype) if sources.larger else None
    run = AlignmentRun(
        shared, policies.tokenizer, pairs, rewards, params, compute, kept, live, begin if params.sharding else _nothing,
        sampled, larger, params.trl,
    )  # fmt: skip
    try:
        history = method.train(run)
    except Diverged as diverged:
        return Report(checks=[_diverged(diverged, pairs["train"], method)])
    differ = [_rewards_differ(sampled, names, method, where)] if rewards else []
    if any(check.blocking and not check.passed for check in differ):
        return Report(checks=differ)
    history.curve = sampled.with_components(history.curve, names) if rewards else history.curve
    return_large_blocks()
    measured = sharding.in_step([shared], lambda: _agreement(policies, pairs["test"], params, method))
    judge = judge or load_judge()  # methods that learn from pairs need its memory only now
    used = [shared, *([judge.shared] if judge else [])]
    scorer = tasks.HeldOut(rewards) if rewards and sources.splits else judge
    measured |= sharding.in_step(used, lambda: _answers(policies, pairs["test"], scorer, params, out))
    shared.join()
    change, signs = audit.change(), alignment.gamed(measured["watch"])
    prepared.save(out)
    sampled.write(out / FOLDER_OF_ANSWERS, names)
    document = document_of(history, change, _settings(params, method), compute, device, dtype) | _begun(start, method)
    figures, ids = [*method.figures, *names], _ids(pairs["train"], method)
    _write_training(document, history, figures, ids, sources.sft, out, curve_file)
    if pages:
        components = {"components": names} if rewards else {}
        write_json(pages / "history.json", {"curve": history.curve, "signs": signs, **components})
    has_routers = has_router(prepared.model)
    starts = [_starts_as_the_reference(start, history, method, has_routers)] if method.has_reference else []
    summary = {"sampled": sampled.summary()} if rewards or sampled.rows else {}
    metrics = _metrics(params, method, history, prepared, sources) | summary
    checks = [
        *starts,
        _learned(history, prepared),
        _moved(change, history),
        _improved(measured, len(pairs["test"])),
        _not_gamed(signs, measured["watch"], sources.reward_model),
        *differ,
        *([reliable] if reliable else []),
    ]
    report = Report(
        metrics={**metrics, **counts, **measured, "environment": document["versions"]},
        checks=checks,
        measured={"training_seconds": round(history.seconds, 1), "peak_memory_bytes": peak_memory(device.type)},
    )
    if not report.failures:
        remove(checkpoints)
    return report


def _begun(start: Mapping[str, float], method: AlignmentMethod) -> dict[str, Any]:
    """What training.json says of the processes of a training, and of the policy before the first step."""
    processes = {"processes": place().size} if place().size > 1 else {}
    return processes | ({"step_0": start} if method.has_reference else {"reference": None})


def _start_others(
    params: Params, compute: Compute, sources: Sources, checkpoints: Path, usable: bool, identity: Mapping[str, str]
) -> None:
    """Start this stage in the other processes of a group, if there is one."""
    inputs = {name: portable(path) for name, path in {**vars(sources), "checkpoints": checkpoints}.items() if path}
    given = {"folders": inputs, "scored": usable, "identity": identity}
    start_others({**settings_document(params, compute), **given}, __name__)


def _identity(
    params: Params, compute: Compute, method: AlignmentMethod, sources: Sources, device: torch.device, dtype: Any
) -> dict[str, str]:
    judges = {"reward model": sources.reward_model} if method.learns_from_rewards and sources.reward_model else {}
    models = {"SFT model": sources.sft, **judges}
    functions = {"reward functions": sha256_of_functions(sources.functions)} if sources.functions else {}
    data = sources.splits / tasks.SPLITS["train"] if sources.splits else sources.preferences
    return functions | preference_identity(params, compute, device, dtype, data, models, Path(__file__))


def first_process(work: Mapping[str, Any]) -> dict[str, Any]:
    """Work of the first process of a group: all of the stage."""
    params, compute = Params.model_validate(work["params"]), Compute.model_validate(work["compute"])
    folders = {name: Path(path) for name, path in work["folders"].items()}
    return report_document(produce(work["variant"], params, compute, _sources_in(folders), **folders))


def _sources_in(folders: dict[str, Path]) -> Sources:
    """The sources among the folders of a process, from which they are removed."""
    given = {field.name: folders.pop(field.name) for field in fields(Sources) if field.name in folders}
    return Sources(**{MODEL: None, **given})  # type: ignore[arg-type]


def other_process(work: Mapping[str, Any]) -> None:
    """Work of the other processes: the same training, and with `sharding` the passes of the evaluation.

    They write nothing but parts of checkpoints.

    Raises:
        InputError: inputs, code or versions on this host differ from those of the first one.
    """
    params, compute = Params.model_validate(work["params"]), Compute.model_validate(work["compute"])
    folders = {name: Path(path) for name, path in work["folders"].items()}
    sources, checkpoints = _sources_in(folders), folders["checkpoints"]
    device, dtype = prepare(compute)
    if not is_first_host():
        if missing := next((path for path in vars(sources).values() if path and not path.is_dir()), None):
            raise InputError(f"this host has no {missing}", "fetch it with `dvc pull`")
        here = _identity(params, compute, params.parsed_method("aligned"), sources, device, dtype)
        refuse_differences(here, work["identity"])
    reuse_large_blocks()
    method = params.parsed_method("aligned")
    _, shared = _policy(sources.sft, params, device, dtype, "aligned")
    scores = params.rewards.get(MODEL) if method.learns_from_rewards and not params.sharding else work["scored"]
    load_judge = partial(_judge, sources.reward_model, params, device, dtype, bool(scores))
    judge = load_judge() if method.learns_from_rewards else None
    called = started(sources.functions, params.rewards, params.reward_seconds, "aligned: rewards")
    rewards = _rewards(sources, params, judge, called, "aligned: rewards") if method.learns_from_rewards else None
    pairs, _ = _read(params, sources, "aligned")

    def begin() -> None:
        sharding.in_step([shared], _nothing)

    sampled = method.sampled_answers(params.constant_reward_steps)
    run = AlignmentRun(
        shared, tokenizer_of(sources.sft), pairs, rewards, params, compute, Checkpoints(checkpoints, {}),
        begin=begin, sampled=sampled, trl=params.trl,
    )  # fmt: skip
    with suppress(Diverged, Interrupted):  # the first process reports it
        method.train(run)
        return_large_blocks()
        sharding.in_step([shared], _nothing)
        judge = judge or load_judge()
        sharding.in_step([shared, judge.shared] if judge else [shared], _nothing)
        shared.join()


def _rewards(
    sources: Sources, params: Params, judge: RewardModel | None, called: Sequence[RewardFunction], where: str
) -> Rewards:
    return Rewards(params.rewards, judge, called, _root_of(sources.functions), where)


def _root_of(functions: Path | None) -> Path:
    """The project's folder, for files that rewards name; without any, anything."""
    return functions.resolve().parents[1] if functions else Path()


def _nothing() -> None:
    return None


def _judge(
    folder: Path | None, params: Params, device: torch.device, dtype: torch.dtype, usable: bool
) -> RewardModel | None:
    """The reward model; None if it is not used, or cannot be."""
    with advice_on_memory():
        return RewardModel(folder, device, dtype, params.sharding) if folder and usable else None


def _policy(
    sft: Path, params: Params, device: torch.device, dtype: torch.dtype, where: str
) -> tuple[PreparedModel, ShardedModel]:
    """The untrained policy; one to be divided among the processes is on the CPU, unless it is quantized."""
    import torch

    whole_at = torch.device("cpu") if params.sharding and params.quantization == "none" else device
    prepared = preference.policy(sft, params.peft, whole_at, dtype, where, params.adapter, params.quantization)
    return prepared, ShardedModel(prepared.model, params.sharding, device)


def _settings(params: Params, method: AlignmentMethod) -> dict[str, Any]:
    """Settings that had an effect."""
    unused = {TIME_KEY} if method.learns_from_rewards else {TIME_KEY, "constant_reward_steps"}
    unused |= set() if params.trl else {"trl"}
    unused |= set() if params.reward_target == tasks.RESPONSE else {"reward_target"}
    return params.settings({*method.ignored_params, *unused}) | {"options": method.model_dump()}


def _metrics(
    params: Params, method: AlignmentMethod, history: TrainingHistory, prepared: PreparedModel, sources: Sources
) -> dict[str, Any]:
    return {
        "method": params.method,
        "adapter": params.adapter,
        **({"rewards": params.rewards} if method.learns_from_rewards else {}),
        **({"reward_target": params.reward_target} if params.reward_target == tasks.RESPONSE else {}),
        **({"loss_type": method.loss_type} if isinstance(method, preference.Grpo) else {}),
        **({} if method.has_reference else {"reference": None}),
        **({"teacher": method.given_teacher.model_dump()} if method.given_teacher else {}),
        **({"trl": params.trl} if params.trl else {}),
        "steps": history.step,
        **({"stopped": history.stopped} if isinstance(history, StoppedHistory) else {}),
        "tokens": history.tokens,
        "trainable_parameters": prepared.trainable,
        **({} if sources.reward_model else {MODEL: "none"}),
    }


def _refuse_full_disk(
    prepared: PreparedModel, params: Params, method: AlignmentMethod, checkpoints: Path, out: Path, where: str
) -> None:
    size = sum(weight.nbytes for weight in weight_audit.trainable(prepared.model).values())
    kept = method.checkpoint_size * (params.save_total_limit + 1)
    refuse_full_disk({checkpoints: size * (1 + kept), out: 2 * size}, where)


def _write_training(
    document: Mapping[str, Any],
    history: TrainingHistory,
    figures: Sequence[str],
    ids: Sequence[Sequence[str]],
    sft: Path,
    out: Path,
    curve_file: Path,
) -> None:
    """Write training.json, the pairs of each step, the chat template and the curve.

    Args:
        figures: columns of the curve after the loss, if measured.
        ids: of the examples of each training row.
    """
    write_json(out / "training.json", document)
    write_table(out / "examples.parquet", weight_audit.seen_examples(history.seen, ids), weight_audit.seen_schema())
    for template in sft.glob("chat_template.jinja"):
        write_text(out / template.name, template.read_text(encoding="utf-8"))
    measured = [name for name in figures if any(name in point for point in history.curve)]
    write_curve(curve_file, history.curve, ("loss", *measured))


def _ids(pairs: Sequence[Mapping[str, Any]], method: AlignmentMethod) -> list[list[str]]:
    """Ids of the examples of each training row: its pair."""
    return [[pair["example_id"]] for pair in pairs for _ in range(method.rows_per_pair)]


def _agreement(
    policies: alignment.Policies, pairs: Sequence[Mapping[str, Any]], params: Params, method: AlignmentMethod
) -> dict[str, Any]:
    """Compare policy and SFT model on held-out pairs; tasks have none."""
    if params.reward_target == tasks.RESPONSE:
        return {}
    return {"preference": alignment.preference(policies, pairs, method.has_reference)}


def _answers(
    policies: alignment.Policies,
    pairs: Sequence[Mapping[str, Any]],
    judge: RewardModel | tasks.HeldOut | None,
    params: Params,
    out: Path,
) -> dict[str, Any]:
    """Compare answers of policy and SFT model to held-out prompts, and their rewards.

    Writes samples.parquet.
    """
    prompts = list({str(pair["prompt"]): pair for pair in pairs}.values())[: params.samples]
    rows, watch = alignment.samples(policies, prompts, cast("RewardModel | None", judge), params.max_new_tokens)
    write_table(out / "samples.parquet", rows, alignment.sample_schema())
    if not isinstance(judge, tasks.HeldOut):
        return {"watch": watch}
    before, after = judge.components
    units = [unit(pair) for pair in prompts]
    watch |= {"independent": len(set(units))} if len(set(units)) < len(prompts) else {}  # near-copies count as one
    return {"held_out": {name: alignment.paired(before[name], after[name], units) for name in before}, "watch": watch}


def _initial_difference(policies: alignment.Policies, pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Difference of policy and reference before the first step."""
    if all("rejected" in pair for pair in pairs):
        examples = [(prompt, answer) for prompt, *answers in both(policies.tokenizer, pairs) for answer in answers]
    else:
        conversations = [[*task["prompt"], *task["chosen"]] for task in pairs]
        examples = answered(policies.tokenizer, conversations, [task["tools"] for task in pairs])
    sft, aligned = (policies.log_probabilities(who, examples, f"step 0, {who}") for who in ("sft", "aligned"))
    return {
        "largest_log_probability_difference": max(abs(a - b) for (a, _), (b, _) in zip(sft, aligned, strict=True)),
        "kl_per_token": policies.divergence(examples[:4]),
    }


def _diverged(diverged: Diverged, pairs: Sequence[Mapping[str, Any]], method: AlignmentMethod) -> CheckResult:
    examples = [pairs[row]["example_id"] for row in diverged.rows if row < len(pairs)]
    note = f"{diverged}; lower learning_rate{', or raise beta' if method.has_reference else ''}"
    return CheckResult("learned", passed=False, blocking=True, count=len(examples), rows=examples[:20], note=note)


def _learned(history: TrainingHistory, prepared: PreparedModel) -> CheckResult:
    finite_weights = (bool(weight.isfinite().all()) for weight in weight_audit.trainable(prepared.model).values())
    finite = all(map(math.isfinite, history.losses)) and all(finite_weights)
    note = f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}"
    # the weights are the last finite ones; the reader of the report decides whether to use them
    if isinstance(history, StoppedHistory):
        return CheckResult("learned", passed=False, severity="warn", note=history.stopped)
    return CheckResult("learned", passed=finite, blocking=True, note=note)


def _moved(change: WeightChange, history: TrainingHistory) -> CheckResult:
    """`trained_what_it_should`. If a group did not move because too few steps could move it, the note says so."""
    check = change.check()
    points = [point for point in history.curve if "loss" in point]
    able = [point for point in points if point["learning_rate"] > 0 and point["grad_norm"] > 0]
    acting = sum(point.get("updates", 1) for point in able)
    if not unmoved(change.groups) or acting > 1:
        return check
    reason = (
        f"{acting} of {history.step} steps could change a weight: the first step of a warm-up has a learning rate of 0,"
        " and one whose rewards are equal has no gradient at first. lora_B begins at zero, so that lora_A moves from"
        " the second such step on; train for more steps"
    )
    return replace(check, note=f"{check.note}; {reason}")


def _rewards_differ(sampled: SampledAnswers, names: Sequence[str], method: AlignmentMethod, where: str) -> CheckResult:
    """Blocks if nothing could be learned in any step.

    A training that stopped because its rewards no longer differ keeps its weights.
    """
    counts = "{answers} answers to {records} records".format(**sampled.summary())
    accepted = method.accepts_constant_rewards
    if sampled.ever_teaches():
        stalled = sampled.is_stalled() and not accepted
        note = sampled.stalled_text() if stalled else counts
        return CheckResult("rewards_differ", passed=not stalled, severity="warn", note=note)
    constant = sampled.constant(names)
    always = [f"{name} was always {value:g}" for name, value in constant.items()]
    always += [f"{name} did not distinguish the answers to a prompt" for name in names if name not in constant]
    note = (
        f"{counts}, and in no step was there anything to learn: {'; '.join(always)}."
        f" Fix {where}.rewards, or sample more different answers (temperature, num_generations)"
    )
    severity, count = "warn" if accepted else "error", len(sampled.rows)
    return CheckResult("rewards_differ", False, severity, blocking=not accepted, count=count, note=note)


def _starts_as_the_reference(
    start: Mapping[str, float], history: TrainingHistory, method: AlignmentMethod, has_router: bool
) -> CheckResult:
    first = history.validation[0][1] if history.validation and history.validation[0][0] == 0 else history.losses[0]
    expected, of_loss = method.check_first_loss(first, has_router)
    passed, largest = expected and not any(start.values()), start["largest_log_probability_difference"]
    note = f"KL {start['kl_per_token']:g} nats a token, log-probabilities differ by {largest:g}{of_loss}"
    return CheckResult("starts_as_the_reference", passed=passed, blocking=True, note=note)


def _improved(measured: Mapping[str, Any], examples: int) -> CheckResult:
    """Whether what is learned shows on held-out pairs or tasks."""
    if "preference" in measured:
        return _prefers(measured["preference"]["accuracy"], examples)
    reward, prompts = measured["held_out"]["reward"], measured["watch"]["prompts"]
    low, high = reward["interval"]
    rise = f"reward {reward['sft']:.3f} -> {reward['aligned']:.3f}"
    note = f"{rise} on {prompts} held-out tasks (difference {low:+.3f} to {high:+.3f})"
    independent = measured["watch"].get("independent", prompts)
    if independent < FEWEST:
        once = f" ({independent} if near-copies count once)" if independent < prompts else ""
        note += f"{once}; nothing can be concluded from fewer than {FEWEST}: raise splits.validation, or add records"
    passed = low > 0 and independent >= FEWEST
    return CheckResult("solves_more_held_out_tasks", passed=passed, severity="warn", note=note)


def _prefers(accuracy: Mapping[str, Any], pairs: int) -> CheckResult:
    low, high = accuracy["aligned_interval"]
    after, before = accuracy["aligned"], accuracy["sft"]
    note = f"{after:.3f} of {pairs} held-out pairs ({low:.3f} to {high:.3f}), {before:.3f} before"
    return CheckResult("prefers_as_people_do", passed=low > 0.5, severity="warn", note=note)


def _not_gamed(signs: Sequence[str], watch: Mapping[str, Any], reward_model: Path | None) -> CheckResult:
    note = "no reward model watches: length, repetition and unfinished answers were compared"
    if signs:
        note = "; ".join(signs)
    elif "reward" in watch:
        note = "reward {sft:.3f} -> {aligned:.3f}".format(**watch["reward"])
    elif reward_model:
        note = "rewards were not measured"
    return CheckResult("reward_is_not_gamed", passed=not signs, severity="warn", note=note)


def _examine(sources: Sources, params: Params, method: AlignmentMethod, where: str) -> tuple[bool, CheckResult | None]:
    """Whether the reward model can score answers, and the check `reward_model_is_reliable`, if there is one.

    The check blocks methods that learn from the reward model's scores. Other methods are only monitored with it: they
    continue and report the failure.

    Raises:
        InputError: the method learns from a reward model of another tokenizer.
    """
    learns, reward_model = method.learns_from_rewards and bool(params.rewards.get(MODEL)), sources.reward_model
    if reward_model is None:
        return False, None
    usable = (reward_model / "config.json").is_file()
    failed = failed_checks(reward_model)
    problems = [f"{name}: {note}" for name, note in failed.items()]
    tokenizer = reward_model / "tokenizer.json"
    if tokenizer.is_file() and tokenizer.read_bytes() != (sources.sft / "tokenizer.json").read_bytes():
        problem = f"the reward model has another tokenizer than {params.adapter}"
        if learns:
            raise InputError(f"params.yaml: {where}: {problem}", "make it from the same base model: reward_model.model")
        usable, problems = False, [*problems, problem]
    note, failure = "", f"the reward model failed its checks ({'; '.join(problems)})"
    if problems and learns:
        lower = "lower reward_model.min_accuracy if that accuracy is enough, "
        note = (
            f"{params.method} learns from its rewards, and {failure}."
            f" In params.yaml: {lower if 'prefers_as_people_do' in failed else ''}train a better one"
            " (reward_model.model, more pairs in raw_preferences.sources),"
            f" or reward by rules alone, {where}.rewards: {{distinct: 1.0}}"
        )
    elif problems:
        scored = "no rewards of held-out answers were measured"
        if usable:
            scored = "the rewards on held-out answers come from it"
        note = f"{params.method} does not learn from the reward model and continued; {scored}; {failure}"
    severity, count = "error" if learns else "warn", len(problems)
    return usable, CheckResult(
        "reward_model_is_reliable", not problems, severity, blocking=learns, count=count, note=note
    )


def _read(params: Params, sources: Sources, where: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Pairs by split, or tasks in their place with what the report says of them."""
    if sources.splits is None:
        return {split: read_preferences(sources.preferences / split) for split in ("train", "validation", "test")}, {}
    found, counts = tasks.tasks_of(sources.splits, _ready(params, sources, where))
    return found, {"tasks": counts}


def _ready(params: Params, sources: Sources, where: str) -> dict[str, ReadyReward]:
    return ready(params.rewards, f"{where}.rewards", _root_of(sources.functions))


def _examples(
    params: Params, method: AlignmentMethod, sources: Sources, where: str
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """As `_read`, after faults were found that would otherwise show late, when a model is loaded.

    Raises:
        InputError: there is one.
    """
    pairs, counts = _read(params, sources, where)
    if pairs["train"]:
        method.refuse_few_prompts(len(pairs["train"]), params, where)
    if not (sources.sft / "config.json").is_file():
        problem = f"params.yaml: {where}.adapter: {params.adapter} is not a standalone model"
        raise InputError(problem, "name a variant that is merged")
    if counts:
        for reward in _ready(params, sources, where).values():
            reward.probe()
        tasks.refuse_without_tasks(counts["tasks"], where)
        tasks.refuse_misfits(tokenizer_of(sources.sft), pairs, f"data/merged/{params.adapter}")
        return pairs, counts
    for split in ("train", "test"):
        if not pairs[split]:
            hint = "name more pairs in raw_preferences.sources"
            raise InputError(f"data/preferences: no pair in the {split} split", hint)
    if method.given_teacher and sources.larger:
        teacher.verify(method.given_teacher, sources.larger, sources.sft, f"{where}.options.teacher")
    if method.learns_from_rewards:
        refuse_missing_targets(_ready(params, sources, where), pairs["train"], f"{where}.rewards")
    refuse_misfits(tokenizer_of(sources.sft), pairs, f"data/merged/{params.adapter}")
    return pairs, counts
