"""`python -m loadtest.students`."""

import sys

from loadtest.students.command import main

if __name__ == "__main__":
    sys.exit(main())
