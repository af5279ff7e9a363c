"""The project's image in the real engines, built once for all the tests of a run that need it.

Where an engine is not at hand the test is skipped, with the reason.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINES = ROOT.parent / "shared" / "engines"


def docker_image(kind: str = "light") -> str:
    """The image of this checkout: ``FLAME_TEST_IMAGE``, or built here, unless it is there already.

    :param kind: ``light`` is without machine-learning libraries, ``torch`` has PyTorch and MLflow.
    """
    if kind == "light" and (image := os.environ.get("FLAME_TEST_IMAGE")):
        return image
    if not shutil.which("docker") or _run("docker", "info", check=False).returncode:
        pytest.skip("no Docker engine to build the image with, and FLAME_TEST_IMAGE is not set")
    return _run(str(ROOT / ".ci" / "image"), kind).stdout.split()[-1]


def has_image(name: str) -> bool:
    """Whether the Docker engine has an image, without pulling it."""
    return _run("docker", "image", "inspect", name, check=False).returncode == 0


def kubernetes_image() -> str:
    """The same, known to the cluster of :func:`kubeconfig`."""
    image = docker_image()
    load = ENGINES / "kubernetes-load"
    if load.exists():
        with _one_at_a_time("load"):
            known = _run("kubectl", "get", "nodes", "-o", "jsonpath={.items[*].status.images[*].names[*]}", check=False)
            marker = Path(tempfile.gettempdir()) / f"flame-loaded-{image.replace('/', '_')}"
            if image not in known.stdout and not marker.exists():
                _run(str(load), image)
                marker.touch()
    return image


def kubeconfig() -> str:
    """The cluster for the tests: ``FLAME_TEST_KUBECONFIG``, else ``KUBECONFIG``, else that of the engines where it is up."""
    home = Path(os.environ.get("ENGINES_HOME") or Path.home() / ".cache" / "flame-engines")
    for path in (os.environ.get("FLAME_TEST_KUBECONFIG"), os.environ.get("KUBECONFIG"), home / "kubernetes/kubeconfig"):
        if path and Path(path).exists():
            reached = _run("kubectl", "--kubeconfig", str(path), "get", "--raw", "/readyz", check=False)
            if reached.returncode == 0:
                os.environ["KUBECONFIG"] = str(path)
                return str(path)
    pytest.skip("no Kubernetes: KUBECONFIG is not set, or its cluster does not answer")


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """Run kubectl; gives what it prints."""
    return _run("kubectl", *arguments, stdin=stdin, check=check).stdout


def _run(
    *command: str, environment: dict[str, str] | None = None, stdin: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    if not shutil.which(command[0]):
        return subprocess.CompletedProcess(command, 127, "", "")
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, input=stdin, capture_output=True, text=True, timeout=900
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stderr[-2000:] or done.stdout[-2000:]}")
    return done


@contextmanager
def _one_at_a_time(what: str) -> Iterator[None]:
    """Processes of a parallel run share one image."""
    with open(Path(tempfile.gettempdir()) / f"flame-tests-{what}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
