"""The certificate of an erasure: what was asked, found, removed, and what was not reached.

It names the source files and how many rows were taken out of each, and the reason as given; otherwise it has keyed
hashes, no text and no id.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.records import write_json, write_text
from dagster_project.core.text import many
from dagster_project.curation.sources.erased import TOMBSTONES
from dagster_project.lineage.certificates import CERTIFICATES
from dagster_project.lineage.erasure.likelihoods import sensitivity
from dagster_project.lineage.signing.envelope import STATEMENT_TYPE, canonical, seal
from dagster_project.lineage.signing.keys import PrivateKey
from dagster_project.orchestration.erasure.places import GIT
from dagster_project.orchestration.erasure.plan import KEEP, REMAKE, RETIRE
from dagster_project.views.texts import text

OUTSIDE_GIT = ".dvc/tmp/pedigree/erased"
"""Folder of lists of git blobs. A guess can be tested by the hash of an old source file, so git does not track it."""
BLOBS = "blobs of git history"
LEFT_OUT = "rows left out at reading"
"""Of sources on the Hub and in S3, which nobody can edit from here."""
EVENT_LOG_ELSEWHERE = "what dagster.yaml keeps outside Dagster's home, such as an event log in Postgres"
PREDICATE_TYPE = "urn:pedigree:erasure:1"
NEVER_REACHED = (
    "other clones of the repository, and what was pushed from this one",
    "copies of models that were exported, also to build/, deployed, released or downloaded",
    (
        "caches outside the project: of the Hugging Face Hub,"
        " of nodes of a cluster, of other projects, of backups and file systems"
    ),
    "logs and exports that were copied elsewhere",
)


def certificate(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of a plan that was carried out. The same erasure gives the same one, interrupted or not."""
    models = {
        outcome: [{"stage": one["stage"], "before": one["md5"]} for one in plan["models"] if one["outcome"] == outcome]
        for outcome in (REMAKE, RETIRE, KEEP)
    }
    searched = plan["searched"]
    removed = plan["removed"]
    remote = plan.get("remote", {})
    exports = plan.get("exports", plan.get("papers"))  # as earlier versions named them
    not_reached = [
        *NEVER_REACHED,
        *(
            f"{path} at revision {one['revision']}, which still holds {many(len(one['rows']), 'row')} of them"
            for path, one in remote.items()
        ),
        *(f"the DVC remote {name}" for name in plan["remotes elsewhere"]),
    ]
    if plan.get("unreadable"):
        not_reached.append(f"models in what cannot be read: {', '.join(plan['unreadable'])}")
    if plan["event log elsewhere"]:
        not_reached.append(EVENT_LOG_ELSEWHERE)
    if plan["shared cache"]:
        not_reached.append("DVC's cache, which is outside the project and may be shared: nothing was removed from it")
    if plan["blobs"]:
        not_reached.append(f"git history, until it is rewritten: {many(len(plan['blobs']), 'blob')}")
    return {
        "type": PREDICATE_TYPE,
        "date": plan["date"],
        "reason": plan["reason"],
        "key": plan["key"],
        "requests": plan["asked"],
        "erased": {
            "records": plan["records"],
            "made from them": plan["made"],
            "rows": {path: len(change["rows"]) for path, change in plan["sources"].items()},
            # not the hash of before: who has all other rows of a file could test a guess by it
            "sources": {path: change["after"] for path, change in plan["sources"].items()},
            **({LEFT_OUT: {path: len(one["rows"]) for path, one in remote.items()}} if remote else {}),
        },
        "relatives": {
            kind: {"rows": len(names), "erased": kind in plan["chosen"] or kind == "same row"}
            for kind, names in plan["relatives"].items()
        },
        "tombstones": [stone["record"] for stone in plan["tombstones"]],
        "found": _places(plan["places"]),
        "removed": {
            "objects of DVC's cache": len(removed["objects"]),
            "entries of its run cache": len(removed["runs"]),
            "objects of remotes": {name: len(oids) for name, oids in removed["remotes"].items()},
            "pages and scratch files": len(plan["files"]),
            **({"exports in data/release, as a whole": len(exports)} if exports else {}),
            **({"folders of signatures": len(plan["signatures"])} if plan.get("signatures") else {}),
            "files of Dagster, cleaned or deleted": len(plan["dagster"]),
        },
        "models": {
            "made again": [{**model, "after": plan["after"].get(model["stage"])} for model in models[REMAKE]],
            "retired": models[RETIRE],
            "kept, tested on it only": models[KEEP],
            "unknown": [{name: model[name] for name in ("stage", "md5")} for model in plan["unknown"]],
        },
        "impact": _impact(plan["seen by"]),
        "verify": plan.get("verify"),
        "left": _places(plan["left"]),
        "not searched": {
            "files of weights": searched["weights"],
            "archives that cannot be opened": len(searched["unreadable"]),
            "texts too short, or shared with other records": plan["needles"]["unsearchable"],
            **searched["unsearched"],
        },
        "not reached": not_reached,
        "membership": _membership(plan["losses before"], plan["losses after"]),
        "git": {"blobs": len(plan["blobs"]), "objects searched": searched["git objects"]},
        "blobs": plan["blobs"],
    }


