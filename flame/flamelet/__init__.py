"""The agent in a worker."""
