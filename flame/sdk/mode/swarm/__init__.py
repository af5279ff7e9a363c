"""Swarm learning: the aggregating role moves among the trainers from round to round."""
