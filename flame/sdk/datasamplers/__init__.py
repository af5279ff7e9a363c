"""Which samples a trainer uses in a round."""
