"""The folder that is handed over: complete, verified by a stranger who has nothing else, and any changed, added or
removed file, or contradiction, is named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders.files import flip, names
from builders.keys import write_keys
from conftest import run, tool
from ruamel.yaml import YAML

from dagster_project.__main__ import main
from dagster_project.commands.sign import attest, sign, stage_records
from dagster_project.commands.verify_signatures import as_text, verify_signatures
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.export.registry import find, formats
from dagster_project.lineage.export.responsible import processing
from dagster_project.lineage.export.summary import from_reports
from dagster_project.lineage.lineage import audit
from dagster_project.lineage.signing import provenance
from dagster_project.lineage.signing.claims import READERS, contradictions, read
from dagster_project.lineage.signing.keys import private_key
from dagster_project.lineage.signing.target import find as find_target

ISSUED = "2026-01-31"
SIGNED = ("model.sig", "model.intoto.jsonl", "model.pub")


def hand_over(root: Path, folder: Path, *more: str) -> int:
    return main(
        ["export", "release", "--all", str(folder), "--with-model", "--issued", ISSUED, "--project", str(root), *more]
    )


@pytest.fixture(scope="module")
def _folder(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("spdx_python_model")
    base = tmp_path_factory.mktemp("exports")
    private, _ = write_keys(base, "p256", "key")
    root = Path(shutil.copytree(_finished, base / "project", symlinks=True))
    assert hand_over(root, base / "handed", "--key", private) == 0
    return base


@pytest.fixture
def handed(_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that was handed over."""
    return Path(shutil.copytree(_folder / "handed", tmp_path / "handed"))


@pytest.fixture
def public(_folder: Path) -> str:
    return str(_folder / "key.pub")


def verified(folder: Path, key: str | None) -> tuple[str, dict[str, str]]:
    """Verdict, and file in the folder -> what is wrong with it."""
    document = verify_signatures(folder, str(folder), key)
    found = {one["file"]: one["wrong"] for one in document["findings"]}
    assert all(file in as_text(document) and wrong in as_text(document) for file, wrong in found.items())
    return document["verdict"], {file.removeprefix(f"{folder}/"): wrong for file, wrong in found.items()}


def test_the_folder_has_the_release_all_exports_and_signatures_and_the_project_is_as_it_was(
    _folder: Path, _finished: Path
) -> None:
    handed, root = _folder / "handed", _folder / "project"
    exports = {f"exports/{find(form).file}" for form in formats()}
    release = names(root / "data/release")
    assert names(handed) == {*release, *exports, "exports.html", *SIGNED} and len(exports) == 7
    assert all((handed / name).read_bytes() == (_finished / "data/release" / name).read_bytes() for name in release)
    recorded = YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"]["release"]["outs"][0]
    assert len(release) == recorded["nfiles"] and not (root / "data/signatures").exists()
    assert names(root / "data") == names(_finished / "data") and not [
        path for path in _folder.iterdir() if path.name.startswith(".")
    ]


def test_the_page_links_every_export_and_needs_nothing_else(_folder: Path) -> None:
    handed = _folder / "handed"
    page = (handed / "exports.html").read_text()
    assert "default-src 'none'; style-src 'sha256-" in page and "http" not in page.replace("http-equiv", "")
    assert str(_folder) not in page and "<script" not in page and 'id="missing"' not in page
    linked = set(re.findall(r'<a href="([^"#]+)"', page))
    models = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert linked == names(handed) - models - {"exports.html"}
    assert f"{len(models)} more files are the model itself" in page
    for name in linked:
        facts = page.split(f'<a href="{name}">')[1].split("</figure>")[0]
        assert "<dt>shows</dt>" in facts and "<dt>does not show</dt>" in facts, name
        if name.startswith("exports/"):
            assert hashlib.sha256((handed / name).read_bytes()).hexdigest() in facts
    assert hashlib.sha256((_folder / "key.pub").read_bytes()).hexdigest() in page


