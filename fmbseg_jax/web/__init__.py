"""The page, what it shows, and where it listens."""
