"""`dump-ir`, the command."""

import time

STARTED = time.time_ns()
"""The time before any file of a user's was read."""
