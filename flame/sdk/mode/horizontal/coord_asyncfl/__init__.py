"""Coordinated asynchronous federated learning: a coordinator keeps the trainers spread evenly over the aggregators there are.

There are no rounds to assign anew in. The coordinator looks whenever somebody comes or goes, moves as few trainers as it takes, and
tells those whom it concerns; nobody has to stop working for it.
"""
