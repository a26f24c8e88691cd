"""``segue calibrate``: what steps, copies and the CPU's help cost on this machine, as a profile."""
