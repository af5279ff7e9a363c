"""Gossip learning: models travel between neighbours only, and come together little by little."""
