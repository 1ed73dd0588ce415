"""Limits of the operators' commands, apart from what carries them out: the command line's help needs no driver."""

ROW_DAYS_LEAST = 35  # Stripe resends by hand for 30 days: until then only the row tells a duplicate
LISTED_DAYS_MOST = 30  # for how long Stripe lists an event
