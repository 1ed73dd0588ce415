"""`python -m firstclaim` is the `firstclaim` command."""

from firstclaim.cli.main import main

if __name__ == "__main__":
    main()
