"""`firstclaim send`: builds an event, signs and sends it, and reports the answers."""
