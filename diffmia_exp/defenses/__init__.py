"""Defences: one file each, chosen by `defense=` (conf/defense)."""
