"""Runs a role's script in a worker: ``python -m flame.sdk.launch main.py config.json``.

The script runs as ``__main__``, with its folder first in ``sys.path``, as if Python had been given it. Around it:

* The process dies with the flamelet that started it (``FLAME_PARENT_PID``), also when that one is killed; at the latest when the
  link to it breaks.
* What it prints is in the task's log at once, a line at a time.
* How it failed reaches the user: a :class:`flame.errors.FlameError` as its sentence, without a traceback; anything else as
  the traceback in the log and its last line, with the place in the role's own code, over the link.
* A worker that was asked to end (SIGTERM) leaves its channels first. One that failed and is still held by a thread of the user's
  is ended hard after a while: a job must not hang on a worker that has nothing more to say.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from flame.errors import FlameError, UsageError
from flame.sdk import link as links
from flame.sdk.chaospoints import points

#: How long a process that failed may take to end, in seconds.
LINGER_SECONDS = 10.0

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run a script; gives the status to exit with."""
    die_with_parent()
    _calm_thread_pools()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    signal.signal(signal.SIGTERM, _end)
    if (reach := points(Path.cwd().name)) is not None:  # the folder has the role's name
        reach("start", 0)
    link = links.current()
    link.on_lost = _end_as_orphan
    atexit.register(link.close)  # the last of them: those registered later run earlier
    try:
        if not arguments:
            raise UsageError("Usage: python -m flame.sdk.launch SCRIPT [ARGUMENT ...]")
        _run(arguments)
    except SystemExit as error:
        return _status(error, link)
    except KeyboardInterrupt:
        return _failed(130)
    except FlameError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr, flush=True)
        link.failure(error.message)
        return _failed(1)
    except BaseException as error:
        _print_traceback(error)
        link.failure(_last_line(error))
        return _failed(1)
    return 0


def _run(arguments: list[str]) -> None:
    """Run a script in a fresh module ``__main__``, so that its classes are where pickling libraries look for them."""
    path = Path(arguments[0]).absolute()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"The script {arguments[0]} cannot be read: {error.strerror}.") from error
    module = ModuleType("__main__")
    module.__file__ = str(path)
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv = [arguments[0], *arguments[1:]]
    sys.path[0] = str(path.parent)  # in place of the folder that `-m` has put there
    exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 (running the user's script is the task)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the flamelet dies; and look whether it has died already."""
    parent = os.environ.pop("FLAME_PARENT_PID", None)
    if parent is None:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit(1)


def _end_as_orphan() -> None:
    """The flamelet is gone, so this attempt is over: its successor must not meet what this one still does.

    The kernel says so too (:func:`die_with_parent`), but only when it has cleared the flamelet's memory away; by then a worker that takes
    nobody's word any more may have told its peers of a round that is not kept.
    """
    os._exit(1)


def _calm_thread_pools() -> None:
    """Native libraries take a thread a core each by default, and spin while they wait. Several workers share this machine."""
    if "FLAME_TASK" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 4)))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that channels are left; a second signal ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _status(error: SystemExit, link: links.Link) -> int:
    if error.code is None or isinstance(error.code, int):
        return _failed(error.code) if error.code else 0
    print(error.code, file=sys.stderr, flush=True)
    link.failure(str(error.code))
    return _failed(1)


def _failed(status: int) -> int:
    """See to it that the process ends soon, whatever the user's threads do."""
    watchdog = threading.Timer(LINGER_SECONDS, _end_hard, [status])
    watchdog.daemon = True
    watchdog.start()
    return status


def _end_hard(status: int) -> None:
    print(f"Ending hard: threads still run {LINGER_SECONDS:g} s after the failure.", file=sys.stderr, flush=True)
    links.current().flush(1.0)
    sys.stdout.flush()
    os._exit(status)


def _print_traceback(error: BaseException) -> None:
    """The traceback as Python would print it, from the script on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)
    sys.stderr.flush()


def _last_line(error: BaseException) -> str:
    """``ValueError: too small (main.py:12, in train)``: the error, and the innermost place in the role's own code."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({os.path.basename(error.filename)}:{error.lineno})"
    folder = sys.path[0]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.dirname(frame.filename) == folder:
            return f"{text} ({os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name})"
    return text


if __name__ == "__main__":
    # As an import, so that the classes that errors are compared with are the ones that the script meets.
    from flame.sdk import launch  # noqa: PLW0406

    sys.exit(launch.main(sys.argv[1:]))
