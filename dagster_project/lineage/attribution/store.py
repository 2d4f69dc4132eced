"""Projected gradients of all records of a training, in a folder of .dvc/tmp/pedigree/gradients. A cache: it can be deleted at any time, and is checked by
hash whenever it is read. Its name is the hash of all that it was computed from, so it can never be taken for that of another model; those of earlier points of
the training are in folders within it, and are identified by their manifests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file, sha256_of_files, sha256_of_text
from dagster_project.core.progress import Progress
from dagster_project.core.records import write_json
from dagster_project.lineage.attribution.projection import Projection, lengths_of, units
from dagster_project.lineage.attribution.records import TrainedRecord, sha256_of_records
from dagster_project.lineage.attribution.rows_on_disk import Rows, RowsOnDisk, digests
from dagster_project.lineage.attribution.second_moment import SAMPLE, SecondMoment, sample
from dagster_project.lineage.attribution.sketch import sketches

if TYPE_CHECKING:
    import numpy as np
    import torch

GRADIENTS = Path(".dvc", "tmp", "pedigree", "gradients")
"""Folder of all stores of a project."""
MANIFEST = "store.json"
SHARD = 32
"""Records of a file. An interrupted command loses at most the gradients of these."""
IN_MEMORY = 8192
"""Most records whose gradients are all read for a question, 1.2 GB for LoRA on the sample project's model. A larger store has sketches."""
LIBRARIES = ("torch", "transformers", "peft")
CODE = ("gradients.py", "per_record.py", "projection.py", "records.py", "rows_on_disk.py", "second_moment.py", "sketch.py", "store.py")
"""Modules of this folder that the content depends on."""


def identity_of(
    adapter: str,
    base_model: str,
    records: Sequence[TrainedRecord],
    projection: Projection,
    compute: Mapping[str, Any],
    label_smoothing: float,
    strength: float,
) -> dict[str, Any]:
    """All that a store is computed from.

    Args:
        adapter, base_model: hashes of their folders.
        compute: dtype, device and threads of the computation.
        strength: share of what the adapter adds, at which gradients are taken.
    """
    here = Path(__file__).parent
    return {
        "adapter": adapter,
        "base_model": base_model,
        "records": sha256_of_records(list(records)),
        "projection": {"numbers": projection.numbers, "seed": projection.seed},
        "label_smoothing": label_smoothing,
        "strength": strength,
        "compute": dict(compute),
        "libraries": {name: version(name) for name in LIBRARIES},
        "code": sha256_of_files([here / name for name in CODE]),
    }


