"""The HTTP endpoints. A delivery leaves this package only once its signature is verified."""
