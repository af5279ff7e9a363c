"""State: one interface, several databases."""
