"""The `flame` command: one module a noun, each a thin layer on :mod:`flame.client`.

What people type often must answer fast, so a command's module is imported when that command runs, and only then.
"""
