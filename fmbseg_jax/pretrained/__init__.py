"""Published model files: found, fetched, read, and converted completely."""
