"""From windows of an image to unit vectors in the space of text."""
