"""Replicas driven by a cost model in place of a device: what a placement policy does to a whole cluster."""
