"""The guarantee: lock, ledger, claims, dispatch, and the one pipeline that deliveries and recovery share."""
