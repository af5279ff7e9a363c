"""Start, list and end workers."""
