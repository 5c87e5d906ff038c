"""`python -m ptacc`: the command line."""

import sys

from ptacc.cli import main

if __name__ == "__main__":
    sys.exit(main())
