"""The `firstclaim` command, a module for each group of commands."""