def test_a_stranger_with_the_package_and_the_folder_alone_verifies_it(
    handed: Path, public: str, tmp_path: Path
) -> None:
    code = (
        "import sys\nfor name in ('dvc', 'dagster', 'torch', 'transformers', 'pyarrow', 'spdx_python_model'):"
        " sys.modules[name] = None\nfrom dagster_project.__main__ import main\nsys.exit(main(['verify',"
        f" {str(handed)!r}, '--signatures', '--key', {public!r}, '--json']))"
    )
    (tmp_path / "elsewhere").mkdir()
    done = run([sys.executable, "-c", code], tmp_path / "elsewhere", PEDIGREE_PROJECT="")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["verdict"] == "verified" and not document["findings"], done.stderr
    assert (
        document["signature"]["files"] == len(names(handed) - {*SIGNED})
        and document["attestations"]["stages"][-1] == "release"
    )
    assert document["compared"]["documents"] == len(READERS) and document["compared"]["values"] > 100
    unchecked = " ".join(document["not_checked"])
    for said in (
        "only its project has",
        "the data is what its hashes name",
        "makes the model again",
        "one document alone",
    ):
        assert said in unchecked


def test_it_is_verified_in_the_place_of_the_release_in_a_clone_without_data(
    handed: Path, public: str, _folder: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        shutil.copyfile(_folder / "project" / name, clone / name)
    shutil.copytree(handed, clone / "data/release")
    for model in ("release", str(clone / "data/release")):
        document = verify_signatures(clone, model, public)
        assert document["verdict"] == "verified" and document["folder"] == "data/release" and document["compared"]
    lock = (clone / "dvc.lock").read_text()
    other = lock.replace(re.findall(r"path: data/release\n\s+hash: md5\n\s+md5: (\w+)", lock)[0], "0" * 32)
    (clone / "dvc.lock").write_text(other)
    document = verify_signatures(clone, "release", public)
    assert document["verdict"] == "altered" and {one["file"]: one["wrong"] for one in document["findings"]} == {
        "data/release": "is not what dvc.lock recorded for release",
        "dvc.lock: release": "is not what was attested",
    }
    (clone / "dvc.lock").write_text(lock)
    flip(clone / "data/release/exports/README.md")
    assert [one["file"] for one in verify_signatures(clone, "release", public)["findings"]] == [
        "data/release/exports/README.md"
    ]


def test_an_audit_in_the_project_finds_the_release_and_of_a_part_of_it_the_model_that_it_is_a_copy_of(
    _folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(_folder / "handed", tmp_path / "downloaded"))
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")  # as in a repository of the Hub
    assert audit(_folder / "project", str(folder))["model"]["stage"] == "release"
    for name in names(folder) - {"model.safetensors", "config.json"}:
        (folder / name).unlink()
    assert audit(_folder / "project", str(folder))["model"]["stage"] == "merged@lora"


def test_a_flipped_bit_in_any_file_or_a_removed_file_fails_and_names_it(handed: Path, public: str) -> None:
    assert verified(handed, public) == ("verified", {})
    for name in sorted(names(handed)):
        file = handed / name
        content = file.read_bytes()
        flip(file, 8 * (len(content) // 2))
        verdict, found = verified(handed, public)
        assert verdict == "altered" and list(found) == [name]
        file.unlink()
        verdict, found = verified(handed, public)
        if name == "model.pub":  # another one was given
            assert verdict == "verified"
        else:
            assert verdict == ("contradictory" if name == "model.intoto.jsonl" else "altered") and list(found) == [name]
        file.write_bytes(content)
    assert verified(handed, public) == ("verified", {})


def test_an_added_file_anywhere_fails_and_is_named(handed: Path, public: str) -> None:
    folders = sorted({str(Path(name).parent) for name in names(handed)})
    assert {".", "exports", "audit"} < set(folders)
    for added in [*(Path(folder, "new.json").as_posix() for folder in folders), "exports/sub/new", "new/README.md"]:
        (handed / added).parent.mkdir(exist_ok=True)
        (handed / added).write_text("{}")
        verdict, found = verified(handed, public)
        assert verdict == "altered" and list(found) == [added]
        (handed / added).unlink()


def test_a_removed_signature_is_named_and_exports_that_nothing_covers_are_not_verified(
    handed: Path, public: str
) -> None:
    (handed / "model.sig").unlink()
    for key in (public, None):
        verdict, found = verified(handed, key)
        assert verdict == "altered" and list(found) == ["model.sig"] and "states the key" in found["model.sig"]
    assert main(["verify", str(handed), "--signatures", "--key", public, "--project", str(handed)]) == 1
    flip(handed / "model.safetensors")
    assert verified(handed, public)[1].keys() == {"model.sig", "model.safetensors"}
    flip(handed / "model.safetensors")
    (handed / "exports/link").symlink_to("/etc/passwd")
    assert verified(handed, public)[1].keys() == {"model.sig", "exports/link"}
    (handed / "exports/link").unlink()
    for name in ("exports.html", "exports/model.spdx.json"):
        (handed / name).unlink()
    (handed / "exports/NEW.md").write_text("x")
    document = verify_signatures(handed, str(handed), public)
    assert document["verdict"] == "incomplete" and document["findings"] == []
    assert f"exports in {handed}, which the attestations do not cover" in document["not_checked"]
    assert main(["verify", str(handed), "--signatures", "--key", public, "--project", str(handed)]) == 1
    shutil.rmtree(handed / "exports")
    assert verified(handed, public) == ("verified", {}), "the attestations cover the release"


def test_a_folder_of_an_earlier_version_is_verified_and_what_its_exports_state_is_not_compared(
    handed: Path, public: str, _folder: Path
) -> None:
    (handed / "exports").rename(handed / "papers")
    (handed / "exports.html").rename(handed / "papers.html")
    sign(handed.parent, str(handed), str(_folder / "key.pem"))
    document = verify_signatures(handed, str(handed), public)
    assert document["verdict"] == "verified" and document["attestations"]
    [unread] = [one for one in document["not_checked"] if "not in a form that is compared" in one]
    assert "papers.html" in unread and "papers/bom.cdx.json" in unread
    for name in ("papers.html", "papers/README.md"):
        flip(handed / name)
        assert verified(handed, public)[0] == "altered" and list(verified(handed, public)[1]) == [name]
        flip(handed / name)
    (handed / "papers/new.md").write_text("x")
    assert list(verified(handed, public)[1]) == ["papers/new.md"]
    (handed / "model.sig").unlink()
    assert verified(handed, public) == ("incomplete", {}), "the attestations cover the release alone"


def test_a_signature_that_is_no_file_is_named(handed: Path, public: str, tmp_path: Path) -> None:
    for name in SIGNED:
        file = handed / name
        file.rename(tmp_path / name)
        for make in (file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to(tmp_path / name)):  # noqa: B023
            make()
            verdict, found = verified(handed, public)
            assert verdict == "altered" and list(found) == [name] and "not a file" in found[name]
            file.rmdir() if file.is_dir() else file.unlink()
        (tmp_path / name).rename(file)
    for name in SIGNED:
        (handed / name).unlink()
    assert verified(handed, public)[1].keys() == {"model.sig"}, "the page claims it"


def test_another_key_fails_and_is_named(handed: Path, public: str, tmp_path: Path) -> None:
    private, other = write_keys(tmp_path, "p256", "other")
    verdict, found = verified(handed, other)
    assert verdict == "altered" and set(found) == set(SIGNED)
    for name in SIGNED:
        (handed / name).unlink()
    sign(tmp_path, str(handed), private)
    verdict, found = verified(handed, None)
    assert (
        verdict == "contradictory"
        and set(found) == {"exports.html", "model.intoto.jsonl"}
        and "key sha256" in found["exports.html"]
    )
    assert set(verified(handed, public)[1]) == {"model.sig", "model.pub"}


def test_other_attestations_by_the_same_key_are_named(handed: Path, public: str, _folder: Path) -> None:
    private, project = str(_folder / "key.pem"), _folder / "project"
    target = find_target(project, "release")
    lines = provenance.lines([provenance.statement(record) for record in stage_records(target)], private_key(private))
    (handed / "model.intoto.jsonl").write_text(lines)
    verdict, found = verified(handed, public)
    assert (
        verdict == "contradictory"
        and list(found) == ["exports.html"]
        and "document model.intoto.jsonl" in found["exports.html"]
    )


# --- documents that contradict the files or each other


@pytest.fixture
def signed_again(handed: Path, _folder: Path) -> Iterator[Any]:
    """Changes files of the folder, signs it again with its key, and returns the
    verdict and what is found; then restores the files.

    The attestations stay, unless a file of the release changes, which they would name.
    """
    private, public = str(_folder / "key.pem"), str(_folder / "key.pub")

    def changed(**texts: str) -> tuple[str, dict[str, str]]:
        before = {name: (handed / name).read_bytes() for name in texts}
        for name, text in texts.items():
            (handed / name).write_text(text)
        if not all(name.startswith("exports") for name in texts):
            before["model.intoto.jsonl"] = (handed / "model.intoto.jsonl").read_bytes()
            (handed / "model.intoto.jsonl").unlink()
        sign(handed.parent, str(handed), private)
        verdict, found = verified(handed, public)
        if "model.intoto.jsonl" in before:
            assert found.pop("model.intoto.jsonl") == "is missing, and exports.html lists it"
        for name, content in before.items():
            (handed / name).write_bytes(content)
        return verdict, found

    assert changed() == ("verified", {})
    yield changed


def truth(root: Path) -> dict[str, str]:
    """Hash -> what it is of, from the files, the reports and dvc.lock of the project: what the exports are about."""
    stages = YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"]
    base = json.loads((root / "data/reports/base_model.json").read_text())["sha256"]
    read = json.loads((root / "data/release/audit/audit.json").read_text())
    found = {hashlib.sha256((root / path).read_bytes()).hexdigest(): path for path in read["sources"]}
    found |= {digest: f"{name} of the base model" for name, digest in base.items() if name.endswith(".safetensors")}
    for name in read["stages"]:
        report = (
            json.loads((root / f"data/reports/{name.replace('@', '/')}.json").read_text()) if name != "release" else {}
        )
        md5 = next(
            out["md5"] for out in stages[name]["outs"] if not out["path"].startswith(("data/reports", "data/plots"))
        )
        found |= {report.get("output_sha256", "none"): f"sha256 of {name}", md5.removesuffix(".dir"): f"md5 of {name}"}
    report = json.loads((root / "data/reports/release.json").read_text())
    return {key: what for key, what in {**found, report["output_sha256"]: "sha256 of release"}.items() if key != "none"}


STATED = {
    "audit/audit.json": 11,
    "README.md": 8,
    "exports/README.md": 9,
    "exports/bom.cdx.json": 16,
    "exports/croissant.json": 6,
    "exports/datasheet.md": 5,
    "exports/lineage.jsonl": 18,
    "exports/model.spdx.json": 13,
    "exports/training-content.md": 3,
}
"""Document -> number of these hashes that it states."""


@pytest.mark.parametrize("name", STATED)
def test_a_document_with_another_hash_than_the_files_or_other_documents_is_named(
    handed: Path, signed_again: Any, _folder: Path, name: str
) -> None:
    known, text = truth(_folder / "project"), (handed / name).read_text()
    stated = [digest for digest in known if digest in text]
    assert len(stated) >= STATED[name]
    for digest in stated:
        other = hashlib.sha256(digest.encode()).hexdigest()[: len(digest)]
        verdict, found = signed_again(**{name: text.replace(digest, other)})
        assert verdict == "contradictory" and all("contradicts" in wrong for wrong in found.values()), known[digest]
        assert any(
            other in wrong and digest in wrong for file, wrong in found.items() if name in (file, "audit/audit.json")
        ), known[digest]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("audit/audit.json", r'("rows_out": )\d+'),
        ("audit/audit.json", r'("train": )\d+'),
        ("README.md", r"(\| instructions \| )\d+"),
        ("exports/README.md", r"(\| splits \| \d+ \| )\d+"),
        ("exports/README.md", r"(\| data/sources/triage\\?_alpaca.json \| )\d+"),
        ("exports/bom.cdx.json", r'("name": "pedigree:rows",\s+"value": ")\d+'),
        ("exports/bom.cdx.json", r"(\d+ rows in, )\d+"),
        ("exports/croissant.json", r'("@id": "splits-train/count".*?"value": )\d+'),
        ("exports/croissant.json", r'("description": ")\d+(?= rows, layout)'),
        ("exports/datasheet.md", r"(\| splits \| train \| )\d+"),
        ("exports/lineage.jsonl", r'("rowCount": )\d+'),
        ("exports/model.spdx.json", r'("dataset_datasetSize": )\d+'),
        ("exports/training-content.md", r"(\| data/sources/triage\\?_alpaca.json \| )\d+"),
    ],
)
def test_a_document_that_counts_other_records_is_named(
    handed: Path, signed_again: Any, name: str, pattern: str
) -> None:
    text, changes = re.subn(f"(?s){pattern}", r"\g<1>31", (handed / name).read_text(), count=1)
    verdict, found = signed_again(**{name: text})
    assert changes == 1 and verdict == "contradictory" and set(found) - {"exports.html"}
    assert name in found or name == "audit/audit.json"
    assert any("31" in wrong for wrong in found.values())


def test_another_model_under_the_same_exports_is_found_by_their_hashes(handed: Path, signed_again: Any) -> None:
    verdict, found = signed_again(**{"config.json": (handed / "config.json").read_text() + " "})
    stating = {
        "release.json",
        "exports.html",
        "exports/README.md",
        "exports/bom.cdx.json",
        "exports/datasheet.md",
        "exports/lineage.jsonl",
        "exports/model.spdx.json",
        "exports/training-content.md",
    }
    assert verdict == "contradictory" and set(found) == stating


def test_a_document_in_another_form_is_not_compared_and_that_is_said(
    handed: Path, signed_again: Any, tmp_path: Path
) -> None:
    for text in ("{}", "not JSON", '{"@graph": 3}', '{"@graph": [], "@graph": []}'):
        verdict, found = signed_again(**{"exports/model.spdx.json": text})
        assert verdict == "contradictory" and set(found) == {"exports.html"}, "the page names the document by its hash"
    (handed / "exports.html").unlink()
    (handed / "exports/model.spdx.json").write_text("{}")
    (handed / "exports/more.txt").write_text("x")
    assert signed_again() == ("verified", {})
    document = verify_signatures(handed, str(handed), None)
    assert (
        "what exports/more.txt, exports/model.spdx.json state: not in a form that is compared"
        in document["not_checked"]
    )


def test_exports_are_those_that_the_page_lists(handed: Path, public: str, _folder: Path) -> None:
    (handed / "exports/croissant.json").unlink()
    (handed / "exports/more.txt").write_text("x")
    (handed / "audit/audit.json").rename(handed / "audit.json")
    (handed / "model.sig").unlink()
    sign(handed.parent, str(handed), str(_folder / "key.pem"))
    (handed / "model.intoto.jsonl").unlink()
    assert verified(handed, public) == (
        "contradictory",
        {
            **dict.fromkeys(
                ("exports/croissant.json", "audit/audit.json", "model.intoto.jsonl"),
                "is missing, and exports.html lists it",
            ),
            "exports/more.txt": "is not listed in exports.html",
            **{name: wrong for name, wrong in verified(handed, public)[1].items() if "the model has" in wrong},
        },
    )


SOURCE, ROW = "data/sources/triage_alpaca.json", r"\n\| data/sources/triage\\?_alpaca.json \|[^\n]*"


@pytest.mark.parametrize(
    ("name", "pattern", "told"),
    [
        ("exports/training-content.md", ROW, "the model has sources"),
        ("exports/datasheet.md", ROW, "the model has sources"),
        ("exports/README.md", ROW, "the model has sources"),
        ("exports/training-content.md", "Apache-2.0(?= \\| \\*missing)", f"source {SOURCE} has license"),
        ("exports/README.md", "Apache-2.0(?= \\| `)", f"source {SOURCE} has license"),
        (
            "exports/bom.cdx.json",
            '(?<=source:data/sources/replies_messages.jsonl").{1,250}?"id": "\\KApache-2.0',
            "has license",
        ),
        ("exports/croissant.json", '(?<="license": ")Apache-2.0', f"source {SOURCE} has license"),
        ("exports/model.spdx.json", '(?<="simplelicensing_licenseExpression": ")Apache-2.0', "has license"),
    ],
)
def test_a_document_without_a_source_or_with_another_license_is_named(
    handed: Path, signed_again: Any, name: str, pattern: str, told: str
) -> None:
    pattern, _, rest = pattern.rpartition("\\K")
    text, changes = re.subn(
        f"(?s)({pattern}){rest}",
        lambda match: match[1] + ("" if rest == ROW else "CC0-1.0"),
        (handed / name).read_text(),
        count=1,
    )
    page = (handed / "exports.html").read_text()
    digests = [hashlib.sha256(one.encode()).hexdigest() for one in ((handed / name).read_text(), text)]
    verdict, found = signed_again(**{name: text, "exports.html": page.replace(*digests)})
    assert changes == 1 and verdict == "contradictory" and told in found[name]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("exports/README.md", "- content: sha256", "- content: sha-256"),
        ("exports/training-content.md", "**Versioned model name(s):**", "**Model:**"),
        ("exports/datasheet.md", "Versions are named by content hash", "Versions are named by hash"),
    ],
)
def test_a_document_that_is_read_in_part_is_not_counted_as_compared(
    handed: Path, public: str, _folder: Path, name: str, before: str, after: str
) -> None:
    text, page = (handed / name).read_text(), (handed / "exports.html").read_text()
    changed = text.replace(before, after)
    (handed / name).write_text(changed)
    (handed / "exports.html").write_text(
        page.replace(*(hashlib.sha256(one.encode()).hexdigest() for one in (text, changed)))
    )
    sign(handed.parent, str(handed), str(_folder / "key.pem"))
    document = verify_signatures(handed, str(handed), public)
    assert (
        changed != text and document["verdict"] == "verified" and document["compared"]["documents"] == len(READERS) - 1
    )
    assert f"all that {name} state: only a part is in a form that is compared" in document["not_checked"]
    row = re.sub(r"(\| `?)[0-9a-f]{64}", r"\g<1>0000", text)
    assert read(name, row.encode()) is None, "a row in another form"


