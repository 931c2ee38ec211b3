"""Plug-ins: attacks that wrap a host attack, `attack=<host> attack/plugin=<name>`."""
