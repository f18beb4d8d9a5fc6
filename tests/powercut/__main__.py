"""python -m tests.powercut [--seed N]: see README.md."""
from __future__ import annotations
import sys, time
from pathlib import Path
from random import Random
import tempfile
from tests.powercut.history import History
from tests.powercut.states import *
from tests.powercut.check import check, Violation

seed=int(sys.argv[1]); steps=int(sys.argv[2]); per=int(sys.argv[3])
d=Path(tempfile.mkdtemp(prefix="powercut-",dir="/dev/shm"))
t0=time.time()
h=History(d,Random(seed))
with h.running():
    for _ in range(steps): h.step()
print("recorded",time.time()-t0,"events",h.recorder.time,"boundaries",len(h.recorder.boundaries))
r=Random(seed+1)
n=0
for at,what in h.recorder.boundaries:
  for time_ in (at-1,at):
    if time_ < h.recorder.segment_at(at).begin: continue
    for i in range(per):
        choice=[NOTHING,EVERYTHING][i] if i<2 else random_choice(r)
        state=after_cut(h.recorder,time_,choice)
        make(state,h.path,str(d/"cut"))
        n+=1
        try: check(str(d/"cut"),h.expected,time_,1000)
        except Violation as e:
            print("seed",seed,"time",time_,what,"choice",i,"steps",[s for s in h.steps if s[0]<=time_][-6:],"\n  ",e)
            if "-x" in sys.argv: raise
print(n,"states",time.time()-t0)
