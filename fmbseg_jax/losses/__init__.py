"""Equations 1 to 4 of the paper, and the log-sum-exp over pairs under them."""

from fmbseg_jax.losses.contrastive import LOSSES, prototype, supcon, tsupcon

__all__ = ["LOSSES", "prototype", "supcon", "tsupcon"]
