"""``segue demo``: a tiny model, its adapters, a real server, and a burst of requests that shows a cold start."""
