"""Images, label maps and records, in memory and on disk."""
