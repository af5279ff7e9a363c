"""Vertical federated learning: parties with different features of the same samples (split learning).

One network is cut in two. Each feature party holds a bottom model and runs it on its own features; the active party holds
the labels and the top model, which takes the bottom models' outputs side by side. For each batch the outputs go up and the
loss's gradients by them come back, so each party takes the very step that it would take in the whole network: the split
computes what the unsplit network does. (Vepakomma et al. 2018, arXiv:1812.00564; Ceballos et al. 2020, arXiv:2008.04137)

**What stays, and what does not.** Features, labels, and all weights stay where they are. What travels are keyed hashes of the
sample ids (see :mod:`flame.sdk.mode.vertical.alignment`), the bottom models' outputs and their gradients. These are not nothing:
outputs can tell of the features they were made of, above all when they are as wide, and gradients of the labels, above all
with two classes. This is no encryption and no differential privacy; parties must trust each other that far.
"""