def test_files_that_are_not_of_the_model_are_named_and_contradict_nothing(
    handed: Path, _folder: Path, tmp_path: Path
) -> None:
    private, public = str(_folder / "key.pem"), str(_folder / "key.pub")
    (handed / "model.intoto.jsonl").unlink()
    (handed / "NOTICE.txt").write_text("x")
    (handed / "exports.html").write_text('<a href="https://example.org">exports of somebody else</a>')
    sign(tmp_path, str(handed), private)
    document = verify_signatures(handed, str(handed), public)
    assert (
        document["verdict"] == "verified"
        and "NOTICE.txt: not an export, and not listed as part of the model" in document["not_checked"]
    )
    assert "what exports.html state: not in a form that is compared" in document["not_checked"]
    folder = tmp_path / "exports"
    assert (
        main(["export", "release", "--all", str(folder), "--issued", ISSUED, "--project", str(_folder / "project")])
        == 0
    )
    assert main(["verify", str(folder), "--signatures", "--project", str(folder)]) == 2, "never signed"
    (folder / "index.html").write_text("x")
    sign(tmp_path, str(folder), private)
    document = verify_signatures(folder, str(folder), public)
    assert (
        document["verdict"] == "verified"
        and "index.html: not an export, and not listed as part of the model" in document["not_checked"]
    )


