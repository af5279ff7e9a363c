"""Roles: what workers of each topology do, composed of tasklets."""
