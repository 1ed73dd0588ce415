"""`firstclaim load`: a load test and its verdict."""
