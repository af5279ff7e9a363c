"""Stands for the flamelet in the tests of runners: does what BEHAVIOUR says, and prints that it runs."""

import os
import signal
import sys
import time

behaviour = os.environ.get("BEHAVIOUR", "wait")
if "stubborn" in behaviour:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "polite" in behaviour:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
if "tell" in behaviour:
    print({name: os.environ.get(name) for name in behaviour.split("=")[1].split(",")}, flush=True)
if "import" in behaviour:
    print(__import__(behaviour.split("=")[1]).__file__, flush=True)
print("worker", os.environ["FLAME_TASK"], flush=True)
if "exit" in behaviour:
    sys.exit(int(behaviour.split("=")[1]))
if "sig" in behaviour:
    os.kill(os.getpid(), int(behaviour.split("=")[1]))
if "eat" in behaviour:
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20)))
time.sleep(1000)