def test_names_with_line_breaks_do_not_look_like_lines_of_the_answer(handed: Path, public: str) -> None:
    (handed / "a\nverified").write_text("x")
    text = as_text(verify_signatures(handed, str(handed), public))
    assert "a\\nverified was added" in text and not any(line.startswith("verified") for line in text.split("\n"))


def test_names_of_sources_are_read_as_they_were_written() -> None:
    name, digest = "data/sources/a | b [c](d) *e* `f` \\g.jsonl", "0" * 64
    summary = {
        "model": {"stage": "splits", "md5": "1" * 32 + ".dir"},
        "sources": {name: {"rows": 7, "format": "messages", "sha256": digest, "license": "MIT"}},
        "stages": {},
        "checks": {},
        "parameters": {},
        "training": {},
        "records": None,
        "code": {"commit": None},
        "metrics": {},
        "base_model": {},
        "provider": {},
        "outcomes": {},
        "licenses": {"listed": [], "problems": []},
        "data_sets": {
            "splits": {
                "path": "data/splits",
                "md5": "2" * 32 + ".dir",
                "tables": {"train": {"rows": 5, "columns": {}}},
                "profile": {},
            }
        },
    }
    for form in ("eu-summary", "datasheet"):
        chosen = find(form)
        claims = read(f"exports/{chosen.file}", chosen.write(summary, date(2026, 1, 31)).encode())
        assert claims is not None and {(f"source {name}", "rows", "7"), (f"source {name}", "sha256", digest)} <= set(
            claims
        )
        assert ("the model", "md5", "1" * 32) in claims
    assert ("table splits-train", "rows", "5") in claims and ("stage splits", "md5", "2" * 32) in claims


