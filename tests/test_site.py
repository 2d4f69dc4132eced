"""The pages of docs/ as a site: built strictly, complete, and without a request to another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    not os.environ.get("CI") and not (find_spec("material") and find_spec("mmdr")), reason="pip install '.[docs]'"
)


def build(project: Path, site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run mkdocs on a copy of docs/ and of the files to which it links."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(site),
    ]  # with --quiet, warnings do not count
    given = {**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment}
    return subprocess.run(command, cwd=project, env=given, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    listed = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == {page for page in pages if not page.startswith("decisions/")}
    side = re.findall(r'href="?([\w/.-]+)\.html"?[^>]*class="?md-nav__link', (site / "support.html").read_text())
    assert {f"{page}.md" for page in side} == pages, "docs/site.py adds the decisions"
    assert {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")} - {"404.md"} == pages


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"@import|url\([\"']?(?:https?:)?//", styles)


def test_diagrams_are_drawn_and_none_is_left_to_a_script(site: Path) -> None:
    for source in (ROOT / "docs").rglob("*.md"):
        page = (site / source.relative_to(ROOT / "docs")).with_suffix(".html").read_text()
        assert page.count("<figure class=diagram>") + page.count(
            '<figure class="diagram">'
        ) == source.read_text().count("```mermaid\n")
        assert 'class="mermaid"' not in page


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "ppo.html").read_text()
    assert (
        "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL) and "<mo>&#x02211;" in page
    )  # the sum over l
    assert page.count("<math") == len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", (ROOT / "docs/ppo.md").read_text()))


def small_site(folder: Path, pages: dict[str, str]) -> Path:
    """A project whose docs/ has an empty front page and these pages."""
    (folder / "docs").mkdir(parents=True)
    for name in ("site.py", "site.css"):
        (folder / "docs" / name).write_text((ROOT / "docs" / name).read_text())
    nav = ", ".join(f"{name}.md" for name in ("index", *pages))
    (folder / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text().split("\nnav:")[0] + f"\nnav: [{nav}]\n")
    for name, text in {"index": "", **pages}.items():
        (folder / f"docs/{name}.md").write_text(f"# Page\n\n{text}\n")
    return folder


def test_links_to_code_lead_to_the_repository_or_are_text(site: Path, tmp_path: Path) -> None:
    assert "href=../dagster_project" not in (page := (site / "architecture.html").read_text())
    assert '"../' not in page and "<code>dagster_project/pipeline.py</code>" in page
    [link] = set(
        re.findall(r"\[[^\]]*\]\(\.\./dagster_project/pipeline\.py\)", (ROOT / "docs/architecture.md").read_text())
    )
    project = small_site(tmp_path / "project", {"page": link})
    (project / "dagster_project").mkdir()
    (project / "dagster_project/pipeline.py").touch()
    done = build(project, tmp_path / "site", REPOSITORY_URL="https://code.example.org/team/pedigree/")
    assert done.returncode == 0, done.stderr
    assert (
        "https://code.example.org/team/pedigree/blob/main/dagster_project/pipeline.py"
        in (tmp_path / "site/page.html").read_text()
    )


MISTAKES = {
    "page": "[a page](missing.md)",
    "section": "[a section](index.md#missing)",
    "file": "[a file](../missing.py)",
    "outside": "[a file](../../outside.py)",
    "diagram": "```mermaid\nsequenceDiagram\n  A->>B: one; two\n```",
}


def test_each_mistake_is_a_warning_and_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "outside.py").touch()
    done = build(small_site(tmp_path / "project", MISTAKES), tmp_path / "site")
    warned = {
        name
        for name in MISTAKES
        for line in done.stderr.splitlines()
        if line.startswith("WARNING") and f"{name}.md" in line
    }
    assert done.returncode == 1 and warned == set(MISTAKES) and "Traceback" not in done.stderr


def test_the_diagram_of_the_readme_is_valid() -> None:
    import mmdr

    (diagram,) = re.findall(r"```mermaid\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "<svg" in mmdr.render(diagram).svg()


def test_fonts_and_plugins_that_use_the_network_are_off() -> None:
    text = (ROOT / "mkdocs.yml").read_text().split("\nmarkdown_extensions:")[0]
    config = yaml.safe_load(text)
    assert config["theme"]["font"] is False and config["plugins"] == ["search"] and config["strict"] is True
