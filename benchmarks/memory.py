"""Peak memory of training, predicted beside measured. usage: python benchmarks/memory.py [--tiny | --base-model FOLDER] [--method NAME ...]

Each method really trains three steps in a process of its own, through the code that trains in the pipeline, with one thread. Measured is the
process's largest resident size (on a GPU: what torch allocated), predicted is `training.memory.predict`, from the configuration alone.
Memory figures hold on a busy machine. Times are CPU seconds of one step, beside `doors.plan`'s for this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ALL = {"target_modules": "all-linear"}
SOME = {"target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"r": 16, **ALL},
    "lora_upper": {"r": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "upper": 3},
    "rslora": {"r": 16, **ALL},
    "dora": {"r": 16, **ALL},
    "qlora": {"r": 16, **ALL},
    "qdora": {"r": 16, **ALL},
    "adalora": {"total_step": 100, **ALL},
    "ia3": {},
    "layernorm": {},
    "loha": {"r": 8, **SOME},
    "lokr": {"r": 8, **SOME},
    "oft": {**SOME},
    "boft": {**SOME},
    "vera": {**SOME},
    "hra": {"r": 8, **SOME},
    "fourierft": {**SOME},
    "randlora": {**SOME},
}
"""Name -> its keys. `upper`: only that share of the layers learns, one in `upper` from the top."""


def settings(name: str, layers: int) -> tuple[str, dict[str, Any]]:
    options = dict(METHODS[name])
    if upper := options.pop("upper", 0):
        options["layers_to_transform"] = list(range(layers - layers // upper, layers))
    return name.removesuffix("_upper"), options


def child(name: str, base_model: Path, dtype_name: str, length: int, checkpointing: bool) -> None:
    """Train three steps of one row of `length` tokens, half of which count, and print what it took."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer

    from dagster_project.params import Compute
    from dagster_project.training import memory
    from dagster_project.training.hardware import prepare
    from dagster_project.training.methods import build
    from dagster_project.training.sft import Recipe, train

    compute = Compute(threads=1, dtype=dtype_name)
    device, dtype = prepare(compute)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    method, options = settings(name, AutoConfig.from_pretrained(base_model).num_hidden_layers)
    model = build(method, options, base_model, device, dtype, "benchmark", merge=False, total_steps=3)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    one = [3 + i % 40 for i in range(64)]  # an example of 64 tokens
    row = {
        "input_ids": one * (length // 64),
        "labels": ([-100] * 32 + one[32:]) * (length // 64),
        "weights": ([0.0] * 32 + [1.0] * 32) * (length // 64),
        "lengths": [64] * (length // 64),
    }
    stamps: list[float] = []
    register_optimizer_step_post_hook(lambda *_: stamps.append(time.process_time()))
    train(model, tokenizer, Dataset.from_list([row] * 3), None, Recipe(num_train_epochs=1, gradient_checkpointing=checkpointing), compute)
    print(json.dumps({"peak": memory.peak(device.type), "seconds": (stamps[-1] - stamps[0]) / (len(stamps) - 1), "device": device.type}))


def python(*arguments: str) -> str:
    """Standard output of a Python process with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def tiny_model(folder: Path) -> Path:
    """A folder with a two-layer random Llama and a tokenizer of three words."""
    make = (
        "import sys; from tokenizers import Tokenizer, models; from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'a': 0, 'b': 1, 'c': 2}, unk_token='a')),"
        " eos_token='b', pad_token='c').save_pretrained(sys.argv[1])\n"
        "LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2,"
        " num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)).save_pretrained(sys.argv[1])\nprint()"
    )
    python("-c", make, str(folder))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers: what is measured is the runtime alone")
    parser.add_argument("--base-model", type=Path, default=ROOT / "data" / "base_model", help="default: %(default)s")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--length", nargs="+", type=int, default=[256, 1024], help="tokens of a row (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, dtype, length = options.child.split(",")
        child(name, options.base_model, dtype, int(length), options.gradient_checkpointing)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options, tiny_model(Path(folder)) if options.tiny else options.base_model)


def compare(options: argparse.Namespace, base_model: Path) -> None:
    cases = [(name, dtype, length) for dtype in options.dtype for length in options.length for name in options.method]
    flags = ["--gradient-checkpointing"] if options.gradient_checkpointing else []
    # before torch is imported here: a process starts with its parent's largest resident size as its own
    measured = []
    for case in cases:
        print(f"training {' '.join(map(str, case))}", file=sys.stderr, flush=True)
        measured.append(json.loads(python(__file__, "--base-model", str(base_model), "--child", ",".join(map(str, case)), *flags)))
    runtime = int(python("-c", "from dagster_project.training.memory import resident; print(resident())"))

    import torch
    from transformers import AutoConfig

    from dagster_project.doors.plan import measure_speed
    from dagster_project.training.memory import predict

    torch.set_num_threads(1)
    device = measured[0]["device"]
    speed = {dtype: measure_speed(getattr(torch, dtype), device) for dtype in options.dtype}
    layers = AutoConfig.from_pretrained(base_model).num_hidden_layers
    errors, ratios, extra = [], [], []
    print(
        f"{'method':20}{'dtype':10}{'tokens':>7}{'predicted MB':>14}{'measured MB':>13}{'error':>8}   {'s a step, predicted':>20}{'measured':>10}"
    )
    for (name, dtype, length), found in zip(cases, measured, strict=True):
        method, keys = settings(name, layers)
        took = predict(
            base_model,
            method,
            keys,
            tokens=length,
            counted=length // 2,
            dtype=getattr(torch, dtype),
            device=device,
            runtime=runtime if device == "cpu" else 0,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        seconds = took.flops / speed[dtype].products + took.moved / speed[dtype].bytes
        errors.append(took.memory.total / found["peak"] - 1)
        ratios.append(found["seconds"] / seconds)
        extra.append(found["peak"] - took.memory.total)
        print(
            f"{name:20}{dtype:10}{length:7}{took.memory.total / 1e6:14,.0f}{found['peak'] / 1e6:13,.0f}{100 * errors[-1]:+7.1f}%"
            f"   {seconds:20.2f}{found['seconds']:10.2f}",
            flush=True,
        )
    print(f"error of memory: median {100 * statistics.median(map(abs, errors)):.1f} %, worst {100 * max(errors, key=abs):+.1f} %")
    print(f"measured / predicted seconds of a step: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    if options.tiny:
        print(f"beyond what was predicted, median: {statistics.median(extra) / 2**20:.0f} MB (training/memory.py: STARTED)")


if __name__ == "__main__":
    main()
