"""`dump-ir`, the command."""

import time

from stagecut.tools.dump_ir import lookups as lookups
from stagecut.tools.dump_ir import variables as variables

STARTED = time.time_ns()
"""The time before any file of a user's was read."""
