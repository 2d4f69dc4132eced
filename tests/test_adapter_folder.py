"""`pedigree export --format adapter`: PEFT and transformers load the folder
onto the base model that it names by hash, with the logits of the variant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dagster_project.__main__ import main
from dagster_project.commands.adapter_folder import not_in_vllm

IDS = [[1, 40, 50, 60, 70, 80]]


@pytest.fixture(scope="module")
def made(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(_finished, tmp_path_factory.mktemp("adapters") / "project", symlinks=True))


def export(root: Path, model: str, folder: Path) -> int:
    return main(["export", model, "--format", "adapter", "--out", str(folder), "--project", str(root), "--json"])


@pytest.fixture
def written(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, dict[str, Any]]:
    """The folder of adapter@lora, and the document of the command."""
    assert export(made, "adapter@lora", tmp_path / "lora") == 0
    return tmp_path / "lora", json.loads(capsys.readouterr().out)


def md5(root: Path, stage: str) -> str:
    outs = YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"][stage]["outs"]
    return str(next(out["md5"] for out in outs if out["path"] == f"data/{stage.replace('@', '/')}"))


def base_of(root: Path, path: str = "data/base_model") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(root / path, dtype=torch.float32).eval()


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


def test_peft_loads_it_with_the_logits_of_the_variant(made: Path, written: tuple[Path, dict[str, Any]]) -> None:
    import torch
    from peft import PeftModel

    from dagster_project.training.methods.load import load

    found = logits(PeftModel.from_pretrained(base_of(made), written[0]).eval())
    variant = load(made / "data/adapter/lora", made / "data/base_model", torch.device("cpu"), torch.float32)
    assert torch.equal(found, logits(variant))
    assert torch.allclose(found, logits(base_of(made, "data/merged/lora")), atol=1e-5)
    assert not torch.allclose(found, logits(base_of(made)), atol=1e-5), "the adapter changes the base model"


def test_the_commands_of_its_card_load_the_chat_template_of_the_training(
    made: Path, written: tuple[Path, dict[str, Any]]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = written[0]
    (folder / "chat_template.jinja").write_text("another than the base model's")
    card = (folder / "README.md").read_text()
    names = {one.__name__: one for one in (PeftModel, AutoModelForCausalLM, AutoTokenizer, Path)}
    names |= {"BASE": made / "data/base_model", "FOLDER": folder}  # type: ignore[dict-item]
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    assert names["tokenizer"].chat_template == "another than the base model's" and "lora" in names["model"].peft_config  # type: ignore[attr-defined]
    assert "--lora-modules lora=FOLDER --chat-template FOLDER/chat_template.jinja\n" in card


def test_transformers_loads_it_by_a_name(made: Path, written: tuple[Path, dict[str, Any]]) -> None:
    import torch
    from peft import PeftModel

    model = base_of(made)
    model.load_adapter(str(written[0]), adapter_name="lora")
    assert torch.equal(logits(model.eval()), logits(PeftModel.from_pretrained(base_of(made), written[0]).eval()))


def test_several_share_a_base_model_by_name(made: Path, written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    alone = logits(PeftModel.from_pretrained(base_of(made), written[0]).eval())
    other = Path(shutil.copytree(written[0], tmp_path / "other"))
    weights = other / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    model = PeftModel.from_pretrained(base_of(made), written[0], adapter_name="lora").eval()
    model.load_adapter(other, "other")
    found = {}
    for name in ("other", "lora", "other"):
        model.set_adapter(name)
        found[name] = logits(model)
    assert torch.equal(found["lora"], alone) and not torch.equal(found["other"], alone)


def test_the_base_model_is_named_by_its_hash_and_no_path_of_this_machine_is_in_it(
    made: Path, written: tuple[Path, dict[str, Any]]
) -> None:
    folder, document = written
    name = f"base_model-{md5(made, 'base_model')[:8]}"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name == document["base"]["name"] and document["base"]["md5"] == md5(
        made, "base_model"
    )
    assert document["model"] == {"stage": "adapter@lora", "md5": md5(made, "adapter@lora")} and document["vllm"] == []
    assert (
        set(document["files"]) == {file.name for file in folder.iterdir()} >= {"README.md", "adapter_model.safetensors"}
    )
    card = (folder / "README.md").read_text()
    assert (
        name in card
        and md5(made, "base_model") in card
        and "--lora-modules lora=FOLDER" in card
        and "library_name: peft" in card
    )
    assert not any(str(made) in file.read_text(errors="replace") for file in folder.iterdir())
    before = json.loads((made / "data/adapter/lora/adapter_config.json").read_text())
    assert {key for key in before if before[key] != config[key]} == {"base_model_name_or_path"}


def test_an_aligned_adapter_names_the_model_that_it_aligned(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import PeftModel

    assert export(made, "aligned@dpo", tmp_path / "dpo") == 0
    base = json.loads(capsys.readouterr().out)["base"]
    assert (base["path"], base["md5"], base["name"]) == (
        "data/merged/lora",
        md5(made, "merged@lora"),
        f"merged-lora-{md5(made, 'merged@lora')[:8]}",
    )
    found = logits(PeftModel.from_pretrained(base_of(made, base["path"]), tmp_path / "dpo").eval())
    assert torch.allclose(found, logits(base_of(made, "data/merged_aligned/dpo")), atol=1e-5)


def test_bad_input_is_one_message_and_writes_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    for model, folder, message in (
        ("merged@lora", tmp_path / "new", "name adapter@lora"),
        ("merged_aligned@dpo", tmp_path / "new", "name aligned@dpo"),
        ("adapter@lora", tmp_path / "full", "not an empty folder"),
        ("adapter@lora", made / "data/adapter/lora", "an output of adapter@lora"),
    ):
        assert export(made, model, folder) == 2
        said = capsys.readouterr()
        assert (
            message in said.err and json.loads(said.out).keys() == {"error", "hint"} and not (tmp_path / "new").exists()
        )
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["file"]


def test_a_changed_adapter_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    weights = root / "data/adapter/lora/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert export(root, "adapter@lora", tmp_path / "new") == 2
    assert (
        "adapter_model.safetensors: not what dvc.lock recorded" in capsys.readouterr().err
        and not (tmp_path / "new").exists()
    )


def test_a_damaged_configuration_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    config = root / "data/adapter/lora/adapter_config.json"
    config.unlink()
    assert export(root, "adapter@lora", tmp_path / "new") == 2
    assert "adapter_config.json: not what dvc.lock recorded" in capsys.readouterr().err
    config.write_text("{")
    assert export(root, "adapter@lora", tmp_path / "new") == 2
    assert (
        "adapter_config.json: not what dvc.lock recorded" in capsys.readouterr().err and not (tmp_path / "new").exists()
    )


def test_an_adapter_that_changes_while_it_is_copied_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    weights, copyfile = root / "data/adapter/lora/adapter_model.safetensors", shutil.copyfile

    def copied(source: Path, to: Path) -> None:
        if source == weights and not weights.is_symlink():
            content = weights.read_bytes()
            weights.unlink()
            weights.write_bytes(content + b" ")
        copyfile(source, to)

    monkeypatch.setattr(shutil, "copyfile", copied)
    assert export(root, "adapter@lora", tmp_path / "new") == 2
    assert "not what dvc.lock recorded" in capsys.readouterr().err and [*tmp_path.iterdir()] == [root]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"use_rslora": True}, []),
        ({"use_dora": True}, ["DoRA"]),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, ["bias", "modules_to_save"]),
        ({"rank_pattern": {"q_proj": 4}}, ["rank_pattern"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights: pissa"]),
        ({"init_lora_weights": "gaussian"}, []),
        ({"init_lora_weights": True, "target_parameters": ["experts.w1"]}, ["target_parameters"]),
        ({"peft_type": "LOHA"}, ["LOHA"]),
    ],
)
def test_what_vllm_does_not_support_is_stated(change: dict[str, Any], expected: list[str]) -> None:
    plain = {
        "peft_type": "LORA",
        "r": 8,
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "rank_pattern": {},
    }
    assert not_in_vllm(plain | change) == expected
