"""What is large and never changed once it is written: models, checkpoints, code bundles, logs of the past.

:func:`open_artifacts` chooses the place by a URL; :class:`Artifacts` is what all places can do. They are apart from the
state, because what is written once and read in one go is kept best by a file system or a bucket, not by a database.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flame.artifacts.base import Artifact, Artifacts
from flame.buckets import BUCKETS
from flame.errors import UsageError

__all__ = ["Artifact", "Artifacts", "open_artifacts"]


def open_artifacts(url: str | None, data_dir: Path) -> Artifacts:
    """Open the place of artifacts that ``url`` names. A bucket is looked for at the first use.

    :param url: ``s3://BUCKET[/PREFIX]``, ``gs://BUCKET[/PREFIX]``, ``az://CONTAINER[/PREFIX]`` or ``file:///FOLDER``; None: ``data_dir``.
        Credentials never stand in it: they come from the environment.
    :param data_dir: the server's data directory.
    :raises flame.errors.UsageError: the URL is not one of these.
    :raises flame.errors.MissingExtra: the library for buckets is not installed.
    """
    if url is None:
        from flame.artifacts.files import FileArtifacts

        return FileArtifacts(data_dir)
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in (*BUCKETS, "file"):
        shown = re.sub(r"//[^/@]*@", "//***@", url)
        raise UsageError(
            f"The place of artifacts {shown!r} is of no known kind; "
            "'s3://BUCKET/PREFIX', 'gs://BUCKET/PREFIX', 'az://CONTAINER/PREFIX' and 'file:///FOLDER' are."
        )
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise UsageError(
            f"The place of artifacts on {scheme} must hold no credentials and no options; they come from the environment, "
            "such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL."
        )
    if scheme == "file":
        from flame.artifacts.files import FileArtifacts

        if parts.netloc or not parts.path.strip("/"):
            raise UsageError(f"The place of artifacts {url!r} names no folder; write it like 'file:///srv/flame'.")
        return FileArtifacts(Path(unquote(parts.path)), apart=True)
    if not parts.netloc:
        raise UsageError(f"The place of artifacts {url!r} names no bucket; write it like '{scheme}://BUCKET/PREFIX'.")
    from flame.artifacts.bucket import BucketArtifacts

    return BucketArtifacts(url)
