"""Stop early, with the remedy, on a Python that the project does not run on."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (an older Python is the case this file is for)
    sys.exit(f"Python {sys.version.split()[0]} is too old: ELSA-Serve needs 3.11 or newer. Try: make PYTHON=python3.12")