def test_names_with_characters_that_are_not_seen_contradict_nothing() -> None:
    """A zero-width space, as between Khmer or Thai words: Markdown has it written out."""
    name, digest = "data/sources/\u0e04\u0e33\u200b\u0e16\u0e32\u0e21.jsonl", "0" * 64
    facts = {"rows": 7, "format": "messages", "sha256": digest, "license": "MIT"}
    summary = {**from_reports("merged@lora", {"raw_examples": {"sources": {name: facts}}})}
    texts = {"audit/audit.json": json.dumps(summary), "README.md": model_card(summary)}
    assert texts["README.md"].count("u200b") and contradictions(
        {name: read(name, text.encode()) or () for name, text in texts.items()}
    ) == ({}, 4)


def test_copies_that_were_added_to_train_are_counted_and_contradict_nothing() -> None:
    splits = {
        "rows_in": 7,
        "rows_out": 7,
        "dropped": {},
        "train": 4,
        "validation": 1,
        "test": 2,
        "augmented": {"paraphrase": 3, "typos": 2},
    }
    summary = from_reports("merged@lora", {"splits": splits})
    claims = read("audit/audit.json", json.dumps(summary).encode())
    assert claims is not None and {
        f"table splits-{name}": rows for name, rows in (("train", "9"), ("validation", "1"), ("test", "2"))
    } == {subject: value for subject, key, value in claims if subject.startswith("table ")}
    assert (
        "Train 4, validation 1 and test 2 examples, and 5 copies of train examples with other prompts (paraphrase 3,"
        " typos 2);" in model_card(summary)
    )
    assert "copies added to train: paraphrase 3, typos 2" in processing({**summary, "checks": {}})[0]


