"""deploy/: valid by the schemas of compose and Kubernetes, free of secrets, on
loopback; the commands of compose.yaml run as processes.

No container is built or started here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders.postgres import Postgres
from builders.servers import free_port, running
from conftest import ROOT, tool
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OUR_SERVICES = {name: service for name, service in SERVICES.items() if "build" in service}
SECRET_NAME = re.compile("PASSWORD|SECRET|TOKEN|ACCESS_KEY")
RAY_CLUSTER: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes/raycluster.yaml").read_text())
CHART_VALUES: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes/dagster-values.yaml").read_text())
KUBERNETES = "1.35"


def environment(service: dict[str, Any]) -> dict[str, str]:
    """Variables of a service. PyYAML merges a list of anchors as compose does."""
    return service.get("environment", {})


def with_defaults(text: str) -> str:
    """A text of compose.yaml with the default of each variable that has one."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


# --- compose


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_valid(name: str) -> None:
    compose = tool("compose_spec").PyCompose
    text = with_defaults((DEPLOY / name).read_text())  # as compose does: variables, then merged anchors
    merged = yaml.safe_dump(yaml.safe_load(re.sub(r"\$\{\w+:\?[^}]*\}", "1000", text)))
    compose.from_yaml(merged).validate()
    for mistake in ("services: {a: {imagge: b}}", "services: {a: {image: b, ports: 3}}"):
        with pytest.raises(ValueError, match=r"services\.a"):
            compose.from_yaml(mistake)


