"""Layers that all networks share, and the aligner."""
