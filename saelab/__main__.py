"""`python -m saelab`: the command line, see `saelab/cli`."""

from saelab.cli import main

if __name__ == "__main__":
    main()
