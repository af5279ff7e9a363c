"""The flame command."""
