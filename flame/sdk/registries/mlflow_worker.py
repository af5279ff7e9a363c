"""The process that talks to MLflow for a role; see :mod:`flame.sdk.registries.mlflow`.

``run SPOOL`` reads the lines of a spool and does them in order, each until MLflow has taken it. It sleeps until the role
nudges it (a byte on stdin) and ends when the spool says so. What is done is noted in the spool, so that the same command,
by hand, finishes a spool that was left. Reports go to stdout, a line of JSON each:

    open {run}         the run is there
    down {reason}      MLflow cannot be reached, said once; it is tried again and again
    up {}              it is back
    refused {reason}   it will never take something; that is left out
    done {uri, version, run}

``fetch URI NAME VERSION FILE`` writes the weights of a registered model as a safetensors file.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from flame.sdk import modelfile
from flame.sdk.weights import get_weights

#: Between attempts to reach MLflow, in seconds: the first wait, and the longest.
BACKOFF_SECONDS = (0.2, 5.0)
#: What MLflow answers when it has understood and will not.
PERMANENT = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
)
WEIGHTS = "weights"


class Worker:
    """One spool and its run in MLflow.

    :param spool: the folder, with ``about.json`` and ``ops.jsonl``.
    :param out: where reports go.
    """

    def __init__(self, spool: Path, out: Any) -> None:
        self.spool = spool
        self.out = out
        self.about: dict[str, Any] = json.loads((spool / "about.json").read_text(encoding="utf-8"))
        self.state: dict[str, Any] = {"done": 0, "run": None, "version": None, "uri": None}
        with contextlib.suppress(FileNotFoundError):
            self.state.update(json.loads((spool / "state.json").read_text(encoding="utf-8")))
        self.client: Any = None
        self.ended = False
        self._down = False

    def report(self, kind: str, **more: Any) -> None:
        """Say something to the role."""
        self.out.write(json.dumps({"type": kind, **more}).encode() + b"\n")
        self.out.flush()

    def work(self) -> None:
        """Do what the spool says until it says that the run has ended, or nobody will add to it any more."""
        wait, listening = BACKOFF_SECONDS[0], True
        while not self.ended:
            try:
                self._catch_up()
            except Exception as error:  # MLflow's clients raise whatever the layer below them raises
                self._note_down(error)
                if not listening:
                    return
                listening = _nudged(wait)
                wait = min(wait * 2, BACKOFF_SECONDS[1])
                continue
            if self._down:
                self._down = False
                self.report("up")
            wait = BACKOFF_SECONDS[0]
            if not self.ended and self._at_end():
                if not listening:
                    return
                if self.about.pop("torch", False):
                    import mlflow.pytorch  # takes seconds: now, while the role works, not at the end  # noqa: F401
                    import torch  # noqa: F401
                listening = _nudged(None)
        self.report("done", uri=self.state["uri"], version=self.state["version"], run=self.state["run"])

    def _at_end(self) -> bool:
        return bool((self.spool / "ops.jsonl").stat().st_size == self.state["done"])

    def _note_down(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"{time.strftime('%F %T')} {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        if not self._down:
            self._down = True
            self.report("down", reason=reason)

    def _catch_up(self) -> None:
        """Do all that is in the spool by now; metrics of several rounds go in one request."""
        self._open()
        with (self.spool / "ops.jsonl").open("rb") as file:
            file.seek(self.state["done"])
            metrics: list[dict[str, Any]] = []
            for line in file:
                if not line.endswith(b"\n"):
                    break  # half written
                operation = json.loads(line)
                if operation["op"] == "metrics":
                    metrics.append(operation)
                else:
                    self._send_metrics(metrics)
                    self._unless_refused(getattr(self, f"_do_{operation['op']}"), operation)
                self.state["pending"] = self.state.get("pending", self.state["done"]) + len(line)
                if operation["op"] != "metrics" or len(metrics) >= 100:
                    self._send_metrics(metrics)
                    self._note_done()
            self._send_metrics(metrics)
            self._note_done()

    def _note_done(self) -> None:
        if "pending" in self.state:
            self.state["done"] = self.state.pop("pending")
        beside = self.spool / ".state.json"
        beside.write_text(json.dumps(self.state), encoding="utf-8")
        os.replace(beside, self.spool / "state.json")

    def _unless_refused(self, function: Any, *arguments: Any) -> None:
        """Call; what MLflow will never take is left out with a report."""
        from mlflow.exceptions import MlflowException

        try:
            function(*arguments)
        except MlflowException as error:
            if error.error_code not in PERMANENT:
                raise
            self.report("refused", reason=" ".join(str(error).split())[:300])

    def _open(self) -> None:
        """Connect, and find or make the experiment and the run."""
        self.state.pop("pending", None)  # of an attempt that failed
        if self.client is not None:
            return
        client = _connect(self.about["uri"])
        if self.state["run"] is None:
            experiment = _experiment(
                client, self.about["uri"], self.about["experiment"], self.about.get("artifacts", "")
            )
            job = self.about["tags"]["flame.job"]
            # A role that was started again goes on with its run.
            runs = client.search_runs([experiment], f"tags.`flame.job` = '{job}'", max_results=1)
            run = (
                runs[0] if runs else client.create_run(experiment, run_name=self.about["run"], tags=self.about["tags"])
            )
            self.state["run"] = run.info.run_id
            self._note_done()
        self.client = client
        self.report("open", run=self.state["run"])

    def _send_metrics(self, operations: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        values = [
            Metric(name, value, operation["time"], operation["round"])
            for operation in operations
            for name, value in operation["metrics"].items()
        ]
        for start in range(0, len(values), 1000):  # MLflow's limit of a request
            self._unless_refused(self.client.log_batch, self.state["run"], values[start : start + 1000])
        operations.clear()

    def _do_params(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:6000]) for name, value in operation["params"].items()]
        for start in range(0, len(params), 100):  # MLflow's limit of a request
            self.client.log_batch(self.state["run"], params=params[start : start + 100])

    def _do_model(self, operation: dict[str, Any]) -> None:
        import mlflow

        if self.state["version"] is not None:
            return  # an earlier attempt got this far
        run = self.state["run"]
        self.client.log_artifact(run, str(self.spool / "model.safetensors"), WEIGHTS)
        with mlflow.start_run(run_id=run):
            info = self._log_whole(operation) if operation["torch"] else None
            info = info or _log_weights(self.spool, operation["name"])
        version = str(info.registered_model_version)
        tags = {**self.about["tags"], "flame.weights": f"runs:/{run}/{WEIGHTS}/model.safetensors"}
        for key, value in tags.items():
            self.client.set_model_version_tag(operation["name"], version, key, value)
        self.state.update(version=version, uri=f"models:/{operation['name']}/{version}")

    def _log_whole(self, operation: dict[str, Any]) -> Any:
        """Log a PyTorch module; None when it cannot be loaded or written here, and MLflow is not to blame."""
        try:
            return _log_torch(self.spool, operation["name"])
        except Exception as error:  # unpickling may raise anything
            self.client.search_experiments(max_results=1)  # raises where MLflow is down
            reason = " ".join(str(error).split())[:300]
            self.report("refused", reason=f"the model as a PyTorch module ({reason}); it gets the weights instead")
            return None

    def _do_end(self, operation: dict[str, Any]) -> None:
        self.client.set_terminated(self.state["run"], operation["status"])
        self.ended = True


def _log_torch(spool: Path, name: str) -> Any:
    """Log a whole PyTorch module. Its class came by value, so it goes by value again."""
    import cloudpickle
    import mlflow.pytorch

    with (spool / "model.pkl").open("rb") as file:
        model = cloudpickle.load(file)  # written by the role's own process, on this machine
    model.eval()
    more: dict[str, Any] = _placed()
    if "serialization_format" in inspect.signature(mlflow.pytorch.log_model).parameters:
        more["serialization_format"] = "pickle"  # the other one needs an example of the input
    return mlflow.pytorch.log_model(
        model, registered_model_name=name, pip_requirements=["torch", "cloudpickle"], **more
    )


def _log_weights(spool: Path, name: str) -> Any:
    """Log the arrays of a model that is no object MLflow knows; ``predict`` gives them by name."""
    import cloudpickle
    import mlflow.pyfunc
    import numpy as np

    class Weights(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        """The arrays of a model, by name."""

        def load_context(self, context: Any) -> None:
            import numpy

            with numpy.load(context.artifacts["weights"], allow_pickle=False) as arrays:
                self.weights = dict(arrays)

        def predict(self, context: Any, model_input: Any = None, params: Any = None) -> Any:
            return self.weights

    arrays, _ = modelfile.load(spool / "model.safetensors")
    np.savez(spool / "weights.npz", **arrays)  # type: ignore[arg-type]
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # whoever loads it may not have Flame
    return mlflow.pyfunc.log_model(
        python_model=Weights(),
        artifacts={"weights": str(spool / "weights.npz")},
        registered_model_name=name,
        pip_requirements=["numpy", "cloudpickle"],
        **_placed(),
    )


def _placed() -> dict[str, str]:
    """Where in a run the model goes: the argument was renamed in MLflow 3."""
    import mlflow

    return {"name" if int(mlflow.__version__.split(".")[0]) >= 3 else "artifact_path": "model"}


def _connect(uri: str) -> Any:
    """A client that has reached MLflow."""
    import mlflow

    with _alone(uri):
        _make_tables(uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    return client


def _make_tables(uri: str) -> None:
    """Make a SQLite store beside its place and move it there: one that is cut off half made can never be opened again."""
    import mlflow

    path = _database(uri)
    if path is None or path.exists():
        return
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{beside}").search_experiments(max_results=1)
    os.replace(beside, path)


def _database(uri: str) -> Path | None:
    """The file of a SQLite URI."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)[1:]).absolute() if parts.scheme.startswith("sqlite") and parts.path else None


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Of several jobs that find an empty store one alone fills it."""
    path = _database(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _experiment(client: Any, uri: str, name: str, artifacts: str) -> str:
    """The experiment's id; it is made where there is none. A SQLite store keeps its artifacts beside the file, or where it is told to."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = _database(uri)
        place = None
        if artifacts:
            place = f"{artifacts.rstrip('/')}/{quote(name, safe='')}"
        elif database is not None:
            place = (database.parent / "mlartifacts" / quote(name, safe="")).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another job was faster
    return str(found.experiment_id)


