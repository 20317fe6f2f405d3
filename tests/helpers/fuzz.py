"""How many random examples the property tests try: a few in ``make test``, many in ``make fuzz``."""

import os

from hypothesis import HealthCheck, settings

FEW = 100
EXAMPLES = int(os.environ.get("DECINB_FUZZ_EXAMPLES", FEW))

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == FEW,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
