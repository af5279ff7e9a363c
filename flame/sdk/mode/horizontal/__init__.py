"""Horizontal federated learning: sites with different samples of the same features."""
