"""The page at /admin: a pair of eyes on the ledger, and one hand, which makes events due again."""
