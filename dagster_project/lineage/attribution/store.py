"""Projected gradients of all records of a training, in a folder of .dvc/tmp/pedigree/gradients.

A cache: it can be deleted at any time, and is checked by hash whenever it is read. Its name is the hash of all that it
was computed from, so it can never be taken for that of another model; those of earlier points of the training are in
folders within it, and are identified by their manifests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.files import replacing
from dagster_project.core.hashing import sha256_of_file, sha256_of_files, sha256_of_text
from dagster_project.core.progress import Progress
from dagster_project.core.records import write_json
from dagster_project.core.text import many
from dagster_project.lineage.attribution.projection import Projection, lengths_of, units
from dagster_project.lineage.attribution.records import TrainedRecord, sha256_of_records
from dagster_project.lineage.attribution.rows_on_disk import Rows, RowsOnDisk, digests
from dagster_project.lineage.attribution.second_moment import Damped, PrincipalDirections, SecondMoment, sample, scores
from dagster_project.lineage.attribution.sketch import in_bytes, sketches
from dagster_project.lineage.notes import read_note

if TYPE_CHECKING:
    import numpy as np
    import torch

GRADIENTS = Path(".dvc", "tmp", "pedigree", "gradients")
"""Folder of all stores of a project."""
MANIFEST = "store.json"
SHARD = 32
"""Records of a file. An interrupted command loses at most the gradients of these."""
IN_MEMORY = 8192
"""Most records whose gradients are all read for a question, 1.2 GB for LoRA on
the sample project's model. A larger store has sketches."""
PROBES = 512
LIBRARIES = ("torch", "transformers", "peft")
CODE = (
    "gradients.py",
    "lora_factors.py",
    "per_record.py",
    "projection.py",
    "records.py",
    "rows_on_disk.py",
    "second_moment.py",
    "sketch.py",
    "store.py",
)
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
class Sketches:
    """What is read of many gradients for every question."""

    numbers: np.ndarray
    """(records, `sketch.NUMBERS`) int8."""
    scales: np.ndarray
    """What the numbers of a sketch are multiplied by, (records,) float32."""
    probes: np.ndarray
    """Gradients of the records of `probes_of`, which estimates are measured by; (probes, width) float16."""


@dataclass(frozen=True)
class Gradients:
    """Projected gradients of the losses of all records."""

    units: Rows
    """Scaled to length 1, (records, width) float16."""
    lengths: np.ndarray
    """(records,) float32."""
    second_moment: Damped
    sketches: Sketches | None = None
    """Of many records."""

    def scores(self, questions: np.ndarray) -> np.ndarray:
        """Scores of all records for each question, (questions, records) float32.

        Args:
            questions: (questions, width) float32.
        """
        return scores(self.second_moment, self.units, questions)


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
        return not self.missing() and not self._lacks_summaries()

    def _lacks_summaries(self) -> int:
        """Missing or damaged files that are made from the gradients of all records."""
        return sum(not self._has(path) for path in (self._second_moment, *([self._sketches] if self.is_large else [])))

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
                raise InputError(
                    f"{what}: a gradient is not finite", "the training may have diverged: look at its curve"
                )
            self._write(
                self._path(n),
                {"gradients": units(rows).astype(np.float16), "lengths": lengths_of(rows)[:, 0].astype(np.float32)},
            )
            progress.advance(len(rows))
        if self.is_large:
            summary = self._summary()
            self._write(self._sketches, summary)
            principal = PrincipalDirections.of(self._rows(summary["digests"], summary["probes"].shape[1]))
            self._write(self._second_moment, {"axes": principal.axes, "shares": principal.shares})
        else:
            self._write(self._second_moment, {"inner": SecondMoment.of(self.read().units).inner})
        return progress.total

    def read(self) -> Gradients:
        """The gradients: of many records their rows stay on disk.

        Raises:
            InputError: the store does not exist, or is incomplete or damaged.
        """
        import numpy as np
        from safetensors.numpy import load_file

        if self.is_large:
            kept, moment = self._read_summaries()
            of = Sketches(kept["sketches"], kept["scales"], kept["probes"])
            rows = self._rows(kept["digests"], kept["probes"].shape[1])
            return Gradients(rows, kept["lengths"], PrincipalDirections(moment["axes"], moment["shares"]), of)
        if self.missing():
            raise self._incomplete()
        parts = [load_file(self._path(n)) for n in range(self.shards)]
        units, lengths = (np.concatenate([part[name] for part in parts]) for name in ("gradients", "lengths"))
        stored = self._has(self._second_moment)
        return Gradients(
            units,
            lengths,
            SecondMoment(load_file(self._second_moment)["inner"], self.records) if stored else SecondMoment.of(units),
        )

    def _read_summaries(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Both files of a large store, each hashed while it is read."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        with ThreadPoolExecutor() as pool:
            intact = pool.map(self._has, (self._sketches, self._second_moment))
            try:
                found = load_file(self._sketches), load_file(self._second_moment)
            except (OSError, SafetensorError):
                raise self._incomplete() from None
            if not all(intact):
                raise self._incomplete()
        return found

    def _rows(self, known: np.ndarray, width: int) -> RowsOnDisk:
        return RowsOnDisk(self._path, SHARD, (self.records, width), known)

    def _incomplete(self) -> InputError:
        missing, files = len(self.missing()), self.shards
        if self.is_large:
            missing, files = missing + self._lacks_summaries(), files + 2
        state = "incomplete or damaged" if self.is_begun() else "missing"
        return InputError(
            f"the gradients of the model are {state}: {missing} of {many(files, 'file')}", "add --index to compute them"
        )

    def _summary(self) -> dict[str, np.ndarray]:
        """What is read first of a large store: sketches, hashes and lengths of
        all gradients, and those of the probes."""
        import numpy as np
        from safetensors.numpy import load_file

        probes, parts, of_probes = probes_of(self.records), list[dict[str, np.ndarray]](), list[np.ndarray]()
        for n in range(self.shards):
            part = load_file(self._path(n))
            rows, numbers = part["gradients"], self._records_of(n)
            short, scales = in_bytes(sketches(rows.astype(np.float32)))
            parts.append({"sketches": short, "scales": scales, "digests": digests(rows), "lengths": part["lengths"]})
            of_probes.append(rows[probes[(probes >= numbers.start) & (probes < numbers.stop)] - numbers.start])
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | {
            "probes": np.concatenate(of_probes)
        }

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

        with replacing(path) as scratch:
            save_file(arrays, scratch)
            digest = sha256_of_file(scratch)
        known = self._manifest().get("shards", {}) | {path.name: digest}
        write_json(
            self.folder / MANIFEST,
            {"identity": self.identity, "records": self.records, "shards": dict(sorted(known.items()))},
        )

    def _manifest(self) -> dict[str, Any]:
        """The list of files and hashes; empty if there is none, or it is damaged or of something else."""
        found = read_note(self.folder / MANIFEST)
        is_own = found.get("identity") == self.identity and found.get("records") == self.records
        return found if is_own and isinstance(found.get("shards"), dict) else {}


def _is_intact(path: Path, known: Mapping[str, str]) -> bool:
    return path.name in known and path.is_file() and sha256_of_file(path) == known[path.name]


def probes_of(records: int) -> np.ndarray:
    """Numbers of records at equal distances that are not in the sample.

    What is damped was made from that, so its scores are smaller.
    """
    import numpy as np

    is_other = np.ones(records, bool)
    is_other[sample(records)] = False
    others = np.flatnonzero(is_other)
    return others[np.arange(min(PROBES, len(others))) * len(others) // max(1, min(PROBES, len(others)))]
