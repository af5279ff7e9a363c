"""The MLflow registry, at arm's length.

MLflow takes seconds to import and its server may be slow or down, and neither may touch a round. So a role only appends
lines to a file, the *spool*, and a process of its own (:mod:`flame.sdk.registries.mlflow_worker`) reads them and talks to
MLflow, again and again until it has taken them. The file outlives that process, and a line is done when MLflow has it.

Only the role that closes the rounds opens a run; trainers' metrics go to the server. A run holds the
hyperparameters, a step of metrics a round, and the model, which becomes a new version of the registered model with the job's
name. Run and version carry the job's id and schema as the tags ``flame.job`` and ``flame.schema``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from flame.errors import FlameError, MissingExtra, WorkerError
from flame.sdk import modelfile
from flame.sdk.registries.base import Registry, Version
from flame.sdk.weights import is_torch

if TYPE_CHECKING:
    from flame.sdk.config import Config
    from flame.sdk.link import Link

log = logging.getLogger(__name__)

WORKER = "flame.sdk.registries.mlflow_worker"
#: How long reading a base model may take, in seconds.
LOAD_SECONDS = 300.0
#: How long a run that failed may take to be marked as such, in seconds.
FAREWELL_SECONDS = 3.0


class MlflowRegistry(Registry):
    """Keeps a job's run in MLflow; ``registry.uri`` is MLflow's tracking URI.

    :ivar run: the run's id, once MLflow has been reached.
    :raises flame.errors.MissingExtra: mlflow is not installed.
    """

    sort = "mlflow"

    def __init__(self, config: Config, link: Link) -> None:
        super().__init__(config, link)
        if importlib.util.find_spec("mlflow") is None:
            raise MissingExtra("mlflow", "mlflow", "The registry 'mlflow'")
        self.uri = config.registry.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd()}/mlflow.db"
        self.spool = Path(tempfile.mkdtemp(prefix="registry-", dir=link.folder))
        self._news = threading.Condition()
        self.run: str | None = None
        self._result: dict[str, Any] | None = None
        self._trouble: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = False
        self._ended = False
        about = {
            "uri": self.uri,
            "artifacts": config.registry.artifacts,
            "experiment": config.job.name,
            "run": f"{config.job.name}-{config.job.job_id}",
            "tags": {"flame.job": config.job.job_id, "flame.schema": config.schema, "flame.task": config.task_id},
            "torch": "torch" in sys.modules,
        }
        (self.spool / "about.json").write_text(json.dumps(about), encoding="utf-8")
        self._ops = (self.spool / "ops.jsonl").open("ab", buffering=0)
        self._start()

    def save_params(self, params: Mapping[str, Any]) -> None:
        """See :class:`Registry`."""
        self._say({"op": "params", "params": {name: str(value) for name, value in params.items()}})

    def save_metrics(self, round: int, metrics: Mapping[str, float]) -> None:
        """See :class:`Registry`."""
        if metrics:
            self._say({"op": "metrics", "round": round, "time": int(time.time() * 1000), "metrics": dict(metrics)})

    def save_model(self, name: str, model: Any, path: Path) -> None:
        """See :class:`Registry`. A PyTorch module is kept whole, with its class; of other models the weights."""
        weights = self.spool / "model.safetensors"
        try:
            try:
                os.link(path, weights)
            except OSError:
                shutil.copyfile(path, weights)
            pickled = is_torch(model) and self._pickle(model)
            self._say({"op": "model", "name": _registrable(name), "torch": pickled})
        except OSError as error:
            self.link.warning(f"The model could not be given to the registry: {error}. It is kept as {path.name}.")

    def load_model(self, name: str, version: int) -> dict[str, npt.NDArray[Any]]:
        """See :class:`Registry`. MLflow is asked in a process of its own, so that this one stays small."""
        what = f"baseModel {name!r} version {version}"
        with tempfile.TemporaryDirectory(dir=self.link.folder) as folder:
            target = Path(folder) / "model.safetensors"
            command = [sys.executable, "-m", WORKER, "fetch", self.uri, _registrable(name), str(version), str(target)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
            except subprocess.TimeoutExpired as error:
                raise WorkerError(f"{what} did not come from {self.uri} within {LOAD_SECONDS:g} s.") from error
            if done.returncode != 0:
                reason = (done.stdout.strip() or done.stderr.strip() or "no reason was given").splitlines()[-1]
                raise WorkerError(f"{what} cannot be loaded from {self.uri}: {reason}")
            return modelfile.load(target)[0]

    def finish(self, timeout: float) -> Version | None:
        """See :class:`Registry`."""
        self._say({"op": "end", "status": "FINISHED"})
        self._ended = True
        with self._news:
            self._news.wait_for(lambda: self._result is not None or self._gone, timeout)
            result, trouble = self._result, self._trouble
        self.close()
        if result is None:
            self._keep_spool(timeout, trouble)
            return None
        shutil.rmtree(self.spool, ignore_errors=True)
        version = result.get("version")
        return Version(result["uri"], version) if version else None

    def close(self) -> None:
        """See :class:`Registry`."""
        if self._ops.closed:
            return
        if not self._ended:
            self._say({"op": "end", "status": "FAILED"})
        self._ops.close()
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()  # nothing more will come
            try:
                process.wait(0 if self._ended and self._result is None else FAREWELL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if not self._ended:
            shutil.rmtree(self.spool, ignore_errors=True)

    def _say(self, operation: Mapping[str, Any]) -> None:
        """Append one line to the spool and nudge the worker."""
        try:
            self._ops.write(json.dumps(operation).encode() + b"\n")
        except (OSError, ValueError) as error:
            log.warning("The registry's spool cannot be written: %s", error)
        process = self._process
        if process is not None and process.stdin is not None:
            try:
                os.write(process.stdin.fileno(), b"\n")
            except BlockingIOError:
                pass  # enough nudges wait there already
            except (OSError, ValueError) as error:
                log.debug("registry: the worker is gone: %s", error)

    def _start(self) -> None:
        environment = {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the worker itself tries on
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "OMP_NUM_THREADS": "1",
            "GIT_PYTHON_REFRESH": "quiet",
            **os.environ,
            "FLAME_PARENT_PID": str(os.getpid()),
        }
        with (self.spool / "worker.log").open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER, "run", str(self.spool)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env=environment,
            )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        threading.Thread(target=self._listen, args=(self._process,), name="flame-registry", daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on what the worker says; notice when it has ended."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._hear(json.loads(line))
        with self._news:
            self._gone = True
            self._news.notify_all()

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        with self._news:
            if kind == "open":
                self.run = message["run"]
            if kind == "done":
                self._result = message
            self._trouble = message.get("reason") if kind == "down" else None
            self._news.notify_all()
        at = time.strftime("%H:%M:%S")
        if kind == "down":
            self.link.warning(
                f"The registry {self.uri} has not answered since {at} ({message['reason']}). The job goes on; what is "
                "to be kept is sent when it is back."
            )
        elif kind == "up":
            self.link.warning(f"The registry {self.uri} is back since {at}.")
        elif kind == "refused":
            self.link.warning(f"The registry {self.uri} refused something: {message['reason']}")

    def _keep_spool(self, timeout: float, trouble: str | None) -> None:
        """The registry did not take it: hand in what it should have got."""
        reason = trouble or ("its process ended" if self._gone else "it is too slow")
        kept = ""
        try:
            archive = shutil.make_archive(str(self.spool), "zip", self.spool)
            place = self.link.artifact("registry.zip", archive, timeout)
            shutil.rmtree(self.spool, ignore_errors=True)
            kept = f" What it should have got is in {place}: unpack it and run python -m {WORKER} run FOLDER."
        except (OSError, FlameError) as error:
            log.warning("The registry's spool could not be handed in: %s", error)
        self.link.warning(
            f"The registry {self.uri} did not take the model within {timeout:g} s: {reason}. "
            f"The model itself is kept as model.safetensors.{kept}"
        )

    def _pickle(self, model: Any) -> bool:
        """Put a PyTorch module in the spool, in a form that another process can load without the role's code."""
        import copy

        import cloudpickle

        folder = os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "main.py"))
        by_value = [
            module
            for name, module in list(sys.modules.items())
            if name != "__main__" and os.path.dirname(getattr(module, "__file__", None) or "").startswith(folder)
        ]
        try:
            if any(tensor.device.type != "cpu" for tensor in model.state_dict().values() if hasattr(tensor, "device")):
                model = copy.deepcopy(model).cpu()
            for module in by_value:
                cloudpickle.register_pickle_by_value(module)
            with (self.spool / "model.pkl").open("wb") as file:
                cloudpickle.dump(model, file)
        except Exception as error:  # whatever a user's class may raise while it is pickled
            self.link.warning(f"The model's class cannot be pickled ({error}); the registry gets its weights only.")
            return False
        finally:
            for module in by_value:
                if module.__name__ in cloudpickle.list_registry_pickle_by_value():
                    cloudpickle.unregister_pickle_by_value(module)
        return True


def _registrable(name: str) -> str:
    """A model's name as MLflow takes it."""
    return name.replace("/", "-").replace(":", "-")
