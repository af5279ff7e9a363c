"""Chaos as a tool: kill, pause and cut off the parts of a running job on purpose, at exact moments, and see that it goes on.

* :mod:`~flame.chaos.plan`: what shall happen to whom and when, read from what a user writes (pure);
* :mod:`~flame.chaos.reach`: who is there: workers that are processes of this host (:mod:`~flame.chaos.processes`), in containers of Docker
  engines (:mod:`~flame.chaos.containers`) and in pods (:mod:`~flame.chaos.pods`);
* :mod:`~flame.chaos.acts`: what can be done to a process of this host;
* :mod:`~flame.chaos.server`: a server of one's own, which may be killed and comes back;
* :mod:`~flame.chaos.drill`: a plan carried out on a job.

Moments are kept by the workers themselves: they stop at the points of :mod:`flame.sdk.chaospoints`, and are let go when the deed is done.
"""
