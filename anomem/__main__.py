"""`python -m anomem` is the command `anomem`."""

import sys

from anomem.cli import main

if __name__ == "__main__":
    sys.exit(main())
