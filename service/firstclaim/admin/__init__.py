"""The admin page at /admin: it shows the ledger, and its only change is to make events due again."""