def _nudged(timeout: float | None) -> bool:
    """Wait for the role; False when it has closed its end, and nothing will be added any more."""
    ready, _, _ = select.select([0], [], [], timeout)
    return not ready or bool(os.read(0, 65536))


def fetch(uri: str, name: str, version: str, target: str) -> None:
    """Write a registered model's weights to a file."""
    import mlflow

    client = _connect(uri)
    tags = client.get_model_version(name, version).tags
    if "flame.weights" in tags:
        with _no_prints():
            path = mlflow.artifacts.download_artifacts(artifact_uri=tags["flame.weights"], tracking_uri=uri)
        weights, _ = modelfile.load(path)
    else:
        import mlflow.pytorch

        weights = get_weights(mlflow.pytorch.load_model(f"models:/{name}/{version}", map_location="cpu"))
    modelfile.save(target, weights)


@contextlib.contextmanager
def _no_prints() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield


def main(arguments: list[str]) -> int:
    """See the module's text."""
    from flame.sdk.launch import die_with_parent

    if not arguments or arguments[0] not in ("run", "fetch") or len(arguments) != (2 if arguments[0] == "run" else 5):
        print(__doc__, file=sys.stderr)
        return 2
    if arguments[0] == "fetch":
        try:
            fetch(*arguments[1:])
        except Exception as error:  # said to the role in one line, whatever MLflow raises
            print(" ".join(str(error).split())[:500])
            return 1
        return 0
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # meant for the role, which closes stdin when it ends
    with contextlib.suppress(OSError):
        os.nice(5)
    # MLflow prints to stdout; reports need one that is theirs alone.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        Worker(Path(arguments[1]), out).work()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
