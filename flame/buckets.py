"""Clients of buckets, for whoever needs one: the server's artifacts, a worker's dataset.

Credentials and addresses come from the environment under the names that the clouds' own tools use (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_NAME`` ...), or from the machine's
role in its cloud; never from a URL or a job's file.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flame.errors import MissingExtra, StoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

#: The schemes of buckets, with what they mean.
BUCKETS = {"s3": "S3 and what speaks its protocol", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}


def open_bucket(url: str, patience: float, purpose: str) -> ObjectStore:
    """A client of a bucket, with the credentials of the environment. Nothing is asked of the bucket yet.

    :param url: ``SCHEME://BUCKET[/PREFIX]``.
    :param patience: seconds for which a request is tried again while the service is away.
    :param purpose: what it is needed for, as the beginning of a sentence.
    :raises flame.errors.MissingExtra: the library for buckets is not installed.
    :raises flame.errors.StoreError: the environment's credentials or settings make no sense.
    """
    try:
        from obstore import exceptions
        from obstore.store import from_url
    except ImportError as missing:
        raise MissingExtra("obstore", "cloud", purpose) from missing
    _leave_in_order()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        return from_url(
            url,
            # An operator who writes http:// as the address of the service means it.
            client_options={
                "allow_http": urlsplit(endpoint).scheme == "http",
                "connect_timeout": "5s",
                "read_timeout": "30s",
                "timeout": "1h",  # of a whole request, such as an object of many gigabytes
            },
            retry_config={
                "retry_timeout": timedelta(seconds=patience),
                "max_retries": 1000,
                "backoff": {"max_backoff": timedelta(seconds=2)},
            },
        )
    except (exceptions.BaseError, ValueError) as error:
        raise StoreError(f"The bucket {url} cannot be used: {reason(error)}.") from error


@functools.cache
def _leave_in_order() -> None:
    """Let the interpreter end only when obstore's threads have left it.

    The thread that answers a request is in Python for a moment longer than whoever is woken by its answer. If the interpreter ends in
    that moment, the thread is thrown out by unwinding its stack, which Rust doesn't allow: the process is aborted with everything done (PyO3's issue
    2102; Python 3.14 lets such threads hang instead).
    """
    atexit.register(_await_foreign_threads, 2.0)


def _await_foreign_threads(patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        ours = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        if not sys._current_frames().keys() - ours:
            return
        time.sleep(0.001)  # and lets them have the interpreter


def denied(error: BaseException) -> bool:
    """Whether a failure says that the credentials are missing, wrong or do not suffice."""
    from obstore import exceptions

    text = str(error)
    return (
        isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        or "status code: 403" in text
        or "status code: 401" in text
    )


def reason(error: BaseException) -> str:
    """A cause in a few words. obstore adds a page of what is inside of it, and S3's own sentence stands in XML."""
    text = str(error).split("\n\nDebug source", maxsplit=1)[0].strip()
    if denied(error):
        return "the credentials of the environment do not allow it"
    if said := re.search("<Message>([^<]+)</Message>", text):
        return said[1].rstrip(". ")
    return " ".join(text.split())[:500].rstrip(".: ") or type(error).__name__
