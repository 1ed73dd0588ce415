"""`python -m tests.load.compare --ours URL --peer URL`: two receivers side by side, in alternating rounds.

Machines are noisy, and so are their neighbours: what one round says of both sides at the same time is worth more
than any figure of either. Quote the median of the ratios, never a rate.
"""

import argparse

from rich.console import Console

from tests.load.driver import CONNECTIONS, Driver, Kind, side_by_side


def main() -> None:
    """Print every round, and the median ratio of each kind of load."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.compare", description=__doc__)
    parser.add_argument("--ours", required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--secret", default="whsec_test")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--load", type=Kind, choices=[*Kind], action="append")
    asked = parser.parse_args()
    sides = {
        name: Driver(url, asked.secret, asked.seconds, asked.connections)
        for name, url in (("ours", asked.ours), ("peer", asked.peer))
    }
    Console().print(side_by_side(sides, asked.load or [Kind.FRESH, Kind.DUPLICATES], asked.rounds))


if __name__ == "__main__":
    main()
