"""Where bytes come in: nothing behind this package ever sees an unverified byte."""