def _impact(found: Mapping[str, Sequence[str]]) -> str:
    """Whether a model of the workspace saw the records."""
    answers = {"yes": found["yes"], "cannot tell": found["unknown"]}
    return "; ".join(f"{answer}: {', '.join(models)}" for answer, models in answers.items() if models) or "no"


def _membership(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Losses of the records among those of records that no model saw, by each
    model before the erasure and made again."""
    return [
        {
            "model": address,
            "of": kind,
            "before": measured,
            "after": after[address][kind],
            "sensitivity": sensitivity(measured),
        }
        for address, kinds in sorted(before.items())
        for kind, measured in kinds.items()
    ]


def _places(found: Mapping[str, Any]) -> dict[str, Any]:
    """Place -> files and bytes, without the names of the files, which can say what they hold."""
    return {
        place: {"blobs": len(facts["blobs"])} if place == GIT else {"files": facts["files"], "bytes": facts["bytes"]}
        for place, facts in sorted(found.items())
    }


def free_name(root: Path, document: Mapping[str, Any]) -> str:
    """Name of a certificate: a hash of what was erased, with a number if an earlier erasure has this name."""
    erased = [document[name] for name in ("date", "tombstones", "requests")]
    name = hashlib.sha256(canonical(erased)).hexdigest()[:12]
    names = itertools.chain((name,), (f"{name}-{number}" for number in itertools.count(2)))
    return next(one for one in names if not os.path.lexists(root / CERTIFICATES / f"{one}.json"))


def write(root: Path, document: Mapping[str, Any], key: PrivateKey | None, name: str) -> dict[str, str]:
    """Write the certificate, as JSON and text, the recipe for git's history, and the signature if there is a key.

    Returns the paths.
    """
    public = {field: value for field, value in document.items() if field != "blobs"}
    base = f"{CERTIFICATES}/{name}"
    paths = {"certificate": f"{base}.json", "as text": f"{base}.txt"}
    write_json(root / paths["certificate"], public)
    write_text(root / paths["as text"], certificate_text(public) + "\n")
    if document["blobs"]:
        paths[BLOBS] = f"{OUTSIDE_GIT}/{name}.blobs"
        write_text(root / paths[BLOBS], "".join(f"{blob}\n" for blob in sorted(document["blobs"])))
    if key is not None:
        digest = hashlib.sha256((root / paths["certificate"]).read_bytes()).hexdigest()
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": paths["certificate"], "digest": {"sha256": digest}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": public,
        }
        paths["signature"] = f"{base}.dsse.json"
        write_text(
            root / paths["signature"],
            json.dumps(seal(statement, key, key.public.fingerprint), separators=(",", ":")) + "\n",
        )
    return paths


def certificate_text(document: Mapping[str, Any]) -> str:
    """The certificate for a reader."""
    return text(
        "certificate",
        **document,
        hashes=len(document["tombstones"]),
        searched_not=document["not searched"],
        reached_not=document["not reached"],
        left_out=LEFT_OUT,
        tombstones_file=TOMBSTONES,
        outside_git=OUTSIDE_GIT,
    )
