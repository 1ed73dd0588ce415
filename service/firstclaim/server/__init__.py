"""The HTTP server: its protocol, its connection limiter, its runner, and the checks before it starts."""
