"""Benchmarks: what ``segue bench`` runs, and the one form in which all of them report."""