@dataclass(frozen=True)
class Gradients:
    """Projected gradients of the losses of all records."""

    units: Rows
    """Scaled to length 1, (records, width) float16."""
    lengths: np.ndarray
    """(records,) float32."""
    second_moment: SecondMoment
    sketches: np.ndarray | None = None
    """(records, `sketch.NUMBERS`) float16, of many records."""

    @cached_property
    def sample(self) -> np.ndarray:
        """Gradients of the records that the second moment is made from, in memory; (sample, width) float16."""
        return self.units[:] if len(self.units) <= SAMPLE else self.units[sample(len(self.units))]

    def directions(self, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `SecondMoment.directions`."""
        return self.second_moment.directions(self.sample, questions)


@dataclass(frozen=True)
class GradientStore:
    """The store of one model, which may not exist yet, or be incomplete."""

    folder: Path
    identity: Mapping[str, Any]
    records: int

    @classmethod
    def at(cls, root: Path, identity: Mapping[str, Any], records: int) -> GradientStore:
        name = sha256_of_text(json.dumps(identity, sort_keys=True))[:32]
        return cls(root / GRADIENTS / name, identity, records)

    @property
    def shards(self) -> int:
        return -(-self.records // SHARD)

    def missing(self) -> list[int]:
        """Numbers of the files that are missing or damaged, by their hashes."""
        known = self._manifest().get("shards", {})
        return [n for n in range(self.shards) if not _is_intact(self._path(n), known)]

    def is_complete(self) -> bool:
        return not self.missing() and self._has(self._second_moment) and (not self.is_large or self._has(self._sketches))

    @property
    def is_large(self) -> bool:
        return self.records > IN_MEMORY

    def _has(self, path: Path) -> bool:
        return _is_intact(path, self._manifest().get("shards", {}))

    def is_begun(self) -> bool:
        return bool(self._manifest())

    def build(self, gradients: Callable[[Sequence[int]], torch.Tensor], what: str) -> int:
        """Compute what is missing.

        Args:
            gradients: numbers of some records -> their projected gradients, (records, width) float32.
            what: name of the work in progress lines.
        Returns:
            Records that were computed.
        """
        import numpy as np

        missing = self.missing()
        progress = Progress(what, sum(len(self._records_of(n)) for n in missing), "record")
        self.folder.mkdir(parents=True, exist_ok=True)
        for n in missing:
            rows = gradients(self._records_of(n)).numpy()
            if not np.isfinite(rows).all():
                raise InputError(f"{what}: a gradient is not finite", "the training may have diverged: look at its curve")
            self._write(self._path(n), {"gradients": units(rows).astype(np.float16), "lengths": lengths_of(rows)[:, 0].astype(np.float32)})
            progress.advance(len(rows))
        if self.is_large:
            self._write(self._sketches, self._summary())
        self._write(self._second_moment, {"inner": self.read().second_moment.inner})
        return progress.total

    def read(self) -> Gradients:
        """The gradients: of many records their rows stay on disk.

        Raises:
            InputError: the store does not exist, or is incomplete or damaged.
        """
        import numpy as np
        from safetensors.numpy import load_file

        if self.is_large:
            if not self._has(self._sketches):
                raise self._incomplete()
            found = load_file(self._sketches)
            rows = RowsOnDisk([self._path(n) for n in range(self.shards)], SHARD, (self.records, int(found["width"][0])), found["digests"])
            return Gradients(rows, found["lengths"], self._moment(rows), found["sketches"])
        if self.missing():
            raise self._incomplete()
        parts = [load_file(self._path(n)) for n in range(self.shards)]
        units, lengths = (np.concatenate([part[name] for part in parts]) for name in ("gradients", "lengths"))
        return Gradients(units, lengths, self._moment(units))

    def _incomplete(self) -> InputError:
        missing = len(self.missing()) + (self.is_large and not self._has(self._sketches))
        state = "incomplete or damaged" if self.is_begun() else "missing"
        return InputError(
            f"the gradients of the model are {state}: {missing} of {self.shards + self.is_large} files", "add --index to compute them"
        )

    def _moment(self, rows: Rows) -> SecondMoment:
        """The stored second moment, or one from the gradients."""
        from safetensors.numpy import load_file

        if self._has(self._second_moment):
            return SecondMoment(load_file(self._second_moment)["inner"], self.records)
        return SecondMoment.of(rows)

    def _summary(self) -> dict[str, np.ndarray]:
        """What is read first of a large store: sketches, hashes and lengths of all gradients."""
        import numpy as np
        from safetensors.numpy import load_file

        width, parts = 0, list[dict[str, np.ndarray]]()
        for n in range(self.shards):
            part = load_file(self._path(n))
            rows, width = part["gradients"], part["gradients"].shape[1]
            short = sketches(rows.astype(np.float32)).astype(np.float16)
            parts.append({"sketches": short, "digests": digests(rows), "lengths": part["lengths"]})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | {"width": np.array([width])}

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _records_of(self, n: int) -> range:
        return range(n * SHARD, min((n + 1) * SHARD, self.records))

    def _path(self, n: int) -> Path:
        return self.folder / f"gradients-{n:05d}.safetensors"

    @property
    def _second_moment(self) -> Path:
        return self.folder / "second_moment.safetensors"

    @property
    def _sketches(self) -> Path:
        return self.folder / "sketches.safetensors"

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        scratch = self.folder / f".writing-{path.stem}"
        save_file(arrays, scratch)
        digest = sha256_of_file(scratch)
        scratch.replace(path)
        known = self._manifest().get("shards", {}) | {path.name: digest}
        write_json(self.folder / MANIFEST, {"identity": self.identity, "records": self.records, "shards": dict(sorted(known.items()))})

    def _manifest(self) -> dict[str, Any]:
        """The list of files and hashes; empty if there is none, or it is damaged or of something else."""
        try:
            found = json.loads((self.folder / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return {}
        is_own = isinstance(found, dict) and found.get("identity") == self.identity and found.get("records") == self.records
        return found if is_own and isinstance(found.get("shards"), dict) else {}


def _is_intact(path: Path, known: Mapping[str, str]) -> bool:
    return path.name in known and path.is_file() and sha256_of_file(path) == known[path.name]
