"""Runs with a driver that executes compiled code on host memory: kernels with every check of their accesses switched on.

Bounds are those of each tensor's view, shared memory starts as NaN and may not be read before it is written or while a copy is in
flight, and no two programs may touch the same bytes without an atomic in between, one of them writing.

Reads `[architecture, case]` a line; prints `[op, kernel, findings]` a line for every launch.
"""

import json
import sys

from nullgpu import fake_gpu
from trillama.bench.cases import Case
from trillama.kernels import use_backend

for line in sys.stdin:
    arch, case = json.loads(line)
    case, launches = Case(**case), []
    checks = {"bounds": "view", "check_races": True, "check_shared": True, "poison": True}
    try:
        with fake_gpu(arch, "emulate", on_launch=launches.append, **checks), use_backend("triton"):
            case.prepare(case.inputs())()
    except Exception as error:
        print(json.dumps([case.name, launches[-1].name if launches else None, [str(error)]]), flush=True)
    for launch in launches:
        print(json.dumps([case.name, launch.name, list((launch.stats.races or {}).values())]), flush=True)
