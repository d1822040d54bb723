"""`python -m elsa_serve` is `elsa-serve`."""

import sys

from elsa_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
