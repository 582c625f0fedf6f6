"""`python -m loadtest.chaos`."""

import sys

from loadtest.chaos.campaign import main

if __name__ == "__main__":
    sys.exit(main())