def test_ports_are_published_on_loopback_only() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"s3", "webserver", "ray-head"}
    assert all(str(port).startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_every_secret_comes_from_the_environment_and_has_no_default() -> None:
    required = dict(re.findall(r"\$\{(\w+):\?([^}]+)\}", (DEPLOY / "compose.yaml").read_text()))
    assert set(required.values()) == {"set it in deploy/.env"}
    example = dict(
        line.split("=", 1)
        for line in (DEPLOY / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(example) == set(required) and set(example.values()) == {""}
    for service in SERVICES.values():
        for name, value in environment(service).items():
            assert not SECRET_NAME.search(name) or re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
    assert subprocess.run(["git", "check-ignore", "-q", "deploy/.env"], cwd=ROOT, check=False).returncode == 0


def test_ray_requires_a_token_on_every_node_and_from_the_driver() -> None:
    for name in ("ray-head", "ray-worker", "code"):
        assert environment(SERVICES[name])["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" in environment(
            SERVICES[name]
        )
    assert not any(
        "RAY_AUTH_TOKEN" in environment(SERVICES[name]) for name in ("webserver", "daemon", "postgres", "s3")
    )


def test_images_of_others_have_a_fixed_version_and_mounted_files_exist() -> None:
    for service in SERVICES.values():
        if "build" not in service:
            assert re.fullmatch(r"[\w./-]+:\d[\w.]*", service["image"])
        for volume in service.get("volumes", []):
            source = with_defaults(volume).split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), source


def test_a_container_that_runs_code_of_the_project_mounts_it_and_only_the_code_location_writes_it() -> None:
    for name, service in SERVICES.items():
        mounts = {with_defaults(volume).partition(":")[2] for volume in service.get("volumes", [])}
        of_project = {mount for mount in mounts if mount.startswith("/project")}
        runs_code = any("dagster_project" in argument for argument in service.get("command", []))
        assert of_project == ({"/project" if name == "code" else "/project:ro"} if runs_code else set()), name


def test_dagsters_home_is_the_documented_one_in_every_process_of_dagster() -> None:
    for name in ("code", "webserver", "daemon"):
        assert "./dagster.yaml:/dagster/dagster.yaml:ro" in SERVICES[name]["volumes"]
        assert {"PEDIGREE_PG_HOST", "PEDIGREE_PG_PORT", "PEDIGREE_PG_PASSWORD"} <= set(environment(SERVICES[name]))
    read = set(re.findall(r"env: (\w+)", (DEPLOY / "workspace.yaml").read_text()))
    assert read == {"PEDIGREE_CODE_HOST", "PEDIGREE_CODE_PORT"}
    assert all(read <= set(environment(SERVICES[name])) for name in ("webserver", "daemon"))


# --- image


def test_the_image_has_what_the_project_needs() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*", "nothing else is sent to the builder: no data, no credentials"
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == set(
        re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)[0].split()
    ) | {"dagster_project"}
    project = _pyproject()
    python = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    assert python and SpecifierSet(project["requires-python"]).contains(python[1])
    extras = {name for group in re.findall(r"extras=([\w,]+)", text) for name in group.split(",")}
    assert extras == {"all", "gpu"} <= set(project["optional-dependencies"])


def test_the_image_has_the_package_for_a_project_without_code_of_its_own() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^.*pip uninstall.*$", text, re.MULTILINE) == [
        '    && if [ "$CODE" = clone ]; then pip uninstall --yes pedigree-llm; fi \\'
    ]
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    for service in OUR_SERVICES.values():
        passed = {name: with_defaults(value) for name, value in service["build"]["args"].items()}
        assert passed == {name: value for name, value in arguments.items() if name != "PYTHON"}
    (mount,) = [volume for volume in SERVICES["code"]["volumes"] if volume.endswith(":/project")]
    named = set(re.findall(r"\$\{(\w+)", mount + SERVICES["code"]["build"]["args"]["CODE"]))
    assert named == set(re.findall(r"^# (\w+)=", (DEPLOY / ".env.example").read_text(), re.MULTILINE))


def test_a_user_of_the_image_without_an_entry_in_passwd_has_a_name() -> None:
    """compose.yaml runs as the owner of the clone, whom /etc/passwd of the
    image lists only if the id is 1000. DVC asks for the name as below."""
    (line,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    variables = dict(word.split("=", 1) for word in line.replace("\\\n", " ").split())
    unlisted = "import getpass, os, pwd; os.getuid = lambda: 4_000_000_000; print(getpass.getuser())"
    done = subprocess.run([sys.executable, "-c", unlisted], env=variables, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("pedigree", 0), done.stderr


def test_git_in_the_image_reads_the_project_whoever_owns_its_folder(tmp_path: Path) -> None:
    """The root of a volume belongs to root, the image's user is another one, and git refuses that by default."""
    (words,) = re.findall(r"&& git (config --system .+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    variables = {
        "PATH": os.environ["PATH"],
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": str(tmp_path / "gitconfig"),
        "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1",
    }
    project = tmp_path / "project"
    subprocess.run(
        ["git", "init", "-q", str(project)], check=True, env={**variables, "GIT_TEST_ASSUME_DIFFERENT_OWNER": "0"}
    )

    def status() -> int:
        return subprocess.run(
            ["git", "status"], cwd=project, env=variables, capture_output=True, check=False
        ).returncode

    assert status() != 0
    subprocess.run(["git", *words.replace("/project", str(project)).split()], check=True, env=variables)
    assert status() == 0


def _pyproject() -> dict[str, Any]:
    import tomllib

    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


# --- Kubernetes


def pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod with the specification of a template, to validate it by the schema of Kubernetes."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}


def pods() -> Iterator[dict[str, Any]]:
    """Every pod of Ray, and of the code location."""
    spec = RAY_CLUSTER["spec"]
    yield pod(spec["headGroupSpec"]["template"])
    for group in spec["workerGroupSpecs"]:
        yield pod(group["template"])
    (code,) = CHART_VALUES["dagster-user-deployments"]["deployments"]
    container = {"name": "code", "image": "x", **{key: code[key] for key in ("env", "volumeMounts", "resources")}}
    container["envFrom"] = [{"secretRef": one} for one in code["envSecrets"]]
    keys = {
        "initContainers": code["initContainers"],
        "volumes": code["volumes"],
        "securityContext": code["podSecurityContext"],
    }
    yield pod({"spec": {"containers": [container], **keys}})


def test_manifests_are_valid_by_the_schema_of_kubernetes() -> None:
    validate = tool("kubernetes_validate").validate
    claim = yaml.safe_load((DEPLOY / "kubernetes/workspace.yaml").read_text())
    for manifest in (claim, *pods()):
        validate(manifest, KUBERNETES, strict=True)
    with pytest.raises(Exception, match="unexpected"):
        validate({**claim, "spec": {**claim["spec"], "storage": "1Gi"}}, KUBERNETES, strict=True)


def test_the_ray_cluster_has_only_keys_of_kuberay_and_the_version_of_the_driver() -> None:
    spec = RAY_CLUSTER["spec"]
    assert (RAY_CLUSTER["apiVersion"], RAY_CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(spec) == {"rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert spec["authOptions"] == {"mode": "token"}
    group_keys = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert all(set(group) == group_keys for group in spec["workerGroupSpecs"])
    assert set(spec["headGroupSpec"]) == {"rayStartParams", "template"}
    assert all(isinstance(value, str) for value in spec["headGroupSpec"]["rayStartParams"].values())
    ray = next(one for one in map(Requirement, _pyproject()["optional-dependencies"]["ray"]) if one.name == "ray")
    assert ray.specifier.contains(spec["rayVersion"]) and spec["rayVersion"] == version("ray")


def test_ray_start_has_every_option_of_compose_and_of_the_ray_cluster() -> None:
    """As Ray's own command line reads them. KubeRay makes an option of each parameter."""
    start = tool("ray.scripts.scripts").start
    spec = RAY_CLUSTER["spec"]
    given = [SERVICES[name]["command"][2:] for name in ("ray-head", "ray-worker")]
    assert [SERVICES[name]["command"][:2] for name in ("ray-head", "ray-worker")] == [["ray", "start"]] * 2
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        given.append([f"--{name}={value}" for name, value in group["rayStartParams"].items()])
    read = [start.make_context("start", list(options)).params for options in given]
    assert [one["head"] for one in read] == [True, False, *[False] * (len(read) - 2)] and all(
        one["block"] for one in read[:2]
    )
    assert [read[0]["num_cpus"], read[2]["num_cpus"]] == [0, 0], "no stage runs on a head"
    with pytest.raises(Exception, match="No such option"):
        start.make_context("start", ["--num-cpu=0"])


def test_the_parts_of_kubernetes_fit_together() -> None:
    (code,) = CHART_VALUES["dagster-user-deployments"]["deployments"]
    claim = yaml.safe_load((DEPLOY / "kubernetes/workspace.yaml").read_text())
    assert code["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    variables = {one["name"]: one for one in code["env"]}
    assert variables["RAY_ADDRESS"]["value"] == f"http://{RAY_CLUSTER['metadata']['name']}-head-svc:8265"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == RAY_CLUSTER["metadata"]["name"]
    assert CHART_VALUES["runLauncher"]["config"]["customRunLauncher"]["class"] == "DefaultRunLauncher"
    assert CHART_VALUES["postgresql"]["postgresqlScheme"] in (DEPLOY / "dagster.yaml").read_text()


def test_the_webserver_of_the_chart_listens_on_a_port_that_any_user_may_open() -> None:
    """The chart's port is 80, also in its probe, which its own values name again; the image's user is not root."""
    webserver = CHART_VALUES["dagsterWebserver"]
    port = webserver["service"]["port"]
    assert port >= 1024 and webserver["readinessProbe"]["httpGet"]["port"] == port
    forwarded = re.findall(
        r"port-forward service/dagster-dagster-webserver \d+:(\d+)", (ROOT / "docs/cluster.md").read_text()
    )
    assert forwarded == [str(port)]


def test_no_deployment_sends_telemetry() -> None:
    assert CHART_VALUES["telemetry"] == {"enabled": False}, "the chart's default is true"
    assert yaml.safe_load((DEPLOY / "dagster.yaml").read_text())["telemetry"] == {"enabled": False}
    image = (ROOT / "Dockerfile").read_text()
    assert all(name in image for name in ("DVC_NO_ANALYTICS=1", "RAY_USAGE_STATS_ENABLED=0"))


def test_no_manifest_has_a_secret() -> None:
    for path in (DEPLOY / "kubernetes").glob("*.yaml"):
        assert not re.search(
            r"(?i)(password|secret_access_key|token): *[\"']?[^\s\"'{]{6,}", path.read_text().replace("mode: token", "")
        )
        assert "kind: Secret" not in path.read_text()


# --- the commands


def command(name: str, ports: dict[str, int], folder: Path) -> list[str]:
    """The command of a service, with other ports, on loopback, and with the files that it mounts."""
    words = [str(Path(sys.executable).parent / SERVICES[name]["command"][0]), *SERVICES[name]["command"][1:]]
    changes = {"0.0.0.0": "127.0.0.1", "/etc/dagster/workspace.yaml": str(DEPLOY / "workspace.yaml")}
    return [str(ports[word]) if word in ports else changes.get(word, word) for word in words]


@pytest.mark.long
def test_the_processes_of_dagster_in_compose_work_together(project: Path, postgres: Postgres, tmp_path: Path) -> None:
    postgres.renew()
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text())
    ports = {port: free_port() for port in ("3000", "4000")}
    common = {"PATH": os.environ["PATH"], "DAGSTER_HOME": str(home), "PYTHONPATH": str(ROOT), **postgres.environment}
    url = f"http://127.0.0.1:{ports['3000']}"
    check_code = [str(Path(sys.executable).parent / "dagster"), *SERVICES["code"]["healthcheck"]["test"][2:]]
    check_code[check_code.index("4000")] = str(ports["4000"])

    def code_answers() -> bool:
        return subprocess.run(check_code, env=common, capture_output=True, check=False).returncode == 0

    def webserver_answers() -> bool:
        try:
            return bool(ask(url, "{ version }"))
        except OSError:
            return False

    with ExitStack() as stack:
        for name, answers, extra in (
            ("code", code_answers, {"PEDIGREE_PROJECT": str(project), "HF_HUB_OFFLINE": "1"}),
            (
                "webserver",
                webserver_answers,
                {"PEDIGREE_CODE_HOST": "127.0.0.1", "PEDIGREE_CODE_PORT": str(ports["4000"])},
            ),
            (
                "daemon",
                lambda: bool(postgres.query("SELECT 1 FROM daemon_heartbeats", "dagster")),
                {"PEDIGREE_CODE_HOST": "127.0.0.1", "PEDIGREE_CODE_PORT": str(ports["4000"])},
            ),
        ):
            stack.enter_context(
                running(command(name, ports, tmp_path), tmp_path / f"{name}.log", answers, environment=common | extra)
            )
        run = launch(url, "raw_examples", "raw_preferences")  # at once, each in a process
        assert ended(url, run) == "SUCCESS", (tmp_path / "code.log").read_text()
    assert all((project / "data" / name).is_dir() for name in ("raw_examples", "raw_preferences")), (
        "the code location has the clone"
    )
    limits = postgres.query('SELECT concurrency_key, "limit" FROM concurrency_limits', "dagster")
    assert ("gpu", 1) in limits and {name for name, _ in limits} == {"cpu", "gpu", "ray"}
    logs = "".join((tmp_path / f"{name}.log").read_text() for name in ("code", "webserver", "daemon"))
    assert postgres.password not in logs + postgres.dump()


def ask(url: str, query: str, **variables: Any) -> Any:
    body = json.dumps({"query": query, "variables": variables}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"}), timeout=60
    ) as answer:
        found = json.load(answer)
    assert "errors" not in found, found
    return found["data"]


LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""


def launch(url: str, *assets: str) -> str:
    """Launch a run of some assets in the code location; its id."""
    selector = {
        "repositoryLocationName": "pedigree",
        "repositoryName": "__repository__",
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": [asset]} for asset in assets],
    }
    found = ask(url, LAUNCH, params={"selector": selector, "mode": "default"})["launchRun"]
    assert found["__typename"] == "LaunchRunSuccess", found
    return str(found["run"]["runId"])


def ended(url: str, run: str) -> str:
    """The status in which a run ended."""
    for _ in range(600):
        status = ask(url, "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", id=run)["runOrError"][
            "status"
        ]
        if status in {"SUCCESS", "FAILURE", "CANCELED"}:
            return str(status)
        time.sleep(0.3)
    raise AssertionError(f"the run is still {status}")
