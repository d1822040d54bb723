"""`elsa-serve` with a planted slowdown: `python slowed_server.py FACTOR serve MODEL_DIR …`.

Every pass over the layers takes FACTOR times as long as it would: the engine sleeps after each.
"""

import sys
import time

from elsa_serve.cli import main
from elsa_serve.offload.step import PassRunner

factor = float(sys.argv[1])
run = PassRunner.run


def slowed(self, parts):
    start = time.perf_counter()
    rows = run(self, parts)
    time.sleep((factor - 1) * (time.perf_counter() - start))
    return rows


PassRunner.run = slowed
raise SystemExit(main(sys.argv[2:]))
