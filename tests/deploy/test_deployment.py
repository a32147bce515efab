"""The files in deploy/ that other programs read: rendered, checked against their schemas, and against each other."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.monitoring.metrics import run_metrics
from tests.deploy.status.runs import finished_run, report

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
COMPOSE = sorted((DEPLOY / "compose").glob("*.yaml"))
OVERLAYS = sorted(path.parent for path in (DEPLOY / "kubernetes").glob("*/kustomization.yaml"))
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # beside this Python, which need not be on the path
SCRIPTS = sorted((DEPLOY / "docker").glob("*.sh"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def name_of(path):
    return path.name


def environment(dockerfile):
    """The variables that an image sets."""
    text = dockerfile.read_text().replace("\\\n", " ")
    return dict(pair.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.M) for pair in line.split())


@pytest.mark.parametrize("file", DOCKERFILES, ids=name_of)
def test_dockerfiles_copy_what_is_there_and_run_as_nobody_in_particular(file):
    text = file.read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        assert all((ROOT / source).exists() for source in sources)
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.M)
    script = DEPLOY / "docker" / json.loads(entry)[-1]
    assert script.name in text.partition("COPY --chmod")[2] and script.stat().st_mode & 0o111
    assert re.search(r"^USER 10001$", text, re.M)
    extras = set(re.search(r'"\.\[(.*)\]"', text)[1].split(","))
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)
    # The version of torch is the tested one.
    assert f"torch=={re.search(r'torch==([0-9.]+)', text)[1]}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_a_build_gets_all_that_the_package_needs():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = re.search(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    assert {name.strip(' "*') for name in packages.split(",")} <= kept
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= kept


@pytest.mark.parametrize("file", COMPOSE, ids=name_of)
def test_compose_files_hang_together(file):
    content = yaml.safe_load(file.read_text())
    for name, service in content["services"].items():
        if file.name == "gpu.yaml":
            assert name in yaml.safe_load((DEPLOY / "compose/node.yaml").read_text())["services"]
            continue
        dockerfile = service["build"]["dockerfile"].replace("${FEDTUNE_NODE:-cpu}", "cpu")
        assert (file.parent / service["build"]["context"] / dockerfile).resolve() in DOCKERFILES
        named = {volume.partition(":")[0] for volume in service["volumes"] if re.match(r"[a-z]+:", volume)}
        assert named and named <= set(content["volumes"])
        assert set(service.get("secrets", [])) <= set(content.get("secrets", {}))
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        # No port but the nodes' is open to others.
        assert all(port == "9092:9092" or port.startswith("127.0.0.1:") for port in service.get("ports", []))


def resources(folder):
    """What a kustomization is made of, before its patches."""
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
        path = folder / name
        if path.is_dir():
            yield from resources(path)
        else:
            yield from yaml.safe_load_all(path.read_text())


def rendered(folder):
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def check_pod(resource):
    pod = resource["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    volumes = {one["name"] for one in pod["volumes"]}
    volumes |= {one["metadata"]["name"] for one in resource["spec"].get("volumeClaimTemplates", [])}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    dockerfile = DEPLOY / "docker" / (container["image"].removeprefix("fedtune-") + ".Dockerfile")
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert environment(dockerfile)["FEDTUNE_HOME"] in mounted
    selected = resource["spec"]["selector"]["matchLabels"]
    assert selected == resource["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("folder", OVERLAYS, ids=name_of)
def test_kubernetes_manifests_are_valid(folder):
    for resource in resources(folder):
        kubernetes_validate.validate(resource, "1.29", strict=True)
        if resource["kind"] in ("Deployment", "StatefulSet"):
            check_pod(resource)


def test_kubernetes_lets_in_and_out_only_what_is_said():
    policies = {one["metadata"]["name"]: one["spec"] for folder in OVERLAYS for one in resources(folder)
                if one["kind"] == "NetworkPolicy"}  # fmt: skip
    assert policies["fedtune-node"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policies["fedtune-node"]
    assert {port["port"] for rule in policies["fedtune-node"]["egress"] for port in rule["ports"]} == {53, 9092}
    open_to_all = [rule for rule in policies["fedtune-server"]["ingress"] if "from" not in rule]
    assert [rule["ports"] for rule in open_to_all] == [[{"port": "fleet"}]]


@pytest.mark.parametrize("folder", OVERLAYS, ids=name_of)
def test_kustomize_renders_what_is_valid(folder):
    found = rendered(folder)
    for resource in found:
        kubernetes_validate.validate(resource, "1.29", strict=True)
    if folder.name == "node-gpu":
        (deployment,) = [one for one in found if one["kind"] == "Deployment"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        check_pod(deployment)
        assert environment(DEPLOY / "docker/node-cuda.Dockerfile")["FEDTUNE_DEVICE"] == "cuda"


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_scripts_pass_shellcheck(file):
    done = subprocess.run([SHELLCHECK, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", UNITS, ids=name_of)
def test_systemd_finds_nothing_wrong(file, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    text = file.read_text()
    commands = re.findall(r"^ExecStart=(\S+)", text, re.M)
    assert commands == ["/opt/fedtune/bin/fedtune"]
    unit = tmp_path / file.name
    unit.write_text(text.replace(commands[0], "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path):
    exported = run_metrics([report(finished_run(tmp_path / "run"))]).decode()
    names = {sample.name for family in text_string_to_metric_families(exported) for sample in family.samples}
    # A gauge that has no value in a finished run.
    names |= {"fedtune_seconds_left"}
    dashboard = json.loads((DEPLOY / "monitoring/grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    expressions += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    asked = {name for expression in expressions for name in re.findall(r"\bfedtune_\w+", expression)}
    assert asked and asked <= names
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_a_built_package_holds_what_it_reads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["*"]
    for file in sorted((DEPLOY / "status").iterdir()):
        assert file.suffix in ("", ".py") or any(file.match(pattern) for pattern in patterns), file.name
