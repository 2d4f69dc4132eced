"""Projected gradients of many records: for plain LoRA from packed passes, for other methods, and for models whose
packed examples influence each other, one record at a time.

Both give the same numbers, up to rounding.

Packed examples do not attend to each other, so a gradient's sum over the tokens of a record is that of its own loss.
The factors of these sums (`lora_factors.py`) are projected before they are multiplied, as LoGRA does, so the gradients
themselves are never formed, unless each of their numbers is scaled by the second moments of the optimizer.

On a CPU, threads that each compute a pass by themselves wait less than threads that share every operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING

from dagster_project.lineage.attribution.gradients import TrainedModel
from dagster_project.lineage.attribution.projection import Projection
from dagster_project.lineage.attribution.records import Example

if TYPE_CHECKING:
    import torch

ROOM = 1024
"""Tokens of a packed pass, about, unless one record has more."""


def projected_gradients(
    trained: TrainedModel, projection: Projection, records: Sequence[Sequence[Example]]
) -> torch.Tensor:
    """Projected gradient of the loss of each record, (records, width) float32.

    A row depends on the other records by rounding only.

    Args:
        records: the examples of each record.
    """
    import torch

    if not is_packed(trained):
        return torch.stack([projection.project(trained.of_record(examples)) for examples in records])
    threads = torch.get_num_threads() if trained.device.type == "cpu" else 1
    passes = _passes([sum(len(example.input_ids) for example in examples) for examples in records], threads)
    found = torch.empty(len(records), projection.width(trained.shapes))
    workers = max(1, min(threads, len(passes)))
    twins = SimpleQueue[TrainedModel]()
    for twin in trained.twins(workers):
        twins.put(twin)

    def compute(numbers: Sequence[int]) -> None:
        twin = twins.get()
        try:
            found[numbers] = _of_pass(twin, projection, [records[i] for i in numbers])
        finally:
            twins.put(twin)

    with _threads_of_their_own(workers) as pool:
        list(pool.map(compute, passes))
    return found


def is_packed(trained: TrainedModel) -> bool:
    """Whether `projected_gradients` computes several records in a pass."""
    from dagster_project.lineage.attribution.lora_factors import layers_of

    if trained.mixes_examples:
        return False
    return {name for layer in layers_of(trained) for name in (layer.a, layer.b)} == trained.weights.keys()


def _passes(tokens: Sequence[int], threads: int) -> list[list[int]]:
    """Numbers of the records of each pass: as many passes for each thread, of about as many tokens each.

    Args:
        tokens: of each record.

    >>> _passes([500, 300, 400, 700], 2)
    [[1, 3], [0, 2]]
    """
    count = min(len(tokens), -(-sum(tokens) // (ROOM * threads)) * threads)
    passes, sizes = [list[int]() for _ in range(count)], [0] * count
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        smallest = sizes.index(min(sizes))
        passes[smallest].append(i)
        sizes[smallest] += tokens[i]
    return [sorted(numbers) for numbers in passes]


@contextmanager
def _threads_of_their_own(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Workers that share torch's threads: each computes its operations with its part of them."""
    import torch

    before = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, before // workers),)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown()
            torch.set_num_threads(before)  # some libraries have one number for all threads


def _of_pass(trained: TrainedModel, projection: Projection, records: Sequence[Sequence[Example]]) -> torch.Tensor:
    """Projected gradients of records in one packed row, (records, width) float32."""
    import torch

    from dagster_project.lineage.attribution.lora_factors import giving_factors, layers_of

    owners = [i for i, examples in enumerate(records) for _ in examples]
    sizes = [len(example.input_ids) for examples in records for example in examples]
    segments = list(zip(owners, pairwise(accumulate(sizes, initial=0)), strict=True))
    places = _places(trained, projection)
    found = torch.zeros(len(records), sum(rows * columns for _, rows, columns in places.values()))

    def add(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the products of two factors, (tokens, rows) and (tokens, columns), over the tokens of each example."""
        first, rows, columns = places[name]
        for owner, (start, stop) in segments:
            product = left[start:stop].T @ right[start:stop]
            if trained.scales is None:
                part = product.flatten()
            else:
                part = projection.of_weight(name, product * trained.scales[name])
            found[owner, first : first + rows * columns] += part.cpu()

    # the gradient itself is needed where its numbers are scaled
    with giving_factors(layers_of(trained), projection if trained.scales is None else None, add):
        trained.sum_of_losses(records).backward()
    return found


def _places(trained: TrainedModel, projection: Projection) -> dict[str, tuple[int, int, int]]:
    """Weight -> position in the projected gradient, rows and columns there."""
    places, first = {}, 0
    for name, weight in sorted(trained.shapes.items()):
        rows, columns = projection.shape(weight)
        places[name] = first, rows, columns
        first += rows * columns
    return places
