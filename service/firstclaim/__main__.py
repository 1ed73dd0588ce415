"""`python -m firstclaim` is the `firstclaim` command."""

from firstclaim.cli.main.main import main

if __name__ == "__main__":
    main()
