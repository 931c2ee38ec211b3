"""Membership inference attacks on diffusion models, one family per access scenario."""

__version__ = "0.1.0"
