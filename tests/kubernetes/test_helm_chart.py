"""The Helm chart, installed for real: the server as a pod, its workers as pods beside it, and no right that it does not need."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from engines import ROOT, kubectl
from jobkit import SHARE, Flame
from waiting import blocked_until

CHART = ROOT / "deploy" / "helm" / "flame"

if not shutil.which("helm"):
    pytest.skip("no helm program on this machine", allow_module_level=True)


def helm(*arguments: str) -> str:
    done = subprocess.run(["helm", *arguments], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(*settings: str) -> list[dict[str, Any]]:
    texts = helm("template", "trial", str(CHART), *(part for one in settings for part in ("--set", one)))
    return [document for document in yaml.safe_load_all(texts) if document]


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(document for document in documents if document["kind"] == kind)


def test_the_chart_is_sound_whatever_is_chosen() -> None:
    helm("lint", "--strict", str(CHART))
    secrets = ["db.existingSecret=db", "tls.existingSecret=tls", "tls.caKey=ca.crt", "auth.existingSecret=auth"]
    bucket = ["artifacts.url=s3://bucket/place", "artifacts.existingSecret=aws", "persistence.enabled=false"]
    (container,) = of_kind(rendered(*secrets, *bucket), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert "--artifacts=s3://bucket/place" in container["args"]
    assert "--tls-ca=/etc/flame/tls/ca.crt" in container["args"]
    assert "--insecure-plain-http" not in container["args"]
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    references = {
        one["name"]: one["valueFrom"]["secretKeyRef"]["name"] for one in container["env"] if "valueFrom" in one
    }
    assert references == {"FLAME_TOKEN": "auth", "FLAME_SERVE_DB": "db"}


def test_what_is_said_of_workers_reaches_the_compute() -> None:
    settings = ["workers.slots=7", "workers.config.nodeSelector.pool=a", "imagePullSecrets[0].name=registry"]
    secret = next(one for one in rendered(*settings) if one["metadata"]["name"].endswith("-computes"))
    (compute,) = json.loads(secret["stringData"]["computes.json"])
    assert (compute["name"], compute["kind"], compute["slots"]) == ("cluster", "kubernetes", 7)
    assert compute["config"]["nodeSelector"] == {"pool": "a"}
    assert compute["config"]["imagePullSecrets"] == ["registry"]
    assert compute["config"]["podTemplate"]["spec"]["securityContext"]["runAsNonRoot"] is True


class Release:
    """The chart, installed, and a way to it from outside."""

    def __init__(self, folder: Path, namespace: str, image: str) -> None:
        self.name = "flame"
        self.folder = folder
        self.namespace = namespace
        self.volume = f"{namespace}-data"
        self.image = image
        self.forward: subprocess.Popen[str] | None = None

    def make_volume(self) -> None:
        """A volume of this host, as this cluster makes none itself."""
        data = self.folder / "data"
        data.mkdir()
        data.chmod(0o777)
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            folder.chmod(0o755)
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": self.volume},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": self.volume,
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(data)},
            },
        }
        kubectl("apply", "-f", "-", stdin=json.dumps(volume))

    def install(self, *settings: str) -> None:
        repository, _, tag = self.image.rpartition(":")
        chosen = [f"image.repository={repository}", f"image.tag={tag}", "persistence.size=1Gi", *settings]
        chosen.append(f"workers.config.resources.requests.cpu={SHARE['requests']['cpu']}")
        chosen.append(f"persistence.storageClassName={self.volume}")
        sets = [part for one in chosen for part in ("--set", one)]
        helm("upgrade", "--install", self.name, str(CHART), "-n", self.namespace, "--wait", "--timeout", "90s", *sets)

    def flame(self) -> Flame:
        """The command, which reaches the server as a user does: by a forwarded port."""
        self.close()
        self.forward = subprocess.Popen(
            ["kubectl", "port-forward", "-n", self.namespace, f"service/{self.name}", ":10100"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.forward.stdout
        port = re.search(r"127\.0\.0\.1:(\d+)", self.forward.stdout.readline())
        assert port
        secret = kubectl("get", "secret", "-n", self.namespace, self.name, "-o", "jsonpath={.data.token}")
        return Flame(self.folder, f"http://127.0.0.1:{port[1]}", base64.b64decode(secret).decode())

    def server_pod(self) -> str:
        """The pod of the server that is ready."""
        labels = "app.kubernetes.io/name=flame"
        kubectl("rollout", "status", "-n", self.namespace, f"deployment/{self.name}", "--timeout=90s")
        return kubectl("get", "pods", "-n", self.namespace, "-l", labels, "-o", "name").strip()

    def close(self) -> None:
        if self.forward is not None:
            self.forward.terminate()
            self.forward.communicate()
            self.forward = None


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, namespace: str, image: str) -> Iterator[Release]:
    release = Release(tmp_path_factory.mktemp("release"), namespace, image)
    release.make_volume()
    release.install("extraArgs[0]=--lease=60")  # the machine of the tests may be busy, and its pods slow to come back
    yield release
    release.close()
    helm("uninstall", release.name, "-n", namespace)
    kubectl("delete", "pods", "-n", namespace, "--all", "--force", "--grace-period=0", check=False)
    kubectl("delete", "pvc", "-n", namespace, "--all", "--wait=false")
    kubectl("delete", "pv", release.volume, "--wait=false")


def test_a_job_completes_in_the_cluster(release: Release) -> None:
    flame = release.flame()
    assert [compute["name"] for compute in flame("compute", "list")] == ["cluster"]
    job = flame.submit("noop", hyperparameters={"rounds": 3})
    done = flame.ended(job)
    assert done["state"] == "completed", done
    assert len(done["rounds"]) == 3


def test_it_goes_on_when_the_servers_pod_is_killed(release: Release) -> None:
    flame = release.flame()
    job = flame.submit("lasting", hyperparameters={"rounds": 40, "pause": 0.3})
    blocked_until(lambda: len(flame.job(job)["rounds"]) >= 2)
    workers = kubectl("get", "pods", "-n", release.namespace, "-l", f"flame-job={job}", "-o", "json")
    addresses = {pod["status"]["podIP"] for pod in json.loads(workers)["items"]}
    assert len(addresses) == 3  # each has its own
    before = {task["id"]: (task["worker"], task["attempt"]) for task in flame.tasks(job)}
    old = release.server_pod()
    kubectl("delete", "-n", release.namespace, old, "--force", "--grace-period=0")
    blocked_until(lambda: release.server_pod() not in ("", old))
    again = release.flame()
    done = again.ended(job)
    assert done["state"] == "completed", done
    assert [one["round"] for one in done["rounds"]] == list(range(1, 41))
    assert {task["id"]: (task["worker"], task["attempt"]) for task in again.tasks(job)} == before


def test_the_server_may_do_what_it_needs_and_nothing_else(release: Release) -> None:
    def rights(account: str) -> set[str]:
        who = f"--as=system:serviceaccount:{release.namespace}:{account}"
        lines = kubectl("auth", "can-i", "--list", who, "-n", release.namespace, "--no-headers").splitlines()
        return {" ".join(line.split()) for line in lines}

    extra = rights(release.name) - rights("default")
    assert extra == {
        "pods [] [] [create get list watch delete]",
        "pods/log [] [] [get]",
        "secrets [] [] [create]",
    }
    who = f"--as=system:serviceaccount:{release.namespace}:{release.name}"
    for verb, what, where in [
        ("get", "secrets", release.namespace),
        ("list", "secrets", release.namespace),
        ("create", "pods", "default"),
        ("get", "pods", "kube-system"),
        ("list", "nodes", release.namespace),
        ("create", "pods --subresource=exec", release.namespace),
        ("escalate", "roles", release.namespace),
    ]:
        answer = kubectl("auth", "can-i", verb, *what.split(), who, "-n", where, check=False).strip()
        assert answer == "no", (verb, what, where)


def test_the_server_runs_without_rights_and_its_workers_without_a_token(release: Release) -> None:
    flame = release.flame()
    job = flame.submit("seen", hyperparameters={"rounds": 1000, "pause": 0.2})
    blocked_until(lambda: flame.job(job)["rounds"])
    pods = json.loads(kubectl("get", "pods", "-n", release.namespace, "-o", "json"))["items"]
    server = next(pod for pod in pods if pod["metadata"]["labels"]["app.kubernetes.io/name"] == "flame")
    inside = ("exec", "-n", release.namespace, server["metadata"]["name"], "--")
    assert kubectl(*inside, "id", "-u").strip() == "1000"
    assert "Read-only" in kubectl(*inside, "sh", "-c", "touch /opt/flame/x 2>&1; true")
    workers = [pod for pod in pods if pod["metadata"]["labels"].get("flame-job") == job]
    assert len(workers) == 3
    for pod in workers:
        text = json.dumps(pod)
        assert "serviceaccount" not in text.replace("serviceAccount", "")
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    flame("job", "stop", job)
    assert flame.ended(job)["state"] == "terminated"
