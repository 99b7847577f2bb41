"""Annotated sets: any folder, and the nine published ones."""
