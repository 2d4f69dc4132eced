"""A small DVC project that has nothing of Pedigree: prepare -> featurize ->
train -> evaluate, with parameters, metrics, a plot and a check.

Points (x, y) with a label; the model is a threshold on x + y. `featurize` has
two outputs, and `evaluate` none but metrics and plots.
"""

from __future__ import annotations

from pathlib import Path

from builders.small_pipeline import commit_project

DVC_YAML = """\
stages:
  prepare:
    desc: Splits the points into train and test.
    cmd: python src/prepare.py data/points.csv data/prepared
    deps: [data/points.csv, src/prepare.py]
    params: [prepare]
    outs: [data/prepared]
  featurize:
    cmd: python src/featurize.py data/prepared data/features
    deps: [data/prepared, src/featurize.py]
    params: [featurize.scale]
    outs: [data/features/train.csv, data/features/test.csv]
  train:
    cmd: python src/train.py data/features/train.csv model.json
    deps: [data/features/train.csv, src/train.py]
    params: [train]
    outs: [model.json]
    meta: {group: models, kinds: [python]}
  evaluate:
    cmd: python src/evaluate.py model.json data/features/test.csv eval
    deps: [model.json, data/features/test.csv, src/evaluate.py]
    metrics: [{eval/metrics.json: {cache: false}}]
    plots: [{eval/thresholds.csv: {x: threshold, y: accuracy}}]
    meta: {checks: {better_than_chance: More than half of the test points are labeled correctly.}}
"""

PARAMS = "prepare: {every: 4}\nfeaturize: {scale: 1}\ntrain: {steps: 20}\n"

SCRIPTS = {
    "prepare": (
        """\
import sys
from pathlib import Path

from ruamel.yaml import YAML

every = YAML(typ="safe").load(Path("params.yaml"))["prepare"]["every"]
head, *rows = Path(sys.argv[1]).read_text().splitlines()
out = Path(sys.argv[2])
out.mkdir(parents=True)
for name, kept in (("train", lambda i: i % every), ("test", lambda i: not i % every)):
    (out / f"{name}.csv").write_text("\\n".join([head, *(row for i, row in enumerate(rows) if kept(i))]))
"""
    ),
    "featurize": (
        """\
import sys
from pathlib import Path

from ruamel.yaml import YAML

scale = YAML(typ="safe").load(Path("params.yaml"))["featurize"]["scale"]
Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
for path in Path(sys.argv[1]).iterdir():
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    lines = ["sum,label", *(f"{scale * (int(x) + int(y))},{label}" for x, y, label in rows)]
    (Path(sys.argv[2]) / path.name).write_text("\\n".join(lines))
"""
    ),
    "train": (
        """\
import json
import sys
from pathlib import Path

from ruamel.yaml import YAML

steps = YAML(typ="safe").load(Path("params.yaml"))["train"]["steps"]
rows = [tuple(map(int, line.split(","))) for line in Path(sys.argv[1]).read_text().splitlines()[1:]]
print("training on", len(rows), "points")
best = max(range(steps), key=lambda threshold: sum((total > threshold) == label for total, label in rows))
Path(sys.argv[2]).write_text(json.dumps({"threshold": best}))
"""
    ),
    "evaluate": (
        """\
import json
import sys
from pathlib import Path

threshold = json.loads(Path(sys.argv[1]).read_text())["threshold"]
rows = [tuple(map(int, line.split(","))) for line in Path(sys.argv[2]).read_text().splitlines()[1:]]


def accuracy(threshold):
    return sum((total > threshold) == label for total, label in rows) / len(rows)


out = Path(sys.argv[3])
out.mkdir(exist_ok=True)
passed = accuracy(threshold) > 0.5
checks = {"better_than_chance": {"passed": passed}}
report = {"accuracy": accuracy(threshold), "test": {"points": len(rows)}, "checks": checks}
(out / "metrics.json").write_text(json.dumps(report))
(out / "thresholds.csv").write_text("threshold,accuracy\\n" + "".join(f"{t},{accuracy(t)}\\n" for t in range(0, 20, 5)))
"""
    ),
}


def make_project(root: Path) -> Path:
    """Write the project, with its points under DVC, and commit it. Nothing has run."""
    points = [f"{x},{y},{int(x + y > 9)}" for x in range(10) for y in range(0, 10, 3)]
    files = {
        "dvc.yaml": DVC_YAML,
        "params.yaml": PARAMS,
        "data/points.csv": "\n".join(["x,y,label", *points]),
        ".gitignore": "/.dagster\n",
    }
    for path, text in {**files, **{f"src/{name}.py": text for name, text in SCRIPTS.items()}}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return commit_project(root, "data/points.csv")
