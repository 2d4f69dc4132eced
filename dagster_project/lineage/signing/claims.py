"""What the documents in the folder of a model state about the same things, and
where they contradict its files, the attestations, or each other.

A document is read as claims: (subject, property, value), e.g. ("stage splits", "rows_out", "120").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from dagster_project.core.hashing import md5_of_file, md5_of_folder, sha256_of_text
from dagster_project.core.layout import PLOTS, REPORTS
from dagster_project.core.text import visible
from dagster_project.lineage.export.folder import FOLDER, PAGE
from dagster_project.lineage.export.spdx import DISTILLED
from dagster_project.lineage.export.summary import rows_written
from dagster_project.lineage.exports_in_place import FORMER
from dagster_project.lineage.history import is_within
from dagster_project.lineage.signing import envelope
from dagster_project.lineage.signing.envelope import SignatureError
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, PUBLIC_KEY
from dagster_project.lineage.signing.provenance import Attested

Claim = tuple[str, str, str]
THE_MODEL, WEIGHTS = "the model", "base model, weights"
THE_KEY = "the signature"
RELEASE = "release.json"
TRAINING = "training.json"
"""File of a training that a release contains as it is."""
UNKNOWN = "unknown"
LARGEST = 100_000_000
"""Bytes of a document that is read."""
SHORT = 300
"""Characters of a name or value that a message repeats."""
_SHA256 = "[0-9a-f]{64}"
_ROWS = re.compile(r"(\d+) rows in, (\d+) out")


def files_of_model(names: Iterable[str]) -> list[str]:
    """The files of a folder outside of its exports."""
    return [name for name in names if not is_export(name)]


def is_export(name: str) -> bool:
    """Whether a file in a folder is an export or their page, also by the names of earlier versions."""
    return name.partition("/")[0] in (FOLDER, PAGE, *FORMER)


def listed_in_release(content: bytes) -> Callable[[str], bool]:
    """Whether a file is one of a release, by its release.json: weights, configuration and tokenizer are listed there;
    card, gate and audit have fixed names."""
    listed = {subject for subject, _, _ in read(RELEASE, content) or []}
    return lambda name: (
        bool(listed) and (name in (RELEASE, "README.md") or name.startswith("audit/") or f"file {name}" in listed)
    )


def of_files(files: Mapping[str, Path], digests: Mapping[str, str]) -> Iterator[Claim]:
    """What the files of the model are.

    Args:
        files: path in the folder -> file, of the model alone.
        digests: path in the folder -> sha256.
    """
    for name in files:
        yield f"file {name}", "sha256", digests[name]
    yield THE_MODEL, "sha256", sha256_of_lines(digests, files)
    yield THE_MODEL, "md5", _md5(md5_of_folder({name: md5_of_file(file) for name, file in files.items()}))


def sha256_of_lines(digests: Mapping[str, str], names: Iterable[str]) -> str:
    """sha256 over the lines "<sha256 of file> <path>", as in the report of a stage."""
    return sha256_of_text("".join(f"{digests[name]} {name}\n" for name in sorted(names, key=lambda name: Path(name))))


def of_attestations(stages: Iterable[Attested]) -> Iterator[Claim]:
    """What the statements say of sources, and of the outputs that are folders."""
    stages = list(stages)
    for stage in stages:
        for name, digests in (*stage.read.items(), *stage.made.items()):
            yield f"file of the project {name}", "md5", digests["md5"]
            yield f"source {name}", "sha256", digests["sha256"]
        made = output_of(stage)
        if not made or "" in made:
            continue
        if TRAINING in made:
            yield f"file audit/{stage.address.replace('@', '_')}/{TRAINING}", "sha256", made[TRAINING]["sha256"]
        for subject in (f"stage {stage.address}", *([THE_MODEL] if stage is stages[-1] else [])):
            yield subject, "sha256", sha256_of_lines({name: one["sha256"] for name, one in made.items()}, made)
            yield subject, "md5", _md5(md5_of_folder({name: one["md5"] for name, one in made.items()}))


def output_of(stage: Attested, like: Mapping[str, str] = {}) -> dict[str, Mapping[str, str]]:
    """The files of the folder that a stage made, by their path in it.

    Args:
        like: path -> sha256 of files. Of several outputs, the one that has most of them is meant, or else the first.
    """
    outs = (path for path in stage.outs if not path.startswith((REPORTS, PLOTS)))
    found = ({path[len(out) + 1 :]: one for path, one in stage.made.items() if is_within(path, out)} for out in outs)
    return max(
        found,
        key=lambda files: (
            sum(one["sha256"] == like.get(name) for name, one in files.items()),
            len(files.keys() & like.keys()),
        ),
        default={},
    )


def _all(digests: Iterable[str]) -> str:
    return ", ".join(sorted(digests)) or "unknown"


def _weights(files: Mapping[str, str]) -> str:
    return _all(digest for name, digest in files.items() if name.endswith(".safetensors"))


def _md5(value: str) -> str:
    return value.removesuffix(".dir")


def _license(value: str | None) -> str:
    """A declared license as it is compared: without case, and in the forms of all documents.

    `markdown` writes it on one line.
    """
    text = " ".join(visible(value or "").replace("`", "").split()).lower()
    return text if text and text not in ("*missing*", "none") else UNKNOWN


def _release(content: bytes) -> Iterator[Claim]:
    for name, digest in envelope.parsed(content)["files"].items():
        yield f"file {name}", "sha256", digest


def _audit(content: bytes) -> Iterator[Claim]:
    document = envelope.parsed(content)
    for path, facts in document["sources"].items():
        yield f"source {path}", "sha256", facts["sha256"]
        yield f"source {path}", "rows", str(facts["rows"])
        yield f"source {path}", "license", _license(facts.get("license"))
    base = document["base_model"].get("sha256", {})
    for name, digest in base.items():
        yield f"base model, file {name}", "sha256", digest
    yield WEIGHTS, "sha256", _weights(base)
    for one in document.get("teachers", ()):
        yield f"teacher of {one['training']}, weights", "sha256", _weights(one["sha256"])
    for name, stage in document["stages"].items():
        if stage["sha256"]:
            yield f"stage {name}", "sha256", stage["sha256"]
        for key in ("rows_in", "rows_out"):
            if key in stage:
                yield f"stage {name}", key, str(stage[key])
        if (rows := rows_written(stage)) is not None:
            yield f"stage {name}", "rows", str(rows)
        for split in ("train", "validation", "test"):
            if isinstance(stage.get(split), int):
                copies = sum(stage.get("augmented", {}).values()) if split == "train" else 0
                yield f"table {name}-{split}", "rows", str(stage[split] + copies)


def _croissant(content: bytes) -> Iterator[Claim]:
    document = envelope.parsed(content)
    for one in document["prov:wasDerivedFrom"]:
        yield f"source {one['name']}", "sha256", one["sha256"]
        yield f"source {one['name']}", "rows", one["description"].partition(" rows")[0]
        yield f"source {one['name']}", "license", _license(one["license"])
    for one in document["prov:wasGeneratedBy"]:
        yield from _flow(one["name"], one["description"])
        if found := re.search(r"output md5 ([0-9a-f]{32})", one["description"]):
            yield f"stage {one['name']}", "md5", found[1]
    for one in document["distribution"]:
        if "md5" in one:
            yield f"file of the project {one['contentUrl']}", "md5", one["md5"]
    for one in document["recordSet"]:
        yield f"table {one['@id']}", "rows", str(one["annotation"]["value"])


def _flow(stage: str, text: str) -> Iterator[Claim]:
    if found := _ROWS.match(text):
        yield f"stage {stage}", "rows_in", found[1]
        yield f"stage {stage}", "rows_out", found[2]


def _cyclonedx(content: bytes) -> Iterator[Claim]:
    document = envelope.parsed(content)
    for part in (document["metadata"]["component"], *document["components"]):
        kind, _, name = part["bom-ref"].partition(":")
        facts = {one["name"].removeprefix("pedigree:"): one["value"] for one in part.get("properties", [])}
        subject = {"model": THE_MODEL, "source": f"source {name}", "stage": f"stage {name}"}.get(kind)
        if kind == "base_model":
            for key, value in facts.items():
                if key.startswith("sha256:"):
                    yield f"base model, file {key.removeprefix('sha256:')}", "sha256", value
        if subject is None:
            continue
        for one in part.get("hashes", []):
            if one["alg"] == "SHA-256":
                yield subject, "sha256", one["content"]
        if "md5" in facts:
            yield subject, "md5", _md5(facts["md5"])
        if "rows" in facts:
            yield subject, "rows", facts["rows"]
        if kind == "source":
            declared = [
                one["expression"] if "expression" in one else one["license"] for one in part.get("licenses", [])
            ]
            for one in declared or [UNKNOWN]:
                yield subject, "license", _license(one if isinstance(one, str) else one.get("id") or one["name"])
        if kind == "stage":
            yield from _flow(name, part["data"][0]["description"])
    for task in document["formulation"][0]["workflows"][0]["tasks"]:
        yield f"stage {task['name']}", "md5", _md5(task["uid"])


def _spdx(content: bytes) -> Iterator[Claim]:
    graph = envelope.parsed(content)["@graph"]
    licenses = {
        one["spdxId"]: one["simplelicensing_licenseExpression"]
        for one in graph
        if one["type"] == "simplelicensing_LicenseExpression"
    }
    declared = {
        one["from"]: licenses.get(ref, UNKNOWN)
        for one in graph
        for ref in one.get("to", ())
        if one.get("relationshipType") == "hasDeclaredLicense"
    }
    roots = {ref for one in graph if one["type"] == "SpdxDocument" for ref in one["rootElement"]}
    for one in graph:
        sums = {(digest["algorithm"], digest["hashValue"]) for digest in one.get("verifiedUsing", [])}
        if one.get("spdxId") in roots:
            yield from ((THE_MODEL, "md5" if kind == "md5" else "sha256", value) for kind, value in sums)
        elif one["type"] == "ai_AIPackage":
            training, taught, _ = one.get("comment", "").partition(DISTILLED)
            yield f"teacher of {training}, weights" if taught else WEIGHTS, "sha256", _all(digest for _, digest in sums)
        elif one["type"] == "dataset_DatasetPackage":
            made = "md5" in dict(sums)
            subject = f"{'stage' if made else 'source'} {one['name']}"
            yield from ((subject, "md5" if kind == "md5" else "sha256", value) for kind, value in sums)
            yield subject, "rows", str(one["dataset_datasetSize"])
            # other names are not written as they were declared
            if not made and "LicenseRef-" not in (license := declared[one["spdxId"]]):
                yield subject, "license", _license(license)


def _openlineage(content: bytes) -> Iterator[Claim]:
    events = [envelope.parsed(line) for line in content.splitlines()]
    done = [event for event in events if event["eventType"] == "COMPLETE"]
    outputs = {one["name"] for event in done for one in event["outputs"]}
    for event in done:
        stage = event["job"]["name"]
        for one in event["outputs"]:
            for subject in (f"stage {stage}", *([THE_MODEL] if event is done[-1] else [])):
                yield subject, "md5", _md5(one["facets"]["contentHash"]["md5"])
                yield subject, "sha256", one["facets"]["contentHash"]["sha256"]
            rows = one["outputFacets"]["outputStatistics"].get("rowCount")
            if rows is not None:
                yield f"stage {stage}", "rows", str(rows)
        for one in event["inputs"]:
            digest = one["facets"]["contentHash"].get("sha256")
            if digest and one["name"] not in outputs:
                yield f"source {one['name']}", "sha256", digest


def _rows(text: str, columns: int) -> Iterator[list[str]]:
    """The rows of the tables with so many columns in a Markdown document, without escapes.

    Linear in the length of a line, as everything that reads a document here.
    """
    for line in text.split("\n"):
        if line.startswith("| ") and line.endswith(" |") and len(cells := line[2:-2].split(" | ")) == columns:
            yield [re.sub(r"\\(.)", r"\1", cell).strip("`") for cell in cells]


def _hashed(text: str, *header: str) -> Iterator[list[str]]:
    """The rows of the tables with this header, whose last column is the sha256.

    Raises:
        ValueError: a row has another form.
    """
    inside = False
    for line in text.split("\n"):
        inside = line == f"| {' | '.join(header)} |" or (inside and line.startswith("|"))
        if not inside or line.startswith((f"| {header[0]} | {header[1]} |", "| --- |")):
            continue
        [cells] = _rows(line, len(header))
        if cells[-1] != "None" and not _is_sha256(cells[-1]):
            raise ValueError(line)
        yield cells


def _sources(text: str, *header: str) -> Iterator[Claim]:
    """What a table of sources says."""
    for cells in _hashed(text, "source", "rows", *header, "sha256"):
        yield f"source {cells[0]}", "rows", cells[1]
        yield f"source {cells[0]}", "sha256", cells[-1]
        if "license" in header:
            yield f"source {cells[0]}", "license", _license(cells[2 + header.index("license")])


def _card(content: bytes) -> Iterator[Claim]:
    text = content.decode()
    for digest in re.findall(rf"(?m)^- content: sha256 ({_SHA256})$", text):
        yield THE_MODEL, "sha256", digest
    for md5 in re.findall(r"(?m)^- DVC: ([0-9a-f]{32})(?:\.dir)?$", text):
        yield THE_MODEL, "md5", md5
    for line in text.split("\n"):
        if line.startswith("Tuned from "):
            for name, digest in re.findall(rf"`([^`]+)` ({_SHA256})", line.rpartition("(sha256 of ")[2]):
                yield f"base model, file {name}", "sha256", digest
    yield from _sources(text, "format", "license")
    for name, first, second, _, digest in _hashed(text, "stage", "rows in", "rows out", "dropped", "sha256"):
        yield f"stage {name}", "rows_in", first
        yield f"stage {name}", "rows_out", second
        if _is_sha256(digest):
            yield f"stage {name}", "sha256", digest


def _is_sha256(text: str) -> bool:
    return re.fullmatch(_SHA256, text) is not None


def _eu_summary(content: bytes) -> Iterator[Claim]:
    text = content.decode()
    for line in text.split("\n"):
        if line.startswith("- **Versioned model name(s):**"):
            yield THE_MODEL, "md5", _md5(line.rpartition("content md5 ")[2])
    yield from _sources(text, "in training splits", "license", "category", "collected")


def _datasheet(content: bytes) -> Iterator[Claim]:
    text = content.decode()
    for md5 in re.findall(r"(?m)^The data of .* \(md5 ([0-9a-f]{32})(?:\.dir)?\), issued", text):
        yield THE_MODEL, "md5", md5
    for stage, table, rows in _rows(text, 3):
        if rows.isdigit():
            yield f"table {stage}-{table}", "rows", rows
    yield from _sources(text, "in training splits")
    for versions in re.findall(r"(?m)^Versions are named by content hash \((.*)\)", text):
        for one in versions.split(", "):
            stage, _, md5 = one.partition(" ")
            yield f"stage {stage}", "md5", _md5(md5)


def _page(content: bytes) -> Iterator[Claim]:
    head, *links = content.decode().split('<a href="')
    value = r"</dt><dd><bdi[^>]*>(?:md5 )?([0-9a-f]+)(?:\.dir)?</bdi></dd></div>"
    md5, digest = re.findall(rf"<div><dt>content{value}\s*<div><dt>sha256{value}", head)[0]
    yield THE_MODEL, "md5", md5
    yield THE_MODEL, "sha256", digest
    if found := _SIGNED_BY.search(head):
        yield THE_KEY, "key sha256", found[1]
    for link in links:
        name = link.partition('"')[0]
        if name == ATTESTATIONS or name.startswith(f"{FOLDER}/"):
            yield f"document {name}", "sha256", re.findall(f"<dt>sha256{value}", link)[0]


_SIGNED_BY = re.compile(rf"<div><dt>signed by</dt><dd><bdi[^>]*>key sha256 ({_SHA256})</bdi>")


def key_on_page(content: bytes) -> str | None:
    """The sha256 of the key that the page says has signed the folder."""
    found = _SIGNED_BY.search(content.decode(errors="replace"))
    return found[1] if found else None


def links_on_page(content: bytes) -> set[str]:
    """The files that the page links, without those that verification needs no
    file for: the public key may come from elsewhere."""
    return set(re.findall(r'<a href="([^"#]+)"', content.decode(errors="replace"))) - {PUBLIC_KEY}


ROWS_AND_HASHES = "hashes and rows of sources and stages"
_MODEL_MD5, _MODEL_SHA256 = (THE_MODEL, "md5"), (THE_MODEL, "sha256")
_SOURCE, _SOURCE_ROWS, _SOURCE_LICENSE = ("source ", "sha256"), ("source ", "rows"), ("source ", "license")
_STAGE, _STAGE_MD5 = ("stage ", "sha256"), ("stage ", "md5")
READERS: Mapping[str, tuple[Callable[[bytes], Iterator[Claim]], str, tuple[tuple[str, str], ...]]] = {
    RELEASE: (_release, "the hash of each file that was there when it was written", (("file ", "sha256"),)),
    "audit/audit.json": (
        _audit,
        f"{ROWS_AND_HASHES}, licenses, sizes of splits, hashes of the base model",
        (_SOURCE, _SOURCE_ROWS, _SOURCE_LICENSE, _STAGE, ("base model", "sha256")),
    ),
    "README.md": (
        _card,
        f"{ROWS_AND_HASHES}, licenses, hashes of the base model",
        (_SOURCE, _SOURCE_ROWS, _SOURCE_LICENSE, _STAGE, ("base model", "sha256")),
    ),
    f"{FOLDER}/README.md": (
        _card,
        f"the hashes of the model and the base model, {ROWS_AND_HASHES}, licenses",
        (_MODEL_MD5, _MODEL_SHA256, _SOURCE, _SOURCE_ROWS, _SOURCE_LICENSE, _STAGE, ("base model", "sha256")),
    ),
    f"{FOLDER}/bom.cdx.json": (
        _cyclonedx,
        f"the hashes of the model and the base model, {ROWS_AND_HASHES}, licenses",
        (_MODEL_MD5, _MODEL_SHA256, _SOURCE, _SOURCE_ROWS, _SOURCE_LICENSE, _STAGE, _STAGE_MD5),
    ),
    f"{FOLDER}/croissant.json": (
        _croissant,
        f"{ROWS_AND_HASHES}, licenses, hashes of files, rows of tables",
        (_SOURCE, _SOURCE_ROWS, _SOURCE_LICENSE, _STAGE_MD5, ("file of the project ", "md5"), ("table ", "rows")),
    ),
    f"{FOLDER}/datasheet.md": (
        _datasheet,
        "the hash of the model, hashes and rows of sources, hashes of data sets, rows of tables",
        (_MODEL_MD5, _SOURCE, _SOURCE_ROWS, _STAGE_MD5, ("table ", "rows")),
    ),
    f"{FOLDER}/lineage.jsonl": (
        _openlineage,
        f"the hash of the model, {ROWS_AND_HASHES}",
        (_MODEL_MD5, _MODEL_SHA256, _SOURCE, _STAGE, _STAGE_MD5),
    ),
    f"{FOLDER}/model.spdx.json": (
        _spdx,
        f"the hashes of the model and the base model, {ROWS_AND_HASHES}, licenses that are in SPDX's list",
        (_MODEL_MD5, _MODEL_SHA256, _SOURCE, _SOURCE_ROWS, _STAGE_MD5),
    ),
    f"{FOLDER}/training-content.md": (
        _eu_summary,
        "the hash of the model, hashes, rows and licenses of sources",
        (_MODEL_MD5, _SOURCE, _SOURCE_ROWS, _SOURCE_LICENSE),
    ),
    PAGE: (_page, "the hashes of the model and of each document", (_MODEL_MD5, _MODEL_SHA256)),
}
"""Path in the folder of a model -> how it is read, what is compared, and what
every such document states: the beginning of a subject, and the property."""


def compared_in(name: str) -> str:
    """What `verify --signatures` compares in a document, apart from its own hash; empty if nothing."""
    return READERS[name][1] if name in READERS else ""


def read(name: str, content: bytes) -> list[Claim] | None:
    """The claims of a document; None if it does not have the form that `pedigree export` writes.

    One that lists all sources also claims which these are.
    """
    try:
        found = [(subject, key, value) for subject, key, value in READERS[name][0](content) if isinstance(value, str)]
    except (SignatureError, UnicodeDecodeError, KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    if _SOURCE_ROWS in READERS[name][2]:
        sources = {
            visible(subject.removeprefix("source "))
            for subject, key, _ in found
            if subject.startswith("source ") and key == "sha256"
        }
        found += [(THE_MODEL, "sources", ", ".join(sorted(sources)))] if sources else []
    return found or None


def lacks(name: str, claims: Iterable[Claim]) -> bool:
    """Whether a document does not state all that every document of its kind does: then it is compared in part."""
    claims = list(claims)
    return not all(
        any(subject.startswith(what) and key == one for subject, key, _ in claims) for what, one in READERS[name][2]
    )


def document_claims(files: Mapping[str, Path], digests: Mapping[str, str]) -> Iterator[Claim]:
    """What the documents in a folder are.

    Args:
        files: path in the folder -> file.
        digests: path in the folder -> sha256, at least of the documents.
    """
    return (
        (f"document {name}", "sha256", digests[name])
        for name in files
        if name == ATTESTATIONS or name.startswith(f"{FOLDER}/")
    )


def contradictions(stated: Mapping[str, Iterable[Claim]]) -> tuple[dict[str, str], int]:
    """Where documents contradict those before them.

    Args:
        stated: document -> its claims, the most reliable first.
    Returns:
        (document -> its first contradiction, number of claims that were compared with another).
    """
    known: dict[tuple[str, str], tuple[str, str]] = {}
    wrong, compared = dict[str, str](), 0
    for name, claims in stated.items():
        for subject, key, value in claims:
            # as `markdown` writes names
            value_before, before = known.setdefault((visible(subject), key), (value, name))
            compared += before != name
            if value != value_before:
                unit = key.replace("_", " ")
                finding = (
                    f"contradicts {before}: {subject[:SHORT]} has {unit} {value[:SHORT]} here,"
                    f" and {value_before[:SHORT]} there"
                )
                wrong.setdefault(name, finding)
    return wrong, compared
