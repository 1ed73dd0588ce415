"""`python -m service` is the `firstclaim` command."""

from service.cli import main

if __name__ == "__main__":
    main()
