"""Logging, metrics, tracing, and what may be said of an error."""
