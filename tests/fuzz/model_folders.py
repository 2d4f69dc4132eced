"""Model folders that others made: config, tokenizer, template and weights, as
`base_model`, `check --base-model` and `plan --model` read them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from builders.files import jsonl

from fuzz.base_model import CONFIG, converted, model_folder, safetensors, weights
from fuzz.surface import Case, Surface, answered, as_content, write_files
from fuzz.values import NUMBERS, TEXTS, damaged, like, scalar, text, value

CONFIG_KEYS = [
    *CONFIG,
    "auto_map",
    "quantization_config",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "text_config",
    "num_labels",
    "id2label",
    "use_cache",
    "pretraining_tp",
    "transformers_version",
    "_name_or_path",
    "is_encoder_decoder",
    "attn_implementation",
    "tokenizer_class",
]
OTHER_CONFIGS: list[Any] = [
    [],
    None,
    3,
    {},
    {"model_type": "nothing"},
    {"model_type": "bert"},
    {"model_type": "t5"},
    {"model_type": ["llama"]},
    {"architectures": ["X"]},
    {**CONFIG, "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"},
    {**CONFIG, "quantization_config": {"quant_method": "awq", "bits": 4}},
    {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4, "dataset": "c4"}},
    {**CONFIG, "model_type": "qwen2"},
    {**CONFIG, "model_type": "gpt2"},
    {**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 0}},
    {**CONFIG, "rope_scaling": {"type": "linear"}},
    {**CONFIG, "text_config": CONFIG, "model_type": "llava"},
]
TEMPLATES = [
    "", "{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ 1/0 }}",
    "{{ raise_exception('no') }}", "{% if %}", "{{ messages[99].x.y }}", "{{ ''.__class__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 10**5 }}", "{{ strftime_now('%Y') }}",
    "{% include 'x' %}", "{{ messages | tojson(indent=4) }}", "{{ lipsum() }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
]  # fmt: skip
LISTED_TEMPLATES: list[Any] = [
    [],
    [{}],
    [{"name": "default", "template": "{{ messages }}"}],
    [{"name": "tool_use", "template": "x"}],
    [{"name": "default"}],
    {"default": "x"},
    3,
    [["default", "x"]],
    None,
    {},
    "x",
]
WAYS = ("produce",) * 20 + ("check",) * 12 + ("plan",)
"""`plan` measures the machine in a process of its own, which takes seconds."""


def draw(random: random.Random) -> Case:
    changed: dict[str, bytes] = {}
    removed: list[str] = []
    for change in random.choices(CHANGES, k=random.choice([1, 1, 2, 3])):
        change(random, changed, removed)
    section: dict[str, Any] = {"license": "MIT"}
    if random.random() < 0.2:
        section["chat_template"] = random.choice(["chatml", "hermes", "alpaca"])
    if random.random() < 0.1:
        section["pad_token"] = random.choice(["<|im_end|>", "<|endoftext|>", text(random)])
    return {
        "files": {name: as_content(content) for name, content in changed.items()},
        "removed": removed,
        "section": section,
        "way": random.choice(WAYS),
    }


def _dump(values: Any) -> bytes:
    return json.dumps(values).encode()


def _config(random: random.Random, changed: dict[str, bytes], removed: list[str]) -> None:
    kind = random.random()
    if kind < 0.2:
        changed["config.json"] = _dump(random.choice(OTHER_CONFIGS))
    elif kind < 0.7:
        changed["config.json"] = _dump(
            {
                **CONFIG,
                **{
                    random.choice(CONFIG_KEYS): random.choice(
                        [scalar(random), random.choice(NUMBERS[:12]), value(random, 2)]
                    )
                    for _ in range(random.randint(1, 3))
                },
            }
        )
    elif kind < 0.85:
        changed["config.json"] = _dump(like(random, CONFIG, 0.05))
    else:
        changed["config.json"] = damaged(random, _dump(CONFIG))


def _json_file(name: str) -> Any:
    def change(random: random.Random, changed: dict[str, bytes], removed: list[str]) -> None:
        content = model_folder()[name]
        kind = random.random()
        if kind < 0.55:
            changed[name] = _dump(like(random, json.loads(content), random.choice([0.01, 0.05])))
        elif kind < 0.65:
            changed[name] = _dump(value(random))
        else:
            changed[name] = damaged(random, content)

    return change


def _template(random: random.Random, changed: dict[str, bytes], removed: list[str]) -> None:
    config = json.loads(model_folder()["tokenizer_config.json"])
    template = random.choice(
        [*TEMPLATES, *TEXTS.values(), damaged(random, config["chat_template"].encode()).decode(errors="replace")]
    )
    kind = random.random()
    if kind < 0.4:
        changed["tokenizer_config.json"] = _dump({**config, "chat_template": template})
    elif kind < 0.6:
        changed["tokenizer_config.json"] = _dump({**config, "chat_template": random.choice(LISTED_TEMPLATES)})
    elif kind < 0.8:
        changed["chat_template.jinja"] = template.encode("utf-8", "surrogatepass")
    elif kind < 0.9:
        changed["chat_template.json"] = _dump(random.choice([{"chat_template": template}, *LISTED_TEMPLATES]))
    else:
        changed["additional_chat_templates/tool_use.jinja"] = template.encode("utf-8", "surrogatepass")


def _weights(random: random.Random, changed: dict[str, bytes], removed: list[str]) -> None:
    header, content = weights()
    header = json.loads(json.dumps(header))
    kind = random.choice(
        ["like", "shape", "dtype", "offsets", "missing", "extra", "damaged", "cut", "huge", "metadata", "length"]
    )
    name = random.choice([*header])
    if kind == "like":
        header = like(random, header, 0.03)
    elif kind == "shape":
        header[name]["shape"] = random.choice(
            [[], [0], [2**40, 2**40], [-1, 8], [8.5], "x", list(reversed(header[name]["shape"])), [1] * 70]
        )
    elif kind == "dtype":
        header[name]["dtype"] = random.choice(["F16", "BF16", "I8", "F8_E4M3", "BOOL", "x", None, 3, "F4"])
    elif kind == "offsets":
        header[name]["data_offsets"] = random.choice(
            [[0, 0], [8, 0], [0, 2**63], [-8, 8], [0], "x", header[random.choice([*header])]["data_offsets"]]
        )
    elif kind == "missing":
        del header[name]
    elif kind == "extra":
        header[random.choice(["lm_head.weight", "x", "", "__metadata__", "\x1b[2J"])] = {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [0, 0],
        }
    elif kind == "metadata":
        header["__metadata__"] = value(random)
    found = safetensors(header, content)
    if kind == "damaged":
        found = damaged(random, found)
    elif kind == "cut":
        found = found[: random.choice([0, 1, 7, 8, 9, 100, len(found) - 1])]
    elif kind in {"huge", "length"}:
        found = random.choice([2**63, 2**64 - 1, 10**8, 10**8 + 1, 0, len(found)]).to_bytes(8, "little") + found[8:]
    changed["model.safetensors"] = found


def _index(random: random.Random, changed: dict[str, bytes], removed: list[str]) -> None:
    header, _ = weights()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(header, "model-00001-of-00001.safetensors")}
    changed["model-00001-of-00001.safetensors"] = model_folder()["model.safetensors"]
    changed["model.safetensors.index.json"] = (
        _dump(like(random, index, 0.05)) if random.random() < 0.7 else damaged(random, _dump(index))
    )
    if random.random() < 0.7:
        removed.append("model.safetensors")


def _other_files(random: random.Random, changed: dict[str, bytes], removed: list[str]) -> None:
    name = random.choice(
        [
            "adapter_config.json",
            "pytorch_model.bin",
            "modeling_evil.py",
            "LICENSE",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "tokenizer.model",
            "processor_config.json",
            "preprocessor_config.json",
            "model.safetensors/x",
            "generation_config.json",
        ]
    )
    if name == "model.safetensors/x":
        removed.append("model.safetensors")
    changed[name] = random.choice(
        [_dump(value(random)), b"", b"\xff\xfe", text(random).encode("utf-8", "surrogatepass")]
    )


def _without(random: random.Random, changed: dict[str, bytes], removed: list[str]) -> None:
    removed.append(random.choice([*model_folder()]))


CHANGES = (
    _config,
    _config,
    _config,
    _json_file("tokenizer.json"),
    _json_file("tokenizer.json"),
    _json_file("tokenizer_config.json"),
    _json_file("generation_config.json"),
    _template,
    _template,
    _weights,
    _weights,
    _index,
    _other_files,
    _without,
)


def play(case: Case, folder: Path) -> str:
    model = folder / "models/x"
    files = {name: as_content(content) for name, content in model_folder().items() if name not in case["removed"]}
    changed = {
        name: content
        for name, content in case["files"].items()
        if f"{name.partition('/')[0]}" not in files or "/" not in name
    }
    write_files({"files": {**files, **changed}}, model)
    if case["way"] == "produce":
        return converted(folder, {**case["section"], "folder": "models/x"})
    if case["way"] == "plan":
        code, document = answered("plan", "--model", str(model), "--device", "cpu")
        return f"plan: exit code {code}"
    rows = [{"instruction": f"Where does river {i} begin?", "output": f"In the hills near mill {i}."} for i in range(3)]
    jsonl(folder / "a.jsonl", *rows)
    code, document = answered("check", "a.jsonl", "--base-model", "models/x", "--show", "2")
    assert document is None or document["rows"] == 3
    return f"check: exit code {code}"


SURFACE = Surface("model_folders", 1_000, draw, play)
