"""Coordinated federated learning: a coordinator says which trainers work with which aggregator, anew in each round.

Everybody can reach everybody: all trainers and middle aggregators are in one group of their channel. In each round the top asks the
coordinator, which spreads the trainers over the aggregators that are there and tells all three tiers. When an aggregator dies in
the middle of a round, the top asks again, and the dead one's trainers are given to the others in the same round: a dead
aggregator costs time, not updates.
"""
