"""Compare predicted and measured peak memory of training. usage: python benchmarks/memory.py [METHOD...] [--base-model
FOLDER | --tiny] [--out FILE]

Each method is trained by the code of the pipeline, with one thread, in its own process. The measured value is the
maximum resident size of the process (on a GPU: the memory allocated by torch) while it loads the model and takes two
steps; the prediction is that of `training.planning.memory.TrainingSpec`, from the configuration only. Memory figures
are valid on a busy machine; times are not. Times are CPU seconds of the second step, compared with the range that
`pedigree plan` prints.
The table replaces the one in docs/memory.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from children import output_of
from methods import ORDER
from tables import replace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EXAMPLES = (48, 80)
"""Tokens of the examples in a row, alternating: of different lengths, so that methods without packing must pad."""

METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ORDER},
    "lora, all layers": {"target_modules": "all-linear"},
    "dora, all layers": {"target_modules": "all-linear"},
    "lora, upper third": {"target_modules": ["q_proj", "v_proj", "down_proj"], "upper": True},
}
"""Name -> the method's keys; `upper`: only the upper third of the layers is trained."""


def settings(name: str, layers: int) -> tuple[str, dict[str, Any]]:
    """A name of METHODS -> the method and its keys."""
    options = dict(METHODS.get(name, {}))
    if options.pop("upper", None):
        options["layers_to_transform"] = list(range(layers - layers // 3, layers))
    return name.partition(",")[0], options


def child(name: str, dtype: str, cases: list[tuple[int, bool]], base_model: Path) -> None:
    """Measure one method in each case in turn, and print a line for each."""
    import torch

    for length, checkpointing in cases:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the maximum resident size
        found = measure(name, base_model, dtype, length, checkpointing)
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        about = {"method": name, "dtype": dtype, "tokens": length, "checkpointing": checkpointing}
        print(json.dumps({**about, **(found or {"seconds": None}), "peak": peak if found else None}), flush=True)


def example_row(length: int) -> dict[str, Any]:
    """A packed row of `length` tokens; the second half of each example is labeled."""
    n = length // sum(EXAMPLES)
    return {
        "input_ids": [3 + i % 40 for i in range(length)],
        "labels": [-100 if i < size // 2 else 7 for size in EXAMPLES for i in range(size)] * n,
        "weights": [float(i >= size // 2) for size in EXAMPLES for i in range(size)] * n,
        "lengths": list(EXAMPLES) * n,
    }


def measure(name: str, base_model: Path, dtype_name: str, length: int, checkpointing: bool) -> dict[str, Any] | None:
    """Train two steps of one row, and return memory and time; None if the method does not support checkpointing."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer

    from dagster_project.core.params import Compute
    from dagster_project.training.methods.build import build
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.methods.options import CANNOT_CHECKPOINT
    from dagster_project.training.trainers.harness.params import SftParams
    from dagster_project.training.trainers.sft.sft import train

    compute = Compute(threads=1, dtype=dtype_name)
    device, dtype = prepare(compute)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    method, options = settings(name, AutoConfig.from_pretrained(base_model).num_hidden_layers)
    tunable = build(
        method,
        options,
        base_model,
        device,
        dtype,
        "benchmark",
        merge=False,
        total_steps=100,
        categories=["even", "odd"],
    )
    if checkpointing and method in CANNOT_CHECKPOINT:
        return None
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    row = example_row(length)
    if tunable.fit:
        tunable.fit([{**row, "categories": ["even", "odd"] * (length // sum(EXAMPLES))}], [])
        return {"seconds": None} if not checkpointing else None
    stamps: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: stamps.append(time.process_time()))
    recipe = SftParams(num_train_epochs=1, gradient_checkpointing=checkpointing)
    train(tunable, tokenizer, Dataset.from_list([row] * 2), None, recipe, compute)
    hook.remove()
    return {"seconds": stamps[1] - stamps[0]}


def tiny_model(folder: Path) -> Path:
    """A folder with a two-layer random Llama and a tokenizer of three words."""
    make = (
        "import sys; from tokenizers import Tokenizer, models; from transformers import LlamaConfig, LlamaForCausalLM,"
        " PreTrainedTokenizerFast\nPreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'a': 0, 'b': 1,"
        " 'c': 2}, unk_token='a')), eos_token='b',"
        " pad_token='c').save_pretrained(sys.argv[1])\nLlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=64,"
        " intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,"
        " tie_word_embeddings=True)).save_pretrained(sys.argv[1])\nprint()"
    )
    output_of("-c", make, str(folder))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"default: all of {'; '.join(METHODS)}")
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers, to measure only the runtime")
    parser.add_argument("--base-model", type=Path, default=ROOT / "data" / "base_model", help="default: %(default)s")
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"], help="default: both"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024], help="of a row (default: 256 1024)")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=["yes", "no"], default=["no", "yes"], help="default: both"
    )
    parser.add_argument("--measured", type=Path, help="file with measurements; those in it are not repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "memory.md", help="default: %(default)s")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child, given.base_model)
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.tiny:
            given.base_model = tiny_model(Path(folder))
        measured = measure_all(given)
        compare(measured, given)


def measure_all(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measurements of each method in each case, in order."""
    known = given.measured.read_text() if given.measured and given.measured.is_file() else ""
    found = {_case(one): one for one in map(json.loads, known.splitlines())}
    wanted = [
        (name, dtype, tokens, checkpointing)
        for dtype in given.dtype
        for name in given.methods or METHODS
        for tokens in given.tokens
        for checkpointing in (answer == "yes" for answer in sorted(given.checkpointing, reverse=True))
    ]
    for (name, dtype), cases in itertools.groupby(
        (case for case in wanted if case not in found), key=lambda case: case[:2]
    ):
        print(f"training {name}, {dtype}", file=sys.stderr, flush=True)
        arguments = [name, dtype, [case[2:] for case in cases]]
        child = (__file__, "--base-model", str(given.base_model), "--child", json.dumps(arguments))
        lines = output_of(*child).splitlines()
        for line in lines:
            found[_case(json.loads(line))] = json.loads(line)
        if given.measured:
            with given.measured.open("a") as file:
                file.writelines(f"{line}\n" for line in lines)
    return [found[case] for case in wanted if found[case]["peak"]]


def compare(measured: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Print and write the table. Called after all measurements, because the maximum resident size of a process starts
    with that of its parent."""
    code = "from dagster_project.training.planning.memory import resident; print(resident())"
    runtime = int(output_of("-c", code))

    import torch
    from transformers import AutoConfig

    from dagster_project.commands.plan import MARGIN
    from dagster_project.core.params import Compute
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.planning.memory import TrainingSpec

    device, _ = prepare(Compute(threads=1))
    layers = AutoConfig.from_pretrained(given.base_model).num_hidden_layers
    times: dict[Any, tuple[float, float]] = {}
    for one in measured:
        method, options = settings(one["method"], layers)
        took = TrainingSpec(
            device.type,
            getattr(torch, one["dtype"]),
            given.base_model,
            method,
            options,
            example_row(one["tokens"])["lengths"],
            one["tokens"] // 2,
            runtime=runtime if device.type == "cpu" else 0,
            gradient_checkpointing=one["checkpointing"],
        ).prediction
        one["predicted"], one["error"] = took.memory.total, took.memory.total / one["peak"] - 1
        one["range"] = [
            margin * seconds
            for margin, seconds in zip(MARGIN, took.operations.seconds(device, times, time.thread_time), strict=True)
        ]
        print(json.dumps(one), flush=True)
    if given.tiny:
        extra = statistics.median(one["peak"] - one["predicted"] for one in measured)
        print(f"measured minus predicted, median: {extra / 2**20:.0f} MB (training/planning/memory.py: STARTED)")
        return
    replace(given.out, "memory", table(measured, device.type))


def table(measured: list[dict[str, Any]], device: str) -> str:
    """Markdown: a line for each method and dtype, predicted / measured MB and
    the error in each case; then the seconds of a step."""
    cases = sorted({(one["tokens"], one["checkpointing"]) for one in measured})
    heads = [f"{tokens} tokens{', checkpointing' if checkpointing else ''}" for tokens, checkpointing in cases]
    errors = [abs(one["error"]) for one in measured]
    worst = max(measured, key=lambda one: abs(one["error"]))
    timed = [one for one in measured if one["seconds"] is not None]
    inside = sum(one["range"][0] <= one["seconds"] <= one["range"][1] for one in timed)
    lines = [
        (
            f"Peak memory on a {device}, predicted / measured in MB. {len(measured)} cases: error in the median"
            f" {100 * statistics.median(errors):.1f} %, at worst {100 * worst['error']:+.1f} % ({worst['method']})."
        ),
    ]
    by_line = {(one["dtype"], one["method"]): {} for one in measured}
    for one in measured:
        by_line[one["dtype"], one["method"]][one["tokens"], one["checkpointing"]] = one

    def rows(cell: Any) -> list[str]:
        return [
            "",
            f"| method | dtype | {' | '.join(heads)} |",
            f"| --- | --- |{' --- |' * len(cases)}",
            *(
                f"| {name} | {dtype} | {' | '.join(cell(found.get(case)) for case in cases)} |"
                for (dtype, name), found in by_line.items()
            ),
            "",
        ]

    def memory(one: dict[str, Any] | None) -> str:
        return f"{one['predicted'] / 1e6:.0f} / {one['peak'] / 1e6:.0f} ({100 * one['error']:+.1f} %)" if one else ""

    def seconds(one: dict[str, Any] | None) -> str:
        return (
            f"{one['range'][0]:.2f} to {one['range'][1]:.2f} / {one['seconds']:.2f}"
            if one and one["seconds"] is not None
            else ""
        )

    lines += rows(memory)
    lines.append(f"Seconds of a step, predicted / measured CPU seconds. {inside} of {len(timed)} are in the range.")
    return "\n".join([*lines, *rows(seconds)])


def _case(one: dict[str, Any]) -> tuple[Any, ...]:
    return one["method"], one["dtype"], one["tokens"], one["checkpointing"]


if __name__ == "__main__":
    main()
