"""The synchronous trainer, under the shorter name that Flame's scripts use."""

from flame.sdk.mode.horizontal.syncfl.trainer import TAG_FETCH, TAG_UPLOAD, Trainer

__all__ = ["TAG_FETCH", "TAG_UPLOAD", "Trainer"]
