"""OpenLineage: a START and a COMPLETE event for the run of every stage, one JSON document a line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

import attr
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    DatasetFacet,
    dataset_version_dataset,
    output_statistics_output_dataset,
    tags_run,
)
from openlineage.client.serde import Serde

from dagster_project import __version__
from dagster_project.lineage.export.formulation import parents_of
from dagster_project.lineage.export.summary import identity, rows_written

NAMESPACE = "pedigree"
ANY_STAGE = True
FILE = "lineage.jsonl"
SHOWS = "the run of each stage with its inputs and outputs by hash"
SHOWS_NOT = "when the stages ran: times are not recorded"


@attr.define
class ContentHash(DatasetFacet):
    """Content hashes of a data set."""

    md5: str | None = attr.field(default=None)
    """DVC's hash; that of a folder ends in .dir."""
    sha256: str | None = attr.field(default=None)
    """Of a file; of a folder over the lines "<sha256 of file> <path>" of all its files."""


def openlineage(summary: Mapping[str, Any], issued: date) -> str:
    """The events, one JSON document per line.

    Args:
        issued: time of every event: the time of a run is not recorded, because
            the same inputs give the same bytes at any time.
    """
    producer = f"urn:pedigree:{__version__}"
    sums = {stage["output"]: stage["sha256"] for stage in summary["stages"].values()} | {
        path: s["sha256"] for path, s in summary["sources"].items()
    }
    lines = []
    for name, stage in summary["stages"].items():
        outputs_read = {
            summary["stages"][one]["output"]: summary["stages"][one]["md5"]
            for one in parents_of(name, summary["stages"])
        }
        read = {**stage["inputs"], **outputs_read, **dict.fromkeys(stage.get("sources", ()))}
        inputs = [
            InputDataset(NAMESPACE, path, facets=_facets(md5, sums.get(path), producer)) for path, md5 in read.items()
        ]
        rows = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
            rowCount=rows_written(stage), producer=producer
        )
        outputs = [
            OutputDataset(
                NAMESPACE,
                stage["output"],
                facets=_facets(stage["md5"], stage["sha256"], producer),
                outputFacets={"outputStatistics": rows},
            )
        ]
        tags = [
            tags_run.TagsRunFacetFields(key=key, value=str(stage[key]), source="git")
            for key in ("commit", "date", "clean")
            if stage.get(key) is not None
        ]
        run = Run(
            str(identity("run", name, stage["inputs"], stage["md5"])),
            facets={"tags": tags_run.TagsRunFacet(tags=tags, producer=producer)},
        )
        for state in (RunState.START, RunState.COMPLETE):
            event = RunEvent(
                eventType=state,
                eventTime=f"{issued.isoformat()}T00:00:00Z",
                run=run,
                job=Job(NAMESPACE, name),
                inputs=inputs,
                outputs=outputs if state is RunState.COMPLETE else [],
                producer=producer,
            )
            lines.append(Serde.to_json(event))
    return "\n".join(lines) + "\n"


def _facets(md5: str | None, sha256: str | None, producer: str) -> dict[str, DatasetFacet]:
    content = {"contentHash": ContentHash(md5=md5, sha256=sha256, producer=producer)}
    return {
        **content,
        "version": dataset_version_dataset.DatasetVersionDatasetFacet(
            datasetVersion=md5 or sha256 or "", producer=producer
        ),
    }
