"""An adapter that is merged of others: what the methods compute, what is refused, and what dvc.yaml lists."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.adapters import changes, factors, make_adapter, scale
from conftest import ROOT

from dagster_project.commands import pipeline_file
from dagster_project.commands.adapter_reads import listed, write_reads
from dagster_project.commands.pipeline_file import current_lock, pipeline_text, update_pipeline
from dagster_project.core.context import Documents, StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.params import Compute
from dagster_project.core.records import Report
from dagster_project.lineage import code_lock
from dagster_project.lineage.export import summary
from dagster_project.stages import adapter, comparison
from dagster_project.training.trainers.merging.merge import CHECK, merge_adapters

MERGED = {"merge_of": {"a": 0.6, "b": 0.4}}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the root of a clone, where data/base_model, which the adapters of
    the tests name, is another model once the pipeline has run."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the outputs of all adapters."""
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(tiny_model, folder / "a", 1)
    make_adapter(tiny_model, folder / "b", 2)
    make_adapter(tiny_model, folder / "wide", 3, r=6, lora_alpha=9)
    make_adapter(tiny_model, folder / "stable", 4, "rslora", r=4, lora_alpha=4)
    make_adapter(tiny_model, folder / "patterned", 5, alpha_pattern={"v_proj": 2})
    return folder


def merge(adapters: Path, model: Path, out: Path, seed: int = 7, **entry: Any) -> Report:
    out.mkdir(parents=True)
    compute = Compute(seed=seed, threads=1, dtype="float32")
    return merge_adapters("soup", adapter.Params(**entry), compute, adapters, model, out, out.parent / "loss.csv")


