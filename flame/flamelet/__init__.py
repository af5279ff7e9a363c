"""The agent in a worker: waits for events, fetches the task's manifest, runs the code as a child process, reports.

``python -m flame.flamelet`` is what a runner starts. It outlives its server: while the server is away the child goes
on, and what there is to say is kept and said afterwards. It never outlives its right to run: when the server
says that another attempt has taken its place, the child is ended and nothing more is reported.

* :mod:`flame.flamelet.agent`: the order of things
* :mod:`flame.flamelet.child`: the process group that runs the role's code, and the link to it
* :mod:`flame.flamelet.outbox`: reports, numbered and delivered once
* :mod:`flame.flamelet.output`: the task's log, kept on disk and shipped whole
* :mod:`flame.flamelet.fetch`: manifest and code
"""
