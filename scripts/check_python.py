"""Stop early, with the remedy, on a Python that the project does not run on."""

import sys

if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        f"Python {found} is too old: ELSA-Serve needs 3.11 or newer. Try: make PYTHON=python3.12 {' '.join(sys.argv[1:])}"
    )
