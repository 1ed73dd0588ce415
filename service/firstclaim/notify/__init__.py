"""Notices to operators: of dead events, of handlers that fail and recover, and of refused signatures."""
