"""The addresses of the stores and of Stripe's API, and Stripe's key and secrets, as the environment gives them."""
