"""`pedigree verify MODEL --signatures`: compare a model, and all files of its lineage, with what was signed.

Works offline, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

from dagster_project.commands.sign import Lineage
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_file, md5_of_folder, sha256_of_file
from dagster_project.core.text import listed
from dagster_project.lineage.export.folder import FOLDER, PAGE
from dagster_project.lineage.exports_in_place import FORMER
from dagster_project.lineage.history import LOCK, is_within
from dagster_project.lineage.signing import claims, model_signature, provenance
from dagster_project.lineage.signing.envelope import SignatureError
from dagster_project.lineage.signing.keys import PublicKey, public_key, public_key_of
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, IGNORED, PUBLIC_KEY, SIGNATURE
from dagster_project.lineage.signing.provenance import Attested
from dagster_project.lineage.signing.target import SIGNATURES, Target, find
from dagster_project.views.texts import text

NOT_ATTESTED = f"the lineage (no {ATTESTATIONS})"
OF_A_DOWNLOAD = ".cache/huggingface/"
"""What `hf download --local-dir` adds to a folder."""
NOT_SIGNED = f"the files (no {SIGNATURE})"
NO_PROJECT = "the stages before it and their files, which only its project has"
NO_KEY = "who signed: the public key came with the signatures; give the one that you trust with --key"

NOT_IN_FILES = (
    (
        "that the data is what its hashes name,"
        " and that declarations about sources are true: it takes the data, and people"
    ),
    "numbers that one document alone states, such as results: its project computes them again",
    "licenses of the base model, and those in the datasheet and in the metadata of cards",
)
NOT_REMADE = (
    "that the recorded commands give these bytes: `pedigree verify MODEL --deep` in the project makes the model again"
)

LARGEST = 100_000_000
"""Bytes of a file of signatures that is read."""


def verify_signatures(root: Path, model: str, key_file: str | None) -> dict[str, Any]:
    """Verify the signature and the attestations of a model.

    Args:
        root: folder that may be a project.
        model: name of a stage, path of its output, content hash, or a folder that contains its signatures.
        key_file: of the public key to trust; None: the one beside the signatures.
    Returns:
        {"model", "folder", "verdict" (docs/signing.md), "key": sha256 of the public key, "key_given", "signature":
        {"file", "files"} or None, "attestations": {"file", "stages", "files", "remade"} or None, "project": both of a
        release that has signatures in its folder and in the project, "compared": {"documents", "values"} that were
        compared, or None, "findings": [{"file", "wrong"}], "not_checked": what could not be verified}.
    Raises:
        InputError: nothing is signed, or the key given cannot be used.
    """
    found, given = find(root, model), public_key_of(key_file) if key_file else None
    recorded = found.root is None or any(os.path.lexists(found.signatures / name) for name in (SIGNATURE, ATTESTATIONS))
    if not _has_own_signatures(found, recorded):
        return _with_unsigned_exports(verify_target(found, given), found)
    own = verify_target(found.as_folder(), given, found)
    return _combined(own, verify_target(found, given)) if recorded else own


def verify_target(target: Target, given: PublicKey | None, recorded: Target | None = None) -> dict[str, Any]:
    """As `verify_signatures`, of the signatures of one place.

    Args:
        given: the public key to trust.
        recorded: the output that the folder is in the place of.
    """
    signature, attestations, pem = (target.signatures / name for name in (SIGNATURE, ATTESTATIONS, PUBLIC_KEY))
    claimed = _key_on_page(target)
    if not any(map(os.path.lexists, (signature, attestations))) and claimed is None:
        where = f" in {target.shown(target.signatures)}" if target.root else ""
        raise InputError(
            f"{target.label} has no signatures{where}", f"`pedigree sign {quote(target.label)} --key FILE` signs it"
        )
    verification = _Verification(target)
    verification.refuse_other_kinds(signature, attestations, pem)
    if claimed is not None and not os.path.lexists(signature):
        verification.find(
            target.shown(signature),
            f"is missing, and {PAGE} states the key that signed the folder (sha256 {claimed[:16]})",
        )
    key = verification.key(pem, given)
    if key is not None:
        verification.check_signature(signature, key)
        verification.check_attestations(attestations, key)
    if recorded is not None:
        verification.check_record(recorded)
    altered = bool(verification.findings)
    if target.root is None and any((target.folder / name).is_file() for name in (PAGE, "audit/audit.json")):
        verification.check_documents()
    if verification.left_out:
        reason = "which signatures leave out" if verification.signature else "which the attestations do not cover"
        verification.not_checked.append(f"{', '.join(sorted(verification.left_out))} in {target.path}, {reason}")
    if given is None:
        verification.not_checked.append(NO_KEY)
    if altered:
        verdict = "altered"
    elif verification.findings:
        verdict = "contradictory"
    else:
        incomplete = not signature.is_file() and {PAGE, FOLDER, *FORMER} & (verification.left_out or set())
        verdict = "incomplete" if incomplete else "verified"
    return {
        "model": target.label,
        "folder": target.path,
        "verdict": verdict,
        "key": key.fingerprint if key else None,
        "key_given": given is not None,
        "signature": verification.signature,
        "attestations": verification.attestations,
        "compared": verification.compared,
        "findings": [{"file": file, "wrong": wrong} for file, wrong in sorted(verification.findings.items())],
        "not_checked": verification.not_checked,
    }


def _has_own_signatures(target: Target, recorded: bool) -> bool:
    """Whether an output contains its signatures: a release with its exports, or, if the project has none of it, a
    folder that was handed over, put in its place in a clone. Also if a page says so, and they are missing.

    Args:
        recorded: whether the project has signatures of it.
    """
    if target.root is None or (recorded and not target.exports):
        return False
    own = any(os.path.lexists(target.folder / name) for name in (SIGNATURE, ATTESTATIONS))
    return own or (bool(target.exports) and _key_on_page(target.as_folder()) is not None)


def _with_unsigned_exports(document: dict[str, Any], target: Target) -> dict[str, Any]:
    """The document of a release, if exports without a signature are beside its files.

    It covers the release alone, and compares what they state.
    """
    found = [name for name in target.exports if os.path.lexists(target.folder / name)]
    if not found:
        return document
    verdict, contradictions = document["verdict"], dict[str, str]()
    if verdict == "verified":
        contradictions = contradictions_in(target.as_folder())
        verdict = "contradictory" if contradictions else "incomplete"
    contradicted = [{"file": file, "wrong": wrong} for file, wrong in sorted(contradictions.items())]
    findings = [*document["findings"], *contradicted]
    note = f"{', '.join(sorted(found))} in {target.path}: no signature covers them"
    return {**document, "verdict": verdict, "findings": findings, "not_checked": [*document["not_checked"], note]}


def _combined(own: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
    """What the signatures in a folder say, and what those that the project has of it say."""
    findings = [*own["findings"], *(one for one in project["findings"] if one not in own["findings"])]
    verdicts = {own["verdict"], project["verdict"]}
    if own["key"] and project["key"] and own["key"] != project["key"]:
        wrong = f"is another key than that of {project['folder']}'s own signatures (sha256 {own['key'][:16]})"
        findings.append({"file": f"{SIGNATURES}/{project['model']}/{PUBLIC_KEY}", "wrong": wrong})
        verdicts.add("contradictory")
    done = {NO_PROJECT} if project["attestations"] else set()
    done |= {
        text for key, text in (("signature", NOT_SIGNED), ("attestations", NOT_ATTESTED)) if own[key] or project[key]
    }
    unknown = dict.fromkeys([*own["not_checked"], *project["not_checked"]])
    return {
        **own,
        "verdict": next(
            verdict for verdict in ("altered", "contradictory", "incomplete", "verified") if verdict in verdicts
        ),
        "project": {"signature": project["signature"], "attestations": project["attestations"]},
        "findings": findings,
        "not_checked": [what for what in unknown if what not in done],
    }


def contradictions_in(target: Target) -> dict[str, str]:
    """File in a folder -> where the documents in the folder contradict its
    files or each other, whether they are signed or not."""
    present = {"file": ATTESTATIONS} if _is_regular(target.folder / ATTESTATIONS) else None
    verification = _Verification(target, attestations=present)
    verification.check_documents()
    return verification.findings


def _key_on_page(target: Target) -> str | None:
    """The sha256 of the key that the page in a folder says has signed it."""
    page = target.folder / PAGE
    return claims.key_on_page(_document(page)) if target.root is None and _is_regular(page) else None


def _is_regular(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _document(file: Path) -> bytes:
    return b"" if file.stat().st_size > claims.LARGEST else file.read_bytes()


@dataclass
class _Verification:
    target: Target
    findings: dict[str, str] = field(default_factory=dict)
    """Path of a file -> what is wrong with it."""
    not_checked: list[str] = field(default_factory=list)
    left_out: set[str] | None = None
    """What is in the folder and no comparison included; None before the first."""
    signature: dict[str, Any] | None = None
    signed_by: str = ""
    """The sha256 of the key of the signature."""
    attestations: dict[str, Any] | None = None
    compared: dict[str, Any] | None = None
    stages: Sequence[Attested] = ()
    """Those of the attestations, if they are signed by the key."""
    _sha256: Callable[[Path], str] = field(default_factory=lambda: cache(sha256_of_file))
    """Each file is hashed once."""

    def find(self, file: str, wrong: str) -> None:
        self.findings.setdefault(file, wrong)

    def refuse_other_kinds(self, *files: Path) -> None:
        """Files of signatures that are links, folders or something else are
        findings, and not files that are missing."""
        for file in files:
            if os.path.lexists(file) and not _is_regular(file):
                self.find(
                    self.target.shown(file), "exists, but is not a file: it is a link, a folder or something else"
                )

    def key(self, pem: Path, given: PublicKey | None) -> PublicKey | None:
        """The key to verify with; None, and a finding, if the one beside the signatures is missing or damaged.

        If a key is given, that one must equal it.
        """
        name = self.target.shown(pem)
        if not pem.is_file():
            if given is None:
                self.find(name, "is missing: without --key, it is the key to verify with")
            return given
        try:
            content = _content(pem)
            found = public_key(content, name)
        except SignatureError as error:
            self.find(name, str(error))
            return given
        except InputError:
            self.find(name, "is not a public key")
            return given
        if found.pem != content:
            self.find(name, "was changed: it is not written as `pedigree sign` writes it")
        elif given is not None and found.pem != given.pem:
            self.find(name, f"is another key than the one given (sha256 {given.fingerprint[:16]})")
        return given or found

    def check_signature(self, file: Path, key: PublicKey) -> None:
        """Compare the folder with its signature."""
        name = self.target.shown(file)
        if not file.is_file():
            self.not_checked.append(NOT_SIGNED)
            return
        try:
            signed = model_signature.read_bundle(_content(file), key)
        except SignatureError as error:
            self.find(name, str(error))
            return
        self.signature, self.signed_by = {"file": name, "files": len(signed.files)}, key.fingerprint
        self._compare_files(signed.files, signed.ignored, "signed")

    def check_attestations(self, file: Path, key: PublicKey) -> None:
        """Compare dvc.lock and the files of the lineage with the attestations;
        of a folder outside a project, the folder only."""
        name = self.target.shown(file)
        if not file.is_file():
            self.not_checked.append(NOT_ATTESTED)
            return
        try:
            stages = provenance.read(_content(file), key)
        except SignatureError as error:
            self.find(name, str(error))
            return
        self.stages = stages
        results = {stage.remade for stage in stages}
        remade = None if None in results else "identical" if results == {"identical"} else "elsewhere"
        files = len({path for stage in stages for path in (*stage.read, *stage.made)})
        self.attestations = {
            "file": name,
            "stages": [stage.address for stage in stages],
            "files": files,
            "remade": remade,
        }
        if self.target.root is None:
            self._compare_folder(stages[-1])
            self.not_checked.append(NO_PROJECT)
        else:
            self._compare_project(name, self.target.root, stages)

    def _compare_folder(self, last: Attested) -> None:
        """Compare a copy of an output with the statement about its stage."""
        made = {name: digests["sha256"] for name, digests in self._output_of(last).items()}
        beside = (*IGNORED, PAGE, FOLDER, *FORMER)
        self._compare_files(
            made, [name for name in beside if not any(is_within(path, name) for path in made)], "attested"
        )
        for name in model_signature.contents(self.target.folder, IGNORED).other:
            self.find(f"{self.target.path}/{name}", "is neither a file nor a folder")

    def _output_of(self, stage: Attested) -> dict[str, Mapping[str, str]]:
        """The files of the output that the folder is a copy of, by the statement about its stage."""
        found = model_signature.contents(self.target.folder, IGNORED).files
        return claims.output_of(stage, {name: self._sha256(file) for name, file in found.items()})

    def _compare_files(self, expected: Mapping[str, str], ignored: Iterable[str], done: str) -> None:
        """Compare the folder with the sha256 of its files."""
        found = model_signature.contents(self.target.folder, (*ignored, *self.target.exports))
        for path, wrong in model_signature.differences(expected, found, self._sha256, done).items():
            by_client = " (by the Hub's client: delete .cache)" if path.startswith(OF_A_DOWNLOAD) else ""
            self.find(f"{self.target.path}/{path}", f"{wrong}{by_client}")
        left_out = {*found.ignored} - {ATTESTATIONS, PUBLIC_KEY, SIGNATURE, *self.target.exports}
        self.left_out = left_out if self.left_out is None else self.left_out & left_out

    def check_documents(self) -> None:
        """Compare the documents in the folder with its files, with the attestations, and with each other."""
        if self.findings:
            self.not_checked.append("what the documents state: files are not what was signed")
            return
        found = model_signature.contents(self.target.folder, IGNORED).files
        attestations = self.target.folder / ATTESTATIONS
        found = {**found, **({ATTESTATIONS: attestations} if self.attestations else {})}
        digests = {name: self._sha256(file) for name, file in found.items()}
        model, others = self._model(found)
        stated: dict[str, Iterable[claims.Claim]] = {"the files": claims.document_claims(found, digests)}
        if self.signed_by:
            stated[SIGNATURE] = [(claims.THE_KEY, "key sha256", self.signed_by)]
        if model:
            stated["the files of the model"] = claims.of_files(model, digests)
        if self.stages:
            stated[ATTESTATIONS] = claims.of_attestations(self.stages)
        documents = {name: claims.read(name, _document(found[name])) for name in claims.READERS if name in found}
        wrong, compared = claims.contradictions(
            {**stated, **{name: values for name, values in documents.items() if values}}
        )
        for name, what in wrong.items():
            self.find(
                f"{self.target.path}/{name}" if name in found else self.target.shown(self.target.signatures / name),
                what,
            )
        if documents.get(PAGE):
            self._compare_links(found)
        read = [name for name, values in documents.items() if values and not claims.lacks(name, values)]
        self.compared = {"documents": len(read), "values": compared}
        unread = [name for name in found if claims.is_export(name) and name not in documents]
        if unread := [*unread, *(name for name, values in documents.items() if values is None)]:
            self.not_checked.append(f"what {', '.join(unread)} state: not in a form that is compared")
        if partly := [name for name, values in documents.items() if values and name not in read]:
            self.not_checked.append(f"all that {', '.join(partly)} state: only a part is in a form that is compared")
        if others:
            self.not_checked.append(f"{listed(others, 3)}: not an export, and not listed as part of the model")
        self.not_checked += NOT_IN_FILES
        if (self.attestations or {}).get("remade") is None:
            self.not_checked.append(NOT_REMADE)

    def _model(self, found: Mapping[str, Path]) -> tuple[dict[str, Path], list[str]]:
        """The files of the model, which the attestations or else release.json
        list, and the names of those that are neither part of it nor exports."""
        names = [name for name in claims.files_of_model(found) if name != ATTESTATIONS]
        listed: Callable[[str], bool] | None = (
            set(self._output_of(self.stages[-1])).__contains__ if self.stages else None
        )
        if listed is None and claims.RELEASE in found:
            listed = claims.listed_in_release(_document(found[claims.RELEASE]))
        model = {name: found[name] for name in names if listed is not None and listed(name)}
        return model, [name for name in names if name not in model and name not in claims.READERS]

    def _compare_links(self, found: Mapping[str, Path]) -> None:
        """Compare the links of the page with the files: each leads to one, and there is one to each export."""
        links = claims.links_on_page(_document(found[PAGE]))
        present = {*found, SIGNATURE}
        for name in sorted(links - present):
            self.find(f"{self.target.path}/{name}", f"is missing, and {PAGE} lists it")
        for name in found:
            if name.startswith(f"{FOLDER}/") and name not in links:
                self.find(f"{self.target.path}/{name}", f"is not listed in {PAGE}")

    def check_record(self, recorded: Target) -> None:
        """Compare a folder in the place of an output with what dvc.lock records
        of that output and, by the attestations, of all stages."""
        assert recorded.root is not None
        found = model_signature.contents(self.target.folder, IGNORED).files
        model = {name: md5_of_file(found[name]) for name in claims.files_of_model(found)}
        if md5_of_folder(model) != recorded.md5:
            self.find(recorded.path, f"is not what dvc.lock recorded for {recorded.address}")
        texts = provenance.lock_texts(recorded.lock_text)
        for stage in self.stages:
            if not stage.describes(texts.get(stage.address)):
                self.find(f"{LOCK}: {stage.address}", "is not what was attested")

    def _compare_project(self, name: str, root: Path, stages: Sequence[Attested]) -> None:
        """Compare the entries of dvc.lock, and every file that they refer to, with the statements."""
        lineage = Lineage(root, self.target.lock, self.target.lock_text, self.target.address)
        texts, addresses = lineage.texts(), lineage.addresses()
        if sorted(addresses) != sorted(stage.address for stage in stages) or stages[-1].address != self.target.address:
            different = sorted({*addresses} ^ {stage.address for stage in stages}) or [stages[-1].address]
            self.find(name, f"describes another lineage than dvc.lock: {', '.join(different)}")
        for stage in stages:
            if not stage.describes(texts.get(stage.address)):
                self.find(f"{LOCK}: {stage.address}", "is not what was attested")
        attested = {path: digests for stage in stages for path, digests in (*stage.read.items(), *stage.made.items())}
        now = lineage.present(
            [path for stage in stages for path in stage.deps], [path for stage in stages for path in stage.outs]
        )
        for path, digests in attested.items():
            if path not in now.regular:
                self.find(path, "is missing, and was attested")
            elif now.regular[path] and lineage.digests(path) != digests:
                self.find(path, "is not what was attested")
        self.left_out = set()
        compared = {*attested, *now.made, *now.listed} & now.regular.keys()
        for path in compared:
            if not now.regular[path]:
                self.find(path, "is neither a file nor a folder")
            elif path not in attested:
                self.find(path, "was added since it was attested")
        if ignored := sorted(now.regular.keys() - compared):
            self.not_checked.append(f"files of sources and code that DVC ignores: {len(ignored)} (first: {ignored[0]})")
        if any(line.strip() and not line.startswith("#") for line in _lines(root / ".dvcignore")):
            self.not_checked.append(".dvcignore, which decides what DVC ignores: it is not attested")


def _content(file: Path) -> bytes:
    """Raises:
    SignatureError: the file is too large to be read at once.
    """
    if file.stat().st_size > LARGEST:
        raise SignatureError(f"is larger than {LARGEST // 1_000_000} MB")
    return file.read_bytes()


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []


def as_text(document: Mapping[str, Any]) -> str:
    """The document of `verify_signatures` as text for the terminal.

    A name or a value with a line break must not look like a line of it.
    """
    return text("signatures", **document, places=[document, document.get("project", {})])
