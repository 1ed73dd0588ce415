"""What operators read and change in the ledger, and the Stripe API that it is reconciled with."""
