"""`python -m loadtest.routing`."""

import sys

from loadtest.routing.command import main

if __name__ == "__main__":
    sys.exit(main())
