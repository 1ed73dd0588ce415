"""Logging, metrics, tracing, and the redaction of error messages."""
