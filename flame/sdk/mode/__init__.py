"""Roles, composed of tasklets."""
