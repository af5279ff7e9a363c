"""Synchronous rounds: all who take part work on the same global model."""
