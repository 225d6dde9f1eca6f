"""Thin adapters: each module imports its framework, the package itself none of them."""