def weighted_sum(adapters: Path, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    parts = [(weight, changes(adapters / name)) for name, weight in weights.items()]
    return {module: sum(weight * found[module] for weight, found in parts) for module in parts[0][1]}


def distance(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Relative to the norm of `theirs`."""
    squares = [(((ours[name] - theirs[name]) ** 2).sum(), (theirs[name] ** 2).sum()) for name in theirs]
    return math.sqrt(sum(one for one, _ in squares) / sum(one for _, one in squares))


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 0.6, "b": 0.4},
        {"a": 1.0, "b": -0.5},
        {"a": 0.5, "wide": 0.3, "b": 0.2},
        {"stable": 0.7, "a": 0.3},
        {"patterned": 0.5, "b": 0.5},
    ],
    ids=["two", "negative weight", "ranks differ", "rslora", "alpha of a module"],
)
def test_by_default_the_change_of_the_weights_is_the_weighted_sum_of_the_changes(
    adapters: Path, tiny_model: Path, tmp_path: Path, weights: dict[str, float]
) -> None:
    report = merge(adapters, tiny_model, tmp_path / "soup", merge_of=weights)
    assert distance(changes(tmp_path / "soup"), weighted_sum(adapters, weights)) < 1e-6
    assert report.metrics["distance_from_weighted_sum"] < 1e-6
    assert [(check.name, check.passed, check.blocking) for check in report.checks] == [(CHECK, True, True)]


def test_svd_with_the_rank_of_the_sum_is_the_weighted_sum_and_with_less_its_best_approximation(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    whole = weighted_sum(adapters, MERGED["merge_of"])
    merge(adapters, tiny_model, tmp_path / "whole", **MERGED, method="svd", peft={"svd_rank": 8})
    assert distance(changes(tmp_path / "whole"), whole) < 1e-5
    merge(adapters, tiny_model, tmp_path / "less", **MERGED, method="svd", peft={"svd_rank": 3})
    assert distance(changes(tmp_path / "less"), {name: truncated(change, 3) for name, change in whole.items()}) < 1e-5


def test_a_rank_that_a_weight_does_not_have_is_refused_as_peft_could_not_load_the_result(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    sizes = {min(pair["B"].shape[0], pair["A"].shape[1]) for pair in factors(adapters / "a").values()}
    most = min(sizes)
    merge(adapters, tiny_model, tmp_path / "most", **MERGED, method="svd", peft={"svd_rank": most})
    with pytest.raises(InputError, match=rf"svd_rank: the rank is {most + 1}, and a weight has {most} rows or columns"):
        merge(adapters, tiny_model, tmp_path / "more", **MERGED, method="svd", peft={"svd_rank": most + 1})


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The matrix of this rank that is closest to another one (Eckart and Young)."""
    u, s, v = np.linalg.svd(matrix)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def of_factors(
    adapters: Path, weights: Mapping[str, float], combine: Callable[[list[np.ndarray], list[float]], np.ndarray]
) -> dict[str, np.ndarray]:
    """Changes by a method that combines the matrices A with each other, and the
    matrices B: each with the root of weight and scale."""
    found = {name: factors(adapters / name) for name in weights}
    merged = {}
    for module in found["a"]:
        roots = [math.sqrt(weight * scale(adapters / name, module)) for name, weight in weights.items()]
        one, two = (combine([found[name][module][factor] for name in weights], roots) for factor in ("A", "B"))
        merged[module] = two @ one
    return merged


def test_linear_of_peft_adds_the_factors_so_that_it_is_far_from_the_weighted_sum_and_the_report_says_how_far(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    weights = MERGED["merge_of"]
    report = merge(adapters, tiny_model, tmp_path / "soup", **MERGED, method="linear")
    expected = of_factors(
        adapters, weights, lambda parts, roots: np.asarray(sum(r * p for r, p in zip(roots, parts, strict=True)))
    )
    assert distance(changes(tmp_path / "soup"), expected) < 1e-6
    away = distance(changes(tmp_path / "soup"), weighted_sum(adapters, weights))
    assert away > 0.5
    assert report.metrics["distance_from_weighted_sum"] == pytest.approx(away, rel=1e-2)


def ties(parts: Sequence[np.ndarray], weights: Sequence[float], density: float, by_number: bool = False) -> np.ndarray:
    """TIES-Merging (arXiv 2306.01708, algorithm 1): keep the largest values of
    each task, elect a sign for each value, and average those that have it."""
    trimmed = []
    for part in parts:
        kept = np.sort(np.abs(part).ravel())[::-1][: int(density * part.size)]
        trimmed.append(np.where(np.abs(part) >= kept[-1], part, 0))
    votes = sum(np.sign(part) if by_number else part for part in trimmed)
    elected = np.where(np.asarray(votes) >= 0, 1, -1)
    agreeing = [np.sign(part) == elected for part in trimmed]
    total = sum(weight * part * agrees for weight, part, agrees in zip(weights, trimmed, agreeing, strict=True))
    return np.asarray(total / np.maximum(sum(agrees.astype(int) for agrees in agreeing), 1))


@pytest.mark.parametrize("by_number", [False, True], ids=["total", "frequency"])
def test_ties_is_the_algorithm_of_the_paper_on_each_factor(
    adapters: Path, tiny_model: Path, tmp_path: Path, by_number: bool
) -> None:
    keys = {"density": 0.4, **({"majority_sign_method": "frequency"} if by_number else {})}
    weights = {"a": 0.5, "b": 0.2, "patterned": 0.3}
    merge(adapters, tiny_model, tmp_path / "soup", merge_of=weights, method="ties", peft=keys)
    expected = of_factors(adapters, weights, lambda parts, roots: ties(parts, roots, 0.4, by_number))
    assert distance(changes(tmp_path / "soup"), expected) < 1e-5


def test_ties_svd_is_the_algorithm_of_the_paper_on_the_changes_and_then_their_best_approximation(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    merge(adapters, tiny_model, tmp_path / "soup", **MERGED, method="ties_svd", peft={"density": 0.4, "svd_rank": 5})
    parts = [changes(adapters / name) for name in ("a", "b")]
    expected = {name: truncated(ties([part[name] for part in parts], [0.6, 0.4], 0.4), 5) for name in parts[0]}
    assert distance(changes(tmp_path / "soup"), expected) < 1e-4


def test_dare_keeps_about_the_given_share_of_the_values_scaled_up_and_draws_them_by_the_seed(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def bytes_of(name: str, **given: Any) -> bytes:
        merge(
            adapters,
            tiny_model,
            tmp_path / name,
            merge_of={"a": 1.0, "b": 1.0},
            method="dare_linear",
            peft={"density": 0.25},
            **given,
        )
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert bytes_of("one") == bytes_of("two") != bytes_of("other seed", seed=8)
    parts, merged = [factors(adapters / name) for name in ("a", "b")], factors(tmp_path / "one")
    kept = [0, 0]
    for module in merged:
        root = math.sqrt(scale(adapters / "a", module))
        one, two = (root * part[module]["A"] / 0.25 for part in parts)
        ways = {(x, y): np.isclose(merged[module]["A"], x * one + y * two, atol=1e-6) for x in (0, 1) for y in (0, 1)}
        assert np.logical_or.reduce(list(ways.values())).all()
        kept = [kept[0] + int((ways[1, 0] | ways[1, 1]).sum()), kept[1] + one.size]
    assert kept[0] / kept[1] == pytest.approx(0.25, abs=0.05)


def test_the_same_inputs_give_the_same_files_which_load_as_any_adapter_and_name_what_was_merged(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from dagster_project.stages import merged

    for name in ("one", "two"):
        merge(adapters, tiny_model, tmp_path / name / "soup", **MERGED, method="ties_svd", peft={"density": 0.5})
    files = [{path.name: path.read_bytes() for path in (tmp_path / name / "soup").iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert {*files[0]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "method.json",
        "training.json",
    }
    document = json.loads(files[0]["training.json"])
    assert {name: one["weight"] for name, one in document["merge_of"].items()} == MERGED["merge_of"]
    assert (document["steps"], document["tokens"], document["trained_tokens"]) == (23, 2003, 203)  # of both trainings
    report = merged.produce(Compute(threads=1), tiny_model, tmp_path / "one" / "soup", out=tmp_path / "merged")
    assert [check.passed for check in report.checks] == [True]


def test_a_training_that_two_merged_adapters_share_counts_once(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from shutil import copytree

    copytree(adapters, tmp_path / "adapter")
    merge(tmp_path / "adapter", tiny_model, tmp_path / "adapter/soup", **MERGED)
    merge(tmp_path / "adapter", tiny_model, tmp_path / "adapter/both", merge_of={"soup": 0.5, "a": 0.5})
    document = json.loads((tmp_path / "adapter/both/training.json").read_text())
    assert [*document["trainings"]] == ["a", "b"]
    assert (document["steps"], document["tokens"], document["trained_tokens"]) == (23, 2003, 203)


def test_adapters_of_a_quantized_model_give_one_that_says_so_and_one_can_stay_separate(
    tiny_model: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        make_adapter(tiny_model, tmp_path / "adapter" / name, seed, "qlora", quantization="nf4")
    merge(tmp_path / "adapter", tiny_model, tmp_path / "soup", **MERGED, merge=False)
    record = json.loads((tmp_path / "soup/method.json").read_text())
    assert record == {
        "method": "lora",
        "quantization": "nf4",
        "merge": False,
        "why_not": "params.yaml says merge: false",
    }
    assert distance(changes(tmp_path / "soup"), weighted_sum(tmp_path / "adapter", MERGED["merge_of"])) < 1e-6


def test_pages_and_curves_of_an_earlier_training_under_the_name_are_removed_and_none_is_drawn(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from shutil import copytree

    from dagster_project.pipeline import PEDIGREE

    copytree(adapters, tmp_path / "data/adapter")
    copytree(tiny_model, tmp_path / "data/base_model")
    pages, live = tmp_path / "data/pages/adapter/soup", tmp_path / "data/live/adapter/soup"
    for file in (pages / "training.html", pages / "history.json", pages / "audit.html", live / "loss.tsv"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"curve": []}')
    values = {"adapter": {"a": LORA, "b": LORA, "soup": MERGED}, "compute": {"threads": 1}}
    ctx = StageContext(tmp_path, "adapter", "soup", tmp_path / "scratch", values, {"adapter": "adapter"})
    ctx.out.mkdir(parents=True)
    report = adapter.run(ctx)
    assert [path.name for path in pages.iterdir()] == ["audit.html"] and not live.exists()
    for file in ("history.json", "run.json"):  # such as a training that failed has left since
        (pages / file).write_text('{"curve": [], "measured": {}}')
    PEDIGREE.draw(Documents(tmp_path, ctx.address, ctx.out, pages, report.document()))
    assert not (pages / "training.html").exists()


@pytest.mark.parametrize("method", ["cat", "dare_linear"])
def test_the_order_of_the_adapters_in_params_yaml_which_dvc_does_not_compare_changes_no_byte(
    adapters: Path, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    keys = {"method": method, "peft": {"density": 0.5} if method != "cat" else {}}
    orders = {"one": {"a": 0.6, "patterned": 0.4}, "two": {"patterned": 0.4, "a": 0.6}}
    reports = {
        name: merge(adapters, tiny_model, tmp_path / name, merge_of=order, **keys) for name, order in orders.items()
    }
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in orders]
    assert files[0] == files[1]
    assert json.dumps(reports["one"].document()) == json.dumps(reports["two"].document())
    assert distance(changes(tmp_path / "two"), weighted_sum(adapters, orders["one"])) < 1e-6 or method != "cat"


def test_the_check_fails_where_nothing_is_left_or_a_weight_is_not_finite(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from shutil import copytree

    from safetensors.numpy import load_file, save_file

    own = tmp_path / "adapter"
    for name in ("a", "b"):
        copytree(adapters / name, own / name)
    tensors = load_file(own / "a/adapter_model.safetensors")
    save_file(tensors, own / "b/adapter_model.safetensors")
    report = merge(own, tiny_model, tmp_path / "nothing", merge_of={"a": 1.0, "b": -1.0})
    assert not report.checks[0].passed and "does not change the model" in report.checks[0].note
    first = min(tensors)
    tensors[first] = np.full_like(tensors[first], np.nan)
    save_file(tensors, own / "b/adapter_model.safetensors")
    report = merge(own, tiny_model, tmp_path / "nan", **MERGED)
    assert not report.checks[0].passed and "NaN" in report.checks[0].note


def test_cat_is_the_weighted_sum_also_where_the_adapters_nearly_cancel_and_anything_else_blocks(
    adapters: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import copytree

    from peft import LoraModel
    from safetensors.numpy import load_file, save_file

    own, weights = tmp_path / "adapter", {"a": 0.7, "b": -0.7}
    for name in weights:
        copytree(adapters / "a", own / name)
    noise, tensors = np.random.default_rng(0), load_file(own / "a/adapter_model.safetensors")
    near = {
        name: (tensor * (1 + 1e-3 * noise.standard_normal(tensor.shape))).astype(np.float32)
        for name, tensor in tensors.items()
    }
    save_file(near, own / "b/adapter_model.safetensors")
    report = merge(own, tiny_model, tmp_path / "soup", merge_of=weights)
    assert report.checks[0].passed and report.metrics["distance_from_weighted_sum"] > 1e-5

    add = LoraModel.add_weighted_adapter

    def wrong(self: Any, names: list[str], given: list[float], *others: Any, **keys: Any) -> None:
        add(self, names, [given[0] + 1e-4, *given[1:]], *others, **keys)

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", wrong)
    report = merge(adapters, tiny_model, tmp_path / "wrong", **MERGED)
    assert not report.checks[0].passed and report.checks[0].blocking


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"r": 6, "lora_alpha": 12}, "different r "),
        ({"target_modules": ["q_proj"]}, "different target_modules"),
        ({"layers_to_transform": [0]}, "different layers_to_transform"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"quantization": "nf4"}, "different values of quantization"),
    ],
)
def test_adapters_that_do_not_fit_together_are_refused_by_their_files(
    adapters: Path, tiny_model: Path, tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    from shutil import copytree

    own = tmp_path / "adapter"
    copytree(adapters / "a", own / "a")
    make_adapter(tiny_model, own / "b", 2, **keys)
    with pytest.raises(InputError, match=said):
        merge(own, tiny_model, tmp_path / "soup", **MERGED, method="linear")


def test_another_base_model_chat_template_or_method_is_refused(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from shutil import copytree

    own = tmp_path / "adapter"
    for name in ("a", "b"):
        copytree(adapters / name, own / name)
    (own / "b/chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(InputError, match="chat template"):
        merge(own, tiny_model, tmp_path / "one", **MERGED)
    (own / "b/chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((own / "b/adapter_config.json").read_text())
    (own / "b/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "data/other"}))
    with pytest.raises(InputError, match="different base_model_name_or_path"):
        merge(own, tiny_model, tmp_path / "two", **MERGED)
    (own / "b/adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(InputError, match=r"adapter\.b is not LoRA"):
        merge(own, tiny_model, tmp_path / "three", **MERGED)


LORA: dict[str, Any] = {"method": "lora", "peft": {"r": 4}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"soup": {"merge_of": {"a": 1.0}}}, "names 1 adapter"),
        ({"soup": {"merge_of": {"a": 1.0, "x": 1.0}}}, r"there is no adapter\.x"),
        ({"soup": {"merge_of": {"a": 1.0, "soup": 1.0}}}, "merged from itself: soup from soup"),
        ({"b": {"merge_of": {"a": 1.0, "soup": 1.0}}}, "merged from itself: soup from b from soup"),
        ({"soup": {"merge_of": {"a": 0.0, "b": 1.0}}}, r"merge_of\.a: the weight is 0"),
        ({"soup": {**MERGED, "method": "lora"}}, "'lora' is not a way to merge"),
        ({"soup": {**MERGED, "method": "ties"}}, r"peft\.density: missing"),
        ({"soup": {**MERGED, "method": "linear", "peft": {"density": 0.5}}}, r"peft\.density: linear does not use it"),
        ({"soup": {**MERGED, "peft": {"densty": 0.5}}}, "densty: unknown key"),
        ({"soup": {**MERGED, "learning_rate": 1e-3}}, r"soup\.learning_rate: is a key of a training"),
        ({"soup": {**MERGED, "command": "python x.py"}}, r"soup\.command: is a key of a training"),
        ({"b": {"method": "ia3"}}, r"adapter\.b is trained by ia3, which is not LoRA"),
        ({"b": {"method": "full"}}, r"adapter\.b is trained by full, which is not LoRA"),
        ({"b": {"method": "dora"}}, r"adapter\.b has use_dora"),
        ({"b": {"method": "lora", "peft": {"init_lora_weights": "pissa"}}}, "init_lora_weights: pissa"),
        ({"b": {"method": "qlora", "peft": {"r": 4}}}, "quantization is nf4 and none"),
        ({"b": {"method": "lora", "peft": {"r": 8}}, "soup": {**MERGED, "method": "linear"}}, "different r "),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_before_anything_runs(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        validate({"a": LORA, "b": LORA, "soup": MERGED, **change}, tmp_path)


def validate(entries: dict[str, Any], root: Path, name: str = "soup") -> None:
    context = ValidationContext(root, {"adapter": entries, "compute": {}}, f"adapter.{name}")
    adapter.validate(adapter.Params(**entries[name]), context)


def test_a_rank_may_differ_where_the_method_allows_it_and_merges_of_merges_are_accepted(tmp_path: Path) -> None:
    wide = {"method": "lora", "peft": {"r": 8}}
    validate({"a": LORA, "b": wide, "soup": MERGED}, tmp_path)
    validate({"a": {"method": "qlora"}, "b": {"method": "qlora"}, "soup": MERGED}, tmp_path)
    validate(
        {"a": LORA, "b": LORA, "c": LORA, "first": MERGED, "soup": {"merge_of": {"first": 0.5, "c": 0.5}}}, tmp_path
    )


def test_a_variant_rests_on_the_trainings_of_its_parts_and_on_their_checks() -> None:
    reports: dict[str, dict[str, Any]] = {
        name: {}
        for name in (
            "splits",
            "adapter@a",
            "adapter@b",
            "adapter@c",
            "adapter@first",
            "adapter@soup",
            "merged@a",
            "merged@soup",
            "aligned@x",
        )
    }
    reports["adapter@first"]["merge_of"] = {"a": 0.5, "b": 0.5}
    reports["adapter@soup"]["merge_of"] = {"first": 1.0, "a": 1.0}
    reports["aligned@x"] |= {"method": "dpo", "adapter": "soup"}
    parts = ["splits", "adapter@a", "adapter@b", "adapter@first", "adapter@soup", "merged@soup"]
    assert summary.chain("soup", reports) == parts
    assert summary.chain("x", reports) == [*parts, "aligned@x"]
    assert summary.chain("a", reports) == ["splits", "adapter@a", "merged@a"]
    entries = {
        "a": None,
        "b": LORA,
        "first": {"merge_of": {"a": 1.0, "b": 1.0}},
        "soup": {"merge_of": {"first": 1.0, "a": 1.0}},
    }
    trained = comparison._trainings("adapter", "soup", entries["soup"], entries)
    assert trained == ["adapter@a", "adapter@b", "adapter@first", "adapter@soup"]
    assert comparison._trainings("aligned", "x", {"adapter": "soup"}, entries) == [*trained, "merged@soup", "aligned@x"]
    assert comparison._trainings("adapter", "a", {}, entries) == ["adapter@a"]


# ---- what dvc.yaml lists
# -----------------------------------------------------------------------------------------------------------------

TWO = {"a": LORA, "b": None, "soup": MERGED}


@pytest.mark.parametrize("text", [(ROOT / "dvc.yaml").read_text(), pipeline_text()], ids=["clone", "installed package"])
def test_the_pipeline_is_as_before_without_merged_adapters_and_lists_what_each_reads_with_them(text: str) -> None:
    from ruamel.yaml import YAML

    assert listed(text, {"a": LORA}) == text
    written = listed(text, TWO)
    three = listed(written, {**TWO, "c": LORA, "big": {"merge_of": {"a": 1.0, "b": 1.0, "c": 1.0}}})
    assert listed(written, TWO) == written
    assert listed(three, TWO) == written
    assert listed(three, {"a": LORA}) == text
    before, after = (YAML(typ="safe").load(one)["stages"] for one in (text, written))
    assert {name for name in before if before[name] != after[name]} == {"adapter"}
    assert {key for key in before["adapter"]["do"] if before["adapter"]["do"][key] != after["adapter"]["do"][key]} == {
        "deps"
    }
    reads = {name: item["reads"] for name, item in after["adapter"]["foreach"].items()}
    assert reads["a"] == reads["b"] == [dep for dep in before["adapter"]["do"]["deps"] if dep.startswith("data/")]
    assert reads["soup"] == ["data/base_model", "data/adapter/a", "data/adapter/b"]
    assert [*after["adapter"]["do"]["deps"][3:]] == [
        dep for dep in before["adapter"]["do"]["deps"] if not dep.startswith("data/")
    ]


def test_a_pipeline_that_does_not_list_what_params_yaml_merges_is_refused_until_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())

    def write(entries: dict[str, Any]) -> bool:
        (tmp_path / "params.yaml").write_text(json.dumps({"adapter": entries}))
        return bool(write_reads(tmp_path)["changed"])

    two = {"a": LORA, "b": LORA, "soup": MERGED}
    with pytest.raises(InputError, match="adapter@soup does not read data/adapter/a, data/adapter/b"):
        validate(two, tmp_path)
    assert write(two) and not write(two)
    validate(two, tmp_path)
    with pytest.raises(InputError, match=r"does not list adapter\.c"):
        validate({**two, "c": LORA}, tmp_path, "a")
    with pytest.raises(InputError, match=r"lists adapter\.soup, which params.yaml does not have"):
        validate({"a": LORA, "b": LORA}, tmp_path, "a")
    with pytest.raises(InputError, match="soup is merged of a, c, and its stage reads"):
        validate(
            {"a": LORA, "c": LORA, "b": LORA, "soup": {"merge_of": {"a": 1.0, "c": 1.0}}} | {}, _with(tmp_path, "c")
        )
    with pytest.raises(InputError, match="soup is trained, and its stage reads"):
        validate({"a": LORA, "b": LORA, "soup": LORA}, _with(tmp_path))
    assert write({"a": LORA}) and (tmp_path / "dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": LORA, "soup": {"merge_of": {"a": 1.0, "x": 1.0}}}, r"there is no adapter\.x"),
        ({"a": LORA, "soup": {"merge_of": {"a": 1.0, "soup": 1.0}}}, "merged from itself: soup from soup"),
        (
            {"a": LORA, "b": LORA, "soup": {"merge_of": ["a", "b"]}},
            r"adapter\.soup\.merge_of: Input should be a valid dictionary",
        ),
        (
            {"a": LORA, "b, data/other": LORA, "soup": {"merge_of": {"a": 1.0, "b, data/other": 1.0}}},
            "a variant's name may contain",
        ),
        ({}, "must name at least one variant"),
    ],
)
def test_a_wrong_entry_is_refused_before_it_is_written_into_the_pipeline(
    tmp_path: Path, entries: dict[str, Any], said: str
) -> None:
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text(json.dumps({"adapter": entries}))
    with pytest.raises(InputError, match=said):
        write_reads(tmp_path)
    assert (tmp_path / "dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()


@pytest.mark.parametrize(
    "stage",
    [
        # indented as DVC does it
        "    foreach: ${adapter}\n    do:\n      deps:\n      - data/tokenized\n      - data/base_model\n",
        "    foreach: {a: 1, b: 2}\n    do:\n      deps: [data/tokenized]\n",
        "    matrix: {name: [a]}\n    do:\n      deps: [data/tokenized]\n",
        "    foreach: ${adapter}\n    do:\n      deps:\n",
        f"    foreach: ${{adapter}}\n    do:\n      deps: {'{? ' * 900}a{'}' * 900}\n",
        f"    foreach: ${{adapter}}\n    desc: {'[' * 3000}{']' * 3000}\n    do:\n      deps: [data/tokenized]\n",
    ],
)
def test_a_pipeline_of_another_form_is_refused_and_not_damaged(tmp_path: Path, stage: str) -> None:
    text = f"stages:\n  adapter:\n{stage}      cmd: x\n"
    (tmp_path / "dvc.yaml").write_text(text)
    (tmp_path / "params.yaml").write_text(json.dumps({"adapter": TWO}))
    with pytest.raises(InputError, match=r"dvc\.yaml: the stage `adapter` "):
        write_reads(tmp_path)
    assert (tmp_path / "dvc.yaml").read_text() == text
    (tmp_path / "dvc.yaml").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"dvc\.yaml: not UTF-8"):
        write_reads(tmp_path)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_pipeline_keeps_its_line_ends(tmp_path: Path, ends: str) -> None:
    (tmp_path / "params.yaml").write_text(json.dumps({"adapter": TWO}))
    text = (ROOT / "dvc.yaml").read_text()
    (tmp_path / "dvc.yaml").write_bytes(text.replace("\n", ends).encode())
    assert write_reads(tmp_path)["changed"] and not write_reads(tmp_path)["changed"]
    assert (tmp_path / "dvc.yaml").read_bytes() == listed(text, TWO).replace("\n", ends).encode()


def test_an_upgrade_of_a_project_with_an_installed_package_keeps_the_list(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(pipeline_text())
    (tmp_path / code_lock.FILE).write_text(current_lock().text())
    (tmp_path / "params.yaml").write_text(json.dumps({"adapter": TWO, "reward_model": {}}))
    assert write_reads(tmp_path)["changed"]
    written = (tmp_path / "dvc.yaml").read_text()
    update = update_pipeline(tmp_path, code_lock.read(tmp_path))
    assert (update.edited, update.redefined) == ([], []) and (
        tmp_path / "dvc.yaml"
    ).read_text() == written != pipeline_text()
    assert update.lock == code_lock.read(tmp_path)
    (tmp_path / "dvc.yaml").write_text(written.replace("meta: {group: 3_training", "meta: {group: own"))
    assert update_pipeline(tmp_path, code_lock.read(tmp_path)).edited  # by a person


def test_an_upgrade_that_was_interrupted_after_it_wrote_dvc_yaml_does_not_make_it_an_edited_one(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(pipeline_text())
    (tmp_path / "params.yaml").write_text(json.dumps({"reward_model": {}}))
    before = code_lock.CodeLock("1.0", {}, "that of an earlier dvc.yaml")
    (tmp_path / "dvc.yaml").write_text(listed(pipeline_text(pipeline_file.left_out(tmp_path)), {}))
    update = update_pipeline(tmp_path, before)
    assert not update.edited and update.lock.pipeline == sha256_of_text((tmp_path / "dvc.yaml").read_text())


def _with(root: Path, *more: str) -> Path:
    """A project whose pipeline lists a, b, more adapters and soup, which is merged of a and b."""
    (root / "dvc.yaml").write_text(
        listed((ROOT / "dvc.yaml").read_text(), {"a": LORA, "b": LORA, **dict.fromkeys(more), "soup": MERGED})
    )
    return root
