"""The real `pedigree ui` in headless Chromium. Screenshots are kept in screenshots/."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders.browser import CHROMIUM, needs_chromium
from builders.servers import free_port
from conftest import ROOT, edit_params, pedigree

from dagster_project.core.severity import shown
from dagster_project.orchestration.dagster import pages
from dagster_project.orchestration.dvc import read_stages

SHOTS = ROOT / "screenshots"

pytestmark = [
    pytest.mark.browser,
    needs_chromium,
]


@dataclass
class Ui:
    """A project, its running UI, and a page on it."""

    root: Path
    url: str
    page: Any
    server: subprocess.Popen[bytes]

    def see(self, path: str, *texts: str, shot: str) -> str:
        """Open a page, wait until it shows all texts, keep a screenshot, return everything it says."""
        self.page.goto(self.url + path)
        return self.wait(*texts, shot=shot)

    def wait(self, *texts: str, shot: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while True:
            said = self.page.inner_text("body")
            missing = [text for text in texts if text not in said]
            if not missing or time.monotonic() > end:
                SHOTS.mkdir(exist_ok=True)
                self.page.screenshot(path=SHOTS / f"{shot}.png")
                assert not missing, f"{self.page.url} does not show {missing}; it says:\n{said}"
                return said
            time.sleep(0.5)

    def ask(self, query: str) -> Any:
        """Data of the answer to a query of GraphQL."""
        request = urllib.request.Request(
            f"{self.url}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def last_run(self) -> dict[str, str]:
        results = self.ask("{ runsOrError(limit: 1) { ... on Runs { results { runId status } } } }")["runsOrError"][
            "results"
        ]
        return results[0] if results else {"runId": "", "status": ""}

    def materialize(self, asset: str) -> dict[str, str]:
        """Press the button on an asset's page and wait for the run to end."""
        before = self.last_run()["runId"]
        self.page.goto(f"{self.url}/assets/{asset}?view=overview")
        self.page.get_by_role("button", name="Materialize").first.click(timeout=60_000)
        end = time.monotonic() + 240
        while time.monotonic() < end:
            run = self.last_run()
            if run["runId"] != before and run["status"] in {"SUCCESS", "FAILURE", "CANCELED"}:
                return run
            time.sleep(1)
        raise AssertionError(f"no run of {asset} ended: {self.last_run()}")


@pytest.fixture(scope="module")
def ui(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    from playwright.sync_api import sync_playwright

    root = tmp_path_factory.mktemp("ui") / "project"
    shutil.copytree(_finished, root, symlinks=True)
    with socket.socket() as probe, socket.socket() as second:
        probe.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, pages_port = probe.getsockname()[1], second.getsockname()[1]
    env = {**os.environ, "DAGSTER_HOME": str(root / ".dagster")}
    log = (root / "ui.log").open("w")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dagster_project",
            "ui",
            "--project",
            str(root),
            "--port",
            str(port),
            "--pages-port",
            str(pages_port),
        ],
        cwd=root,
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
        # as a shell without job control does for `... &`
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/server_info", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (root / "ui.log").read_text()
                time.sleep(0.5)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(120_000)  # a busy machine needs more than half a minute for a page
            yield Ui(root, url, page, server)
            browser.close()
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def test_the_lineage_graph_has_named_groups_in_flow_order_and_readable_keys(ui: Ui) -> None:
    groups = ["1_inputs", "2_data", "3_training", "4_alignment", "5_evaluation", "6_release"]
    said = ui.see("/asset-groups", *groups, f"Materialize all ({len(read_stages(ui.root))})", shot="lineage")
    assert "\ndefinitions\n" not in said, "the sources of definitions are in no group of the default view"
    end = time.monotonic() + 60
    while True:  # the layout is computed after the names are shown
        boxes = [ui.page.get_by_text(group, exact=True).last.bounding_box() for group in groups]
        left = [box["x"] for box in boxes if box]
        if (len(left) == len(groups) and left == sorted(left)) or time.monotonic() > end:
            break
        time.sleep(1)
    assert left == sorted(left) and len(left) == len(groups), "the groups are in the order of the flow"
    said = ui.see("/assets", "adapter", "instructions", shot="catalog")
    assert "Command, parameters and code of" not in said


