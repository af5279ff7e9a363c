"""Federated evaluation: an existing model is tried on data that stay with their sites; nothing is trained.

The roles have the function tags of synchronous learning, so its schemas serve, and a trainer's script becomes an evaluator's by its
base class. What a site's ``evaluate`` tells ``update_metrics`` is averaged, weighted by ``dataset_size``: for a metric that is
itself a mean over samples (accuracy, loss) this is its value on the pooled data, exactly. For one that is not (F1, AUC) it is a mean
over sites and no more.
"""