# --- other tools, and what is missing


def test_model_signing_verifies_the_folder_and_we_verify_it_signed_by_model_signing(
    handed: Path, public: str, _folder: Path
) -> None:
    tool("OpenSSL")
    tool("model_signing")

    def oracle(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, "-m", "model_signing", *arguments], handed.parent)

    signature = str(handed / "model.sig")
    verify = ("verify", "key", str(handed), "--signature", signature, "--public_key", public)
    assert oracle(*verify).returncode == 0
    flip(handed / "exports/croissant.json")
    assert oracle(*verify).returncode != 0 and list(verified(handed, public)[1]) == ["exports/croissant.json"]
    flip(handed / "exports/croissant.json")
    (handed / "model.sig").unlink()
    done = oracle(
        "sign",
        "key",
        str(handed),
        "--signature",
        signature,
        "--private_key",
        str(_folder / "key.pem"),
        "--ignore-paths",
        signature,
    )
    assert done.returncode == 0, done.stderr
    assert verified(handed, public) == ("verified", {})
    flip(handed / "exports.html")
    assert list(verified(handed, public)[1]) == ["exports.html"]


def test_what_is_missing_is_on_the_page_and_names_its_next_step(
    _folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PEDIGREE_SIGNING_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "spdx_python_model", None)
    folder = tmp_path / "handed"
    assert hand_over(_folder / "project", folder, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in document["missing"]] == ["spdx", "signature, attestations"] and document[
        "signature"
    ] is None
    page = (folder / "exports.html").read_text()
    missing = page.split('<section id="missing"')[1].split("</section>")[0]
    assert "requires spdx_python_model" in missing and "pedigree-llm[trust]" in missing and "--key" in missing
    assert "not signed when this page was written" in page and not {*SIGNED, "exports/model.spdx.json"} & names(folder)
    assert main(["verify", str(folder), "--signatures", "--project", str(folder)]) == 2
    assert "has no signatures" in capsys.readouterr().err
    sign(tmp_path, str(folder), str(_folder / "key.pem"))
    assert verified(folder, str(_folder / "key.pub")) == ("verified", {})


