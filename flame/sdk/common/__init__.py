"""Small helpers that scripts written for Flame's library import from ``flame.common``."""
