"""``segue bench coldstart``: what a request pays when its adapter is not on the device."""
