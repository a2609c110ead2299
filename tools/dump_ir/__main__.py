"""`python -m stagecut.tools.dump_ir`."""

import sys

from stagecut.tools.dump_ir.main import main

if __name__ == "__main__":
    sys.exit(main())
