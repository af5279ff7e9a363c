"""Benchmarks of the hot paths: each runs its rival, or the machine's limit, in the same run and reports the ratio."""
