"""SAM, Meta's own module, at inference: one image encoder, many points."""