def test_a_second_ui_of_the_project_is_refused_with_the_address_of_the_first(ui: Ui) -> None:
    """Each has a daemon, and both daemons would launch the runs of a schedule."""
    before = pages.port_of(ui.root)
    ports = ["--port", str(free_port()), "--pages-port", str(free_port())]
    for chosen in (ports, ["--port", ui.url.rpartition(":")[2]]):  # the hint is not to choose another port
        done = pedigree(ui.root, "ui", *chosen)
        assert done.returncode == 2 and f"process {ui.server.pid}, {ui.url}\nhint: use that one" in done.stderr
    assert pages.port_of(ui.root) == before


ATTACK = """<!doctype html><title>starts</title><img id=i><iframe id=f name=f></iframe>
<form id=form method=post target=f action="URL/graphql?query=MUTATION"></form>
<script>
const wait = new Promise(done => { i.onload = i.onerror = done; });
i.src = "URL/graphql?query=MUTATION";
const socket = new Promise(done => {
  const s = new WebSocket("WS/graphql", "graphql-ws");
  s.onopen = () => done("open");
  s.onerror = () => done("refused");
});
(async () => {
  await wait;
  const posts = ["text/plain", "application/x-www-form-urlencoded"].map(type =>
    fetch("URL/graphql?query=MUTATION", {method: "POST", mode: "no-cors", headers: {"Content-Type": type}, body: "x"})
      .catch(() => 0));
  const body = JSON.stringify({query: "{ version }"});
  const json = fetch("URL/graphql", {method: "POST", headers: {"Content-Type": "application/json"}, body})
    .then(answer => answer.text(), () => "refused");
  await Promise.all(posts);
  const framed = new Promise(done => { document.getElementById("f").onload = done; });
  form.submit();
  await framed;
  document.title = "done: " + await socket + ", " + await json;
})();
</script>"""


