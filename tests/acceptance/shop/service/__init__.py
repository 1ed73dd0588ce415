"""A made-up shop. Its package is named `service`, as many are."""
