"""``python -m recgrela_ext.demo``: train for two minutes, compare, recommend, stream, draw."""
