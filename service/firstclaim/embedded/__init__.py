"""A real PostgreSQL and a real Valkey that this package starts itself, for a first run and for the tests."""
