"""The commands of `elsa-serve`, one module each: `add_command(subparsers)` and `run(args)`."""
