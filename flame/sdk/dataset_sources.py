"""Where a dataset's bytes come from: a web server, or a bucket. Each can say whether it still is what we have, and begin in the middle.

A source is asked with a validator, the ETag or date of what is there already, and answers with None (that one is still good), or
with the bytes from a given place on. What it raises says whether trying again makes sense.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from flame.buckets import denied, open_bucket, reason
from flame.errors import StoreError

_PIECE = 1 << 20
_SILENCE = 30.0  # seconds without a byte after which a connection is given up


class Refused(Exception):
    """It makes no sense to try again; the text says why, as the end of a sentence."""


class Interrupted(Exception):
    """It may work in a moment."""


class Answer(NamedTuple):
    """What a source gives.

    :ivar validator: an ETag, or a date; empty where there is none.
    :ivar size: of the whole in bytes; None where it is not said.
    :ivar start: at which byte the pieces begin; 0 where the middle was asked for and is not given.
    :ivar pieces: the bytes.
    """

    validator: str
    size: int | None
    start: int
    pieces: Iterator[bytes]


class Source(Protocol):
    """Where one dataset comes from."""

    def ask(self, have: str, begun: str, start: int) -> Answer | None:
        """Ask for the bytes from ``start`` on.

        :param have: the validator of a whole copy that is there; None is answered when that is still good.
        :param begun: the validator of what was begun, whose first ``start`` bytes are there.
        :raises Refused: it cannot be had.
        :raises Interrupted: it cannot be had just now.
        """


class Web:
    """A dataset on a web server, by the standard library: it knows proxies and redirections, and needs nothing."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, have: str, begun: str, start: int) -> Answer | None:
        """See the protocol."""
        # What is encoded on the way has other bytes and another length than the file.
        request = urllib.request.Request(self._url, headers={"User-Agent": "flame", "Accept-Encoding": "identity"})  # noqa: S310 - checked
        if have:
            request.add_header("If-None-Match" if _is_tag(have) else "If-Modified-Since", have)
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", begun)
        try:
            answer = urllib.request.urlopen(request, timeout=_SILENCE)  # noqa: S310 - the scheme was checked
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 304:
                    return None
                if error.code == 416 and start:
                    return self.ask(have, "", 0)  # the file is shorter now, or all of it is there
                if error.code >= 500 or error.code in (408, 425, 429):
                    raise Interrupted(f"it answers {error.code} {error.reason}") from error
                raise Refused(f"it answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(_why(error)) from error
        begin, size = 0, answer.headers.get("Content-Length")
        if answer.status == 206:
            given = str(answer.headers.get("Content-Range", "")).removeprefix("bytes ").partition("-")[0]
            begin = int(given) if given.isdigit() else 0
            if begin != start:
                answer.close()
                raise Refused("it gives another part than was asked for")
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        return Answer(tag, begin + int(size) if size else None, begin, _read(answer))


class Bucket:
    """A dataset in a bucket."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._path = unquote(parts.path.lstrip("/"))
        if not self._path:
            raise Refused("the URL names a bucket and no object in it")
        try:
            # It is asked again by us, with a word to the user, so not for long by the library.
            self._store = open_bucket(f"{parts.scheme}://{parts.netloc}", 2.0, "A dataset in a bucket")
        except StoreError as error:
            raise Refused(error.message.rstrip(".")) from error

    def ask(self, have: str, begun: str, start: int) -> Answer | None:
        """See the protocol."""
        import obstore
        from obstore import exceptions

        options: dict[str, Any] = {}
        if have:
            options["if_none_match"] = have
        if start:
            options |= {"range": {"offset": start}, "if_match": begun}
        try:
            found = obstore.get(self._store, self._path, options=options)  # type: ignore[arg-type]
        except exceptions.NotModifiedError:
            return None
        except exceptions.PreconditionError:
            return self.ask(have, "", 0)  # another object is there now
        except FileNotFoundError as error:
            raise Refused("there is no such object") from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            if start and "status code: 416" in str(error):
                return self.ask(have, "", 0)
            raise (Refused if denied(error) else Interrupted)(reason(error)) from error

        def pieces() -> Iterator[bytes]:
            try:
                for piece in found.stream(min_chunk_size=_PIECE):
                    yield bytes(piece)
            except (exceptions.BaseError, OSError, ValueError) as error:
                raise Interrupted(reason(error)) from error

        return Answer(found.meta["e_tag"] or "", found.meta["size"], start, pieces())


def _read(answer: Any) -> Iterator[bytes]:
    with answer:
        while True:
            try:
                piece = answer.read(_PIECE)
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(_why(error)) from error
            if not piece:
                return
            yield piece


def _is_tag(validator: str) -> bool:
    return validator.endswith('"')


def _why(error: BaseException) -> str:
    cause = getattr(error, "reason", None) or error  # urllib wraps what went wrong
    return str(getattr(cause, "strerror", None) or cause).rstrip(".") or type(error).__name__
