import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from projects import *
import tempfile
d=Path(tempfile.mkdtemp())
t=time.perf_counter()
p=Project.make(d/'p'); print('make',time.perf_counter()-t); t=time.perf_counter()
r=p.call(); print(r.code, r.err, r.out,time.perf_counter()-t); t=time.perf_counter()
r=p.again(); print(r.code, r.err, r.out,time.perf_counter()-t); t=time.perf_counter()
shutil.rmtree(p.folder/'run_1'); r=p.launch(); print(r.code, r.err, r.out,time.perf_counter()-t); t=time.perf_counter()
shutil.rmtree(p.folder/'run_1'); shutil.rmtree(p.folder/'.saelab'); r=p.launch(workers=1); print(r.code, r.err, r.out,time.perf_counter()-t); t=time.perf_counter()