def test_attestations_of_the_project_are_taken_if_they_still_hold(
    finished: Path, _folder: Path, tmp_path: Path
) -> None:
    private, public = str(_folder / "key.pem"), str(_folder / "key.pub")
    attest(finished, "release", private)
    file = finished / "data/signatures/release/model.intoto.jsonl"
    first, second = tmp_path / "first", tmp_path / "second"
    assert hand_over(finished, first, "--key", private) == 0
    assert (first / "model.intoto.jsonl").read_bytes() == file.read_bytes(), "P-256 signatures differ each time"
    flip(file)
    assert hand_over(finished, second, "--key", private) == 0
    assert (second / "model.intoto.jsonl").read_bytes() != file.read_bytes() and verified(second, public) == (
        "verified",
        {},
    )


def test_bad_input_is_one_message_and_leaves_nothing(
    finished: Path, _folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = finished.parent
    (base / "empty").mkdir()
    monkeypatch.chdir(base / "empty")
    (base / "full").mkdir()
    (base / "full/a").write_text("x")
    new, with_model, key = str(base / "new"), "--with-model", ("--key", str(_folder / "key.pem"))
    given = [
        (("adapter@lora", "--all", new, with_model), "copies a release only"),
        (("release", "--all", str(base / "full"), with_model), "not an empty folder"),
        (
            ("release", "--all", str(finished / "data/release/new"), with_model),
            "lies in data/release, an output of release",
        ),
        (("release", "--all", str(finished / "data/release/new")), "lies in data/release"),
        (("release", "--all", str(finished / "data"), with_model), "it contains data/"),
        (("release", "--all", str(finished / "data/sources/pub")), "lies in data/sources, which raw_examples reads"),
        (("release", "--all", str(finished / ".git/pub")), "lies in .git"),
        (("release", "--all", str(finished / ".dvc/cache/pub"), with_model), "lies in .dvc"),
        (("release", "--all", str(finished / "data/signatures/release"), with_model), "lies in data/signatures"),
        (("release", "--all", ".", with_model), "it is the current folder"),
        (("release", "--all", new, with_model, "--key", str(base / "none")), "No such file"),
        (("release", "--all", new, with_model, "--rev", "HEAD"), "--rev cannot be combined with --with-model"),
        (("release", "--all", new, *key), "--key requires --with-model"),
        (("release", "--format", "spdx", with_model), "require --all"),
    ]
    before = names(base)
    for arguments, wrong in given:
        assert main(["export", *arguments, "--issued", ISSUED, "--project", str(finished)]) == 2
        error = capsys.readouterr().err
        assert wrong in error and "Traceback" not in error, arguments
    assert names(base) == before
    for name in ("data/release/config.json", "data/splits/test/records-00000.parquet"):
        content = (finished / name).read_bytes()
        (finished / name).unlink()
        (finished / name).write_bytes(content + b" ")
        assert hand_over(finished, base / "new", *key) == 2
        error = capsys.readouterr().err
        assert name.split("/records")[0].removesuffix("/test") in error and "Traceback" not in error
        (finished / name).write_bytes(content)
    assert {name for name in names(base) if name.startswith(("new", ".new"))} == set()
    (finished / "data/release/config.json").unlink()
    (finished / "data/release/config.json").symlink_to(_folder / "project/data/release/config.json")
    assert hand_over(finished, base / "new", *key) == 2 and "dvc checkout --relink" in capsys.readouterr().err


def test_exports_that_are_now_missing_are_deleted_and_a_path_makes_no_other_folders(
    _folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "export",
        "release",
        "--all",
        str(tmp_path / "new/../exports"),
        "--issued",
        ISSUED,
        "--project",
        str(_folder / "project"),
    ]
    assert main(arguments) == 0 and len(names(tmp_path / "exports")) == 8
    monkeypatch.setitem(sys.modules, "spdx_python_model", None)
    (tmp_path / "exports/exports/own.txt").write_text("x")
    assert main(arguments) == 0 and "exports/own.txt" in names(tmp_path / "exports")
    assert "exports/model.spdx.json" not in names(tmp_path / "exports")
    assert hand_over(_folder / "project", tmp_path / "other/../handed") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exports", "handed"]
