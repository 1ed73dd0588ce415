"""A real PostgreSQL and a real Valkey of this project's own, for a first run and for the tests."""
