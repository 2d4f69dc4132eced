"""`pedigree verify MODEL --signatures`: compare a model, and all files of its lineage, with what was signed. Works offline, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_project.commands.sign import Lineage
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.layout import PLOTS, REPORTS
from dagster_project.lineage.export.folder import FOLDER, PAGE
from dagster_project.lineage.history import LOCK, is_within
from dagster_project.lineage.signing import model_signature, papers, provenance
from dagster_project.lineage.signing.envelope import SignatureError
from dagster_project.lineage.signing.keys import PublicKey, public_key, public_key_of
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, IGNORED, PUBLIC_KEY, SIGNATURE
from dagster_project.lineage.signing.provenance import Attested
from dagster_project.lineage.signing.target import Target, find

NOT_ATTESTED = f"the lineage (no {ATTESTATIONS})"
NOT_SIGNED = f"the files (no {SIGNATURE})"
NO_PROJECT = "the stages before it and their files, which only its project has"
NO_KEY = "who signed: the public key came with the signatures; give the one that you trust with --key"

NOT_IN_FILES = (
    "that the data is what its hashes name, and that declarations about sources are true: it takes the data, and people",
    "numbers that one document alone states, such as results: its project computes them again",
)
NOT_REMADE = "that the recorded commands give these bytes: `pedigree verify MODEL --deep` in the project makes the model again"

LARGEST = 100_000_000
"""Bytes of a file of signatures that is read."""


def verify_signatures(root: Path, model: str, key_file: str | None) -> dict[str, Any]:
    """Verify the signature and the attestations of a model.

    Args:
        root: folder that may be a project.
        model: name of a stage, path of its output, content hash, or a folder that contains its signatures.
        key_file: of the public key to trust; None: the one beside the signatures.
    Returns:
        {"model", "folder", "verdict": "verified", "altered" or "contradictory", "key": sha256 of the public key, "key_given", "signature": {"file", "files"} or None,
        "attestations": {"file", "stages", "files", "remade": verdict or None} or None,
        "papers": {"documents": that were compared, "values": that two of them state} or None, "findings": [{"file", "wrong"}],
        "not_checked": what could not be verified}. The verdict is "contradictory" if all is as it was signed, but documents in a folder
        contradict its files or each other.
    Raises:
        InputError: nothing is signed, or the key given cannot be used.
    """
    target = _with_own_signatures(find(root, model))
    signature, attestations, pem = (target.signatures / name for name in (SIGNATURE, ATTESTATIONS, PUBLIC_KEY))
    given = public_key_of(key_file) if key_file else None
    if not signature.is_file() and not attestations.is_file():
        where = f" in {target.shown(target.signatures)}" if target.root else ""
        raise InputError(f"{target.label} has no signatures{where}", f"`pedigree sign {target.label} --key FILE` signs it")
    verification = _Verification(target)
    key = verification.key(pem, given)
    if key is not None:
        verification.check_signature(signature, key)
        verification.check_attestations(attestations, key)
    altered = bool(verification.findings)
    if target.root is None and any((target.folder / name).is_file() for name in (PAGE, "audit/audit.json")):
        verification.check_papers()
    if verification.left_out:
        reason = "which signatures leave out" if verification.signature else "which the attestations do not cover"
        verification.not_checked.append(f"{', '.join(sorted(verification.left_out))} in {target.path}, {reason}")
    if given is None:
        verification.not_checked.append(NO_KEY)
    return {
        "model": target.label,
        "folder": target.path,
        "verdict": "altered" if altered else "contradictory" if verification.findings else "verified",
        "key": key.fingerprint if key else None,
        "key_given": given is not None,
        "signature": verification.signature,
        "attestations": verification.attestations,
        "papers": verification.papers,
        "findings": [{"file": file, "wrong": wrong} for file, wrong in sorted(verification.findings.items())],
        "not_checked": verification.not_checked,
    }


def _with_own_signatures(target: Target) -> Target:
    """An output that contains its signatures, while the project has none of it: a folder that was handed over, put in its place in a clone."""
    if target.root is None or any((target.signatures / name).is_file() for name in (SIGNATURE, ATTESTATIONS)):
        return target
    return Target(None, "", target.path, target.folder, {}, "") if (target.folder / SIGNATURE).is_file() else target


@dataclass
class _Verification:
    target: Target
    findings: dict[str, str] = field(default_factory=dict)
    """Path of a file -> what is wrong with it."""
    not_checked: list[str] = field(default_factory=list)
    left_out: set[str] | None = None
    """What is in the folder and no comparison included; None before the first."""
    signature: dict[str, Any] | None = None
    attestations: dict[str, Any] | None = None
    papers: dict[str, Any] | None = None
    stages: Sequence[Attested] = ()
    """Those of the attestations, if they are signed by the key."""
    _digests: dict[Path, str] = field(default_factory=dict)

    def _sha256(self, file: Path) -> str:
        """Each file is hashed once."""
        if file not in self._digests:
            self._digests[file] = sha256_of_file(file)
        return self._digests[file]

    def _find(self, file: str, wrong: str) -> None:
        self.findings.setdefault(file, wrong)

    def key(self, pem: Path, given: PublicKey | None) -> PublicKey | None:
        """The key to verify with; None, and a finding, if the one beside the signatures is missing or damaged. If a key is given, that one must equal it."""
        name = self.target.shown(pem)
        if not pem.is_file():
            if given is None:
                self._find(name, "is missing: without --key, it is the key to verify with")
            return given
        try:
            content = _content(pem)
            found = public_key(content, name)
        except SignatureError as error:
            self._find(name, str(error))
            return given
        except InputError:
            self._find(name, "is not a public key")
            return given
        if found.pem != content:
            self._find(name, "was changed: it is not written as `pedigree sign` writes it")
        elif given is not None and found.pem != given.pem:
            self._find(name, f"is another key than the one given (sha256 {given.fingerprint[:16]})")
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
            self._find(name, str(error))
            return
        self.signature = {"file": name, "files": len(signed.files)}
        self._compare_files(signed.files, signed.ignored, "signed")

    def check_attestations(self, file: Path, key: PublicKey) -> None:
        """Compare dvc.lock and the files of the lineage with the attestations; of a folder outside a project, the folder only."""
        name = self.target.shown(file)
        if not file.is_file():
            self.not_checked.append(NOT_ATTESTED)
            return
        try:
            stages = provenance.read(_content(file), key)
        except SignatureError as error:
            self._find(name, str(error))
            return
        self.stages = stages
        results = {stage.remade for stage in stages}
        remade = None if None in results else "identical" if results == {"identical"} else "elsewhere"
        files = len({path for stage in stages for path in (*stage.read, *stage.made)})
        self.attestations = {"file": name, "stages": [stage.address for stage in stages], "files": files, "remade": remade}
        if self.target.root is None:
            self._compare_folder(stages[-1])
            self.not_checked.append(NO_PROJECT)
        else:
            self._compare_project(name, self.target.root, stages)

    def _compare_folder(self, last: Attested) -> None:
        """Compare a copy of an output with the statement about its stage."""
        out = next((path for path in last.outs if not path.startswith((REPORTS, PLOTS))), "")
        made = {path[len(out) + 1 :]: digests["sha256"] for path, digests in last.made.items() if out and is_within(path, out)}
        beside = (*IGNORED, PAGE, FOLDER)
        self._compare_files(made, [name for name in beside if not any(is_within(path, name) for path in made)], "attested")

    def _compare_files(self, expected: Mapping[str, str], ignored: Iterable[str], done: str) -> None:
        """Compare the folder with the sha256 of its files."""
        found = model_signature.contents(self.target.folder, ignored)
        for path, wrong in model_signature.differences(expected, found, self._sha256, done).items():
            self._find(f"{self.target.path}/{path}", wrong)
        left_out = {*found.ignored} - {ATTESTATIONS, PUBLIC_KEY, SIGNATURE}
        self.left_out = left_out if self.left_out is None else self.left_out & left_out

    def check_papers(self) -> None:
        """Compare the documents in the folder with its files, with the attestations, and with each other."""
        if self.findings:
            self.not_checked.append("what the documents state: files are not what was signed")
            return
        found = model_signature.contents(self.target.folder, IGNORED).files
        model = {name: found[name] for name in papers.files_of_model(found)}
        digests = {name: self._sha256(file) for name, file in found.items()}
        stated: dict[str, Iterable[papers.Claim]] = {"the files": papers.document_claims(found, digests)}
        if model:
            stated["the files of the model"] = papers.of_files(model, digests)
        if self.stages:
            stated[ATTESTATIONS] = papers.of_attestations(self.stages)
        documents = {name: papers.read(name, self._document(found[name])) for name in papers.READERS if name in found}
        wrong, compared = papers.contradictions({**stated, **{name: claims for name, claims in documents.items() if claims}})
        for name, what in wrong.items():
            self._find(f"{self.target.path}/{name}" if name in found else self.target.shown(self.target.signatures / name), what)
        self.papers = {"documents": sum(claims is not None for claims in documents.values()), "values": compared}
        others = [name for name in found if name.startswith(f"{FOLDER}/") and name not in documents]
        if unread := [*others, *(name for name, claims in documents.items() if claims is None)]:
            self.not_checked.append(f"what {', '.join(unread)} state: not in a form that is compared")
        self.not_checked += NOT_IN_FILES
        if (self.attestations or {}).get("remade") is None:
            self.not_checked.append(NOT_REMADE)

    def _document(self, file: Path) -> bytes:
        return b"" if file.stat().st_size > papers.LARGEST else file.read_bytes()

    def _compare_project(self, name: str, root: Path, stages: Sequence[Attested]) -> None:
        """Compare the entries of dvc.lock, and every file that they refer to, with the statements."""
        lineage = Lineage(root, self.target.lock, self.target.lock_text, self.target.address)
        texts, addresses = lineage.texts(), lineage.addresses()
        if sorted(addresses) != sorted(stage.address for stage in stages) or stages[-1].address != self.target.address:
            different = sorted({*addresses} ^ {stage.address for stage in stages}) or [stages[-1].address]
            self._find(name, f"describes another lineage than dvc.lock: {', '.join(different)}")
        for stage in stages:
            if not stage.describes(texts.get(stage.address)):
                self._find(f"{LOCK}: {stage.address}", "is not what was attested")
        attested = {path: digests for stage in stages for path, digests in (*stage.read.items(), *stage.made.items())}
        now = lineage.present([path for stage in stages for path in stage.deps], [path for stage in stages for path in stage.outs])
        for path, digests in attested.items():
            if path not in now.regular:
                self._find(path, "is missing, and was attested")
            elif now.regular[path] and lineage.digests(path) != digests:
                self._find(path, "is not what was attested")
        self.left_out = set()
        compared = {*attested, *now.made, *now.listed} & now.regular.keys()
        for path in compared:
            if not now.regular[path]:
                self._find(path, "is neither a file nor a folder")
            elif path not in attested:
                self._find(path, "was added since it was attested")
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
    """The document of `verify_signatures` as text for the terminal."""
    key = f"key sha256 {document['key'][:16]}{'' if document['key_given'] else ', which came with them'}" if document["key"] else "no key"
    lines = [f"{document['model']}: {document['verdict']}  ({document['folder']}, {key})"]
    if signed := document["signature"]:
        lines.append(f"  signature     {signed['file']}: {signed['files']} files")
    if attested := document["attestations"]:
        remade = f"made again from the sources before it was signed: {attested['remade']}" if attested["remade"] else "not made again"
        lines.append(f"  attestations  {attested['file']}: {len(attested['stages'])} stages, {attested['files']} files; {remade}")
    if compared := document["papers"]:
        lines.append(
            f"  papers        {compared['documents']} documents; {compared['values']} values compared with files and other documents"
        )
    lines += [f"  {one['file']} {one['wrong']}" for one in document["findings"]]
    return "\n".join([*lines, *(f"  not verified: {what}" for what in document["not_checked"])])
