"""The HTTP endpoints. No unverified byte gets past this package."""
