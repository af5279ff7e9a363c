"""Rings below an aggregator: groups average among themselves, and one delegate a group speaks with the aggregator."""
