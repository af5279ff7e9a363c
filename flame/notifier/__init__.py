"""Durable event streams that flamelets and clients follow and resume."""
