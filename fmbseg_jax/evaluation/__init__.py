"""Label maps against ground truth: protocol, counting, systems, tables, pictures."""
