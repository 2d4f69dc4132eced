"""`params.yaml` and `dvc.yaml`: every section is validated, and commands that
read them answer. No stage runs: nothing has been run before."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dagster_project import pipeline
from dagster_project.core.errors import PedigreeError
from dagster_project.execution import placement
from dagster_project.orchestration.dagster.concurrency import pool_of
from dagster_project.pipeline import PEDIGREE, STAGES, VARIANTS_OF
from fuzz.surface import Case, Surface, answered, as_content, write_files
from fuzz.values import NUMBERS, damaged, like, scalar, text, value

ROOT = Path(__file__).resolve().parents[2]
THROUGH_COMMANDS = 0.12
"""Share of the parameter files that commands read too, which takes most of the time."""
COMMANDS = (
    ["run", "tokenized"],
    ["run", "aligned@dpo"],
    ["run", "adapter@{name}"],
    ["audit", "release"],
    ["plan"],
    ["render"],
    ["compare"],
    ["verify", "--integrity"],
    ["sweep", "splits", "-S", "test=0.1,0.2"],
    ["sweep", "{section}", "-S", "{key}=1,x"],
)
OTHER_SETTINGS: dict[str, Any] = {
    "execution": {
        "on": "local",
        "workers": 2,
        "stages": {"adapter": {"on": "ray", "gpus": 1}, "adapter@lora": {"on": "local"}},
    },
    "adapter": {
        "qlora": {"method": "qlora", "learning_rate": 1e-4, "quantization": {"bits": 4}},
        "full": {"method": "full"},
        "own": {"method": "command", "command": "python train.py"},
    },
    "aligned": {
        "kto": {"from": "lora", "method": "kto"},
        "ppo": {"from": "lora", "method": "ppo"},
        "grpo": {"from": "lora", "method": "grpo"},
    },
    "base_model": {"hub": "org/name", "revision": "a" * 40, "license": "MIT"},
    "splits": {"augment": {"paraphrases": "data/sources/paraphrases", "license": "MIT"}},
    "tokenized": {"replay": {"data/sources/triage_alpaca.json": 2}},
    "instructions": {
        "waivers": [{"check": "too_long", "rows": ["a:0"], "reason": "x", "expires": "2999-01-01"}],
        "policy": {"too_long": "warn"},
    },
}


@cache
def texts() -> dict[str, bytes]:
    return {name: (ROOT / name).read_bytes() for name in ("params.yaml", "dvc.yaml")}


def draw(random: random.Random) -> Case:
    commands = [random.choice(COMMANDS)] if random.random() < THROUGH_COMMANDS else []
    if random.random() < 0.15:
        return {"files": {"dvc.yaml": as_content(_pipeline(random))}, "commands": [random.choice(COMMANDS[:8])]}
    values = yaml.safe_load(texts()["params.yaml"])
    section = random.choice([*pipeline.sections()])
    if random.random() < 0.4 and section in OTHER_SETTINGS:
        values[section] = (
            {**(values.get(section) or {}), **OTHER_SETTINGS[section]}
            if section != "base_model"
            else OTHER_SETTINGS[section]
        )
    if random.random() < 0.6:
        _set_any_key(random, values, section)
    if random.random() < 0.7:
        values[section] = like(random, values.get(section), random.choice([0.03, 0.1, 0.3]))
    if random.random() < 0.05:
        values = like(random, values, 0.02)
    content = _as_yaml(random, values)
    key = random.choice([*pipeline.sections()[section].model_fields, "x"])
    filled = [[part.format(name=text(random), section=section, key=key) for part in command] for command in commands]
    return {"files": {"params.yaml": as_content(content)}, "commands": filled}


def _set_any_key(random: random.Random, values: dict[str, Any], section: str) -> None:
    """Set a documented key of a section, or of one of its variants, to anything."""
    fields = [*pipeline.sections()[section].model_fields]
    target = values.setdefault(section, {})
    if section in VARIANTS_OF.values():
        name = random.choice([*target, text(random)])
        target = target.setdefault(name, {})
    if isinstance(target, dict):
        for _ in range(random.randint(1, 3)):
            target[random.choice(fields)] = random.choice([scalar(random), random.choice(NUMBERS), value(random)])


def _as_yaml(random: random.Random, values: Any) -> bytes:
    kind = random.random()
    if kind < 0.15:
        return damaged(random, texts()["params.yaml"])
    if kind < 0.3:
        return _odd_yaml(random)
    if kind < 0.6:
        try:
            content = yaml.safe_dump(values, allow_unicode=True, default_flow_style=random.choice([None, False, True]))
            return content.encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            pass
    content = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return damaged(random, content) if kind > 0.95 else content


def _odd_yaml(random: random.Random) -> bytes:
    """YAML's own traps: in the place of a value, of a key, or of all."""
    trap = random.choice(
        [
            "2026-02-30",
            "2026-01-01",
            "12:30:45",
            "0o17",
            "1_000",
            ".inf",
            ".nan",
            "-.inf",
            "no",
            "~",
            "!!binary aGk=",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!python/object/apply:os.system [echo]",
            "!!int ''",
            "!!float x",
            "!!timestamp x",
            "!x y",
            "*nowhere",
            "&a [*a]",
            "&a {<<: *a}",
            "{<<: [1]}",
            "{<<: {seed: 1}}",
            "{? [a, b] : 1}",
            "{1: 2}",
            "{null: 1}",
            "[" * 3000,
            "{a: " * 500,
            "'\\ud83d'",
            '"\\ud83d"',
            '"\\x00"',
            "|\n  text",
            ">-\n  text",
            "%YAML 9.9",
            "--- a\n--- b",
            "\ta",
            "é",
            "\ufeff",
            "-",
            "- - -",
            "9" * 5000,
            "1e999",
            "&a "
            + "["
            + ", ".join(["x"] * 9)
            + "]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)),
        ]
    )
    source = texts()["params.yaml"].decode()
    lines = source.split("\n")
    kind = random.random()
    if kind < 0.2:
        return trap.encode("utf-8", "surrogatepass")
    at = random.choice([i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")])
    key, _, rest = lines[at].partition(":")
    lines[at] = f"{key}: {trap}" if kind < 0.7 else f"{key[: len(key) - len(key.lstrip())]}{trap}:{rest}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _pipeline(random: random.Random) -> bytes:
    source = texts()["dvc.yaml"]
    if random.random() < 0.4:
        return damaged(random, source)
    values = like(random, yaml.safe_load(source), random.choice([0.005, 0.02, 0.1]))
    try:
        return yaml.safe_dump(values).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return json.dumps(values).encode("utf-8", "surrogatepass")


@cache
def _project(folder: Path) -> Path:
    """A project in which nothing has been run, beside the folders of the cases."""
    shutil.copytree(ROOT / "data/sources", folder / "data/sources")
    shutil.copytree(ROOT / "data/expectations", folder / "data/expectations")
    (folder / "data/keys").mkdir()
    (folder / "data/keys/record_ids.key").write_text("ab" * 32)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").touch()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def play(case: Case, folder: Path) -> str:
    root = _project(folder.parent / "project")
    for name, content in texts().items():
        (root / name).write_bytes(content)
    write_files(case, root)
    before = set(root.iterdir())
    outcomes = [_validated(root)]
    for command in case["commands"]:
        code, _ = answered(*command, "--project", str(root))
        outcomes.append(f"exit code {code}")
    left = (
        {path.name for path in root.iterdir()}
        - {path.name for path in before}
        - {".dvc", ".dvcignore", "data", ".gitignore"}
    )
    assert not left, f"files were left behind: {left}"
    return ", ".join(outcomes)


def _validated(root: Path) -> str:
    """Validate the parameters as `pedigree run` does, and what else is derived from them."""
    try:
        values = pipeline.validate(root)
        for address in [
            *STAGES,
            *(f"{stage}@{name}" for stage, section in VARIANTS_OF.items() for name in values.get(section) or ()),
        ]:
            if address not in VARIANTS_OF:
                placement(values, address, tuple(STAGES), VARIANTS_OF)
                assert pool_of(address, PEDIGREE, values, "")
    except PedigreeError as error:
        assert error.exit_code == 2 and error.what and error.hint, f"no next step: {error}"
        assert len(str(error)) < 20_000
        return "refused"
    return "valid"


SURFACE = Surface("parameters", 3_000, draw, play)
