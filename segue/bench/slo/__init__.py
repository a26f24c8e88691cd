"""``segue bench slo``: how many requests a second a server takes with a wanted share of them inside their targets."""
