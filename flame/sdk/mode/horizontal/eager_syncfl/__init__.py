"""Eager aggregation: an aggregator in a tree sends up what it has while the rest of its group still works."""