def test_no_other_website_can_drive_the_ui(ui: Ui, tmp_path: Path) -> None:
    paused = "{ instance { autoMaterializePaused } }"
    before = ui.ask(paused)["instance"]["autoMaterializePaused"]
    mutation = f"mutation {{ setAutoMaterializePaused(paused: {str(not before).lower()}) }}"
    page = (
        ATTACK.replace("URL", ui.url)
        .replace("WS", ui.url.replace("http", "ws"))
        .replace("MUTATION", urllib.parse.quote(mutation))
    )
    (tmp_path / "attack.html").write_text(page)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as website:
        threading.Thread(target=website.serve_forever, daemon=True).start()
        other = ui.page.context.browser.new_page()
        other.goto(f"http://localhost:{website.server_port}/attack.html")
        other.wait_for_function("document.title.startsWith('done')")
        assert other.title() == "done: refused, refused"
        assert ui.ask(paused)["instance"]["autoMaterializePaused"] == before
        other.close()
        website.shutdown()
    request = urllib.request.Request(
        f"{ui.url}/server_info", headers={"Host": f"evil.example.org:{ui.url.rpartition(':')[2]}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)
    ui.ask(mutation)  # on its own page the same works, so the attack would have been seen
    assert ui.ask(paused)["instance"]["autoMaterializePaused"] != before
    ui.ask(f"mutation {{ setAutoMaterializePaused(paused: {str(before).lower()}) }}")


def test_an_assets_page_links_its_pages_by_url_and_they_open(ui: Ui) -> None:
    ui.see("/assets/instructions?view=overview", "report", "review", shot="links")
    link = ui.page.locator("a[href*='/instructions/report.html']").first.get_attribute("href")
    other = ui.page.context.browser.new_page()  # Dagster's page keeps asking its server
    try:
        other.goto(link, wait_until="domcontentloaded")
        rows = json.loads((ui.root / "data/reports/instructions.json").read_text())["rows_out"]
        assert other.locator("h1").inner_text() == "instructions" and f"{rows} read = {rows} kept" in other.inner_text(
            "main"
        )
        other.screenshot(path=SHOTS / "page-by-url.png")
        other.goto(f"{link.partition('/instructions')[0]}/instructions/", wait_until="domcontentloaded")
        listed = other.inner_text("body")
        assert "report.html" in listed and "review.csv" in listed
    finally:
        other.close()


def test_an_asset_page_shows_description_rows_version_and_commit(ui: Ui) -> None:
    state = read_stages(ui.root)["instructions"]
    report = json.loads((ui.root / "data/reports/instructions.json").read_text())
    said = ui.see(
        "/assets/instructions?view=overview",
        state.description,
        "rows_in",
        "rows_out",
        "git_commit",
        state.version,
        shot="asset",
    )
    assert {str(report["rows_in"]), str(report["rows_out"])} <= set(said.split())


def test_a_trained_asset_shows_its_loss_curve(ui: Ui) -> None:
    ui.see("/assets/adapter/lora?view=overview", "loss", "trainable_parameters", shot="adapter")
    ui.page.locator("tr", has_text="loss").get_by_text("Show Markdown").first.click()
    image = ui.page.locator("img[alt=loss]")
    image.wait_for(timeout=30_000)
    time.sleep(1)  # until the dialog has faded in
    ui.page.screenshot(path=SHOTS / "loss-curve.png")
    assert image.evaluate("picture => picture.naturalWidth") > 200


def test_the_checks_of_the_instruction_set_passed(ui: Ui) -> None:
    checks = json.loads((ui.root / "data/reports/instructions.json").read_text())["checks"]
    failed = [
        name
        for name, check in checks.items()
        if shown(check["severity"], check["passed"], check["count"]) in {"warn", "error"}
    ]
    said = ui.see(
        "/assets/instructions?view=checks",
        f"Checks ({len(checks) + 1})",
        *sorted([*checks, "dvc_in_sync"])[:12],
        shot="checks",
    )
    assert said.count("Succeeded") + len(failed) >= 12, "the list shows as many as the window has room for"
    assert "Not evaluated" not in said


@pytest.mark.long
def test_after_an_edit_the_right_assets_are_unsynced(ui: Ui) -> None:
    edit_params(ui.root, lambda v: v["adapter"]["lora"].update(max_steps=9))
    assert pedigree(ui.root, "sync").returncode == 0
    ui.see("/assets/adapter/lora?view=overview", "Unsynced", shot="unsynced")
    said = ui.see("/assets/tokenized?view=overview", "Latest materialization", shot="synced")
    assert "Unsynced" not in said


@pytest.mark.long
def test_the_progress_of_a_long_stage_streams_into_the_runs_log(ui: Ui) -> None:
    edit_params(ui.root, lambda v: v["adapter"]["lora"].update(max_steps=9))
    run = ui.materialize("adapter/lora")
    ui.see(f"/runs/{run['runId']}", "Success", shot="run")
    ui.page.get_by_placeholder("Filter").first.fill("training:")
    ui.wait("9/9 steps", shot="run-progress")
    assert run["status"] == "SUCCESS"


@pytest.mark.long
def test_a_spoiled_source_fails_its_check_with_the_rows_and_nothing_downstream_runs(ui: Ui) -> None:
    edit_params(ui.root, lambda v: v["instructions"].update(policy={"empty_response": "fail"}))
    path = ui.root / "data/sources/triage_alpaca.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**rows[0], "output": ""}, *rows[1:]]))
    before = (ui.root / "data/splits").stat().st_mtime_ns
    assert ui.materialize("raw_examples")["status"] == "SUCCESS"
    assert ui.materialize("instructions")["status"] == "FAILURE"
    ui.see(
        "/assets/instructions?view=checks&checkDetail=empty_response", "empty_response", "Failed", shot="failed-check"
    )
    ui.wait("triage_alpaca.json:0", shot="failed-rows")
    refused = ui.materialize("splits")
    assert refused["status"] == "FAILURE"
    ui.see(f"/runs/{refused['runId']}", "instructions must be brought up to date first", shot="refused")
    assert (ui.root / "data/splits").stat().st_mtime_ns == before


def test_a_ui_that_was_started_in_the_background_of_a_script_ends_at_sigterm(ui: Ui) -> None:
    """The last test of this module: it ends the server of all others."""
    assert ui.server.poll() is None
    ui.server.terminate()
    assert ui.server.wait(120) == 0
