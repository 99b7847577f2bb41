"""Stage 1 (paper, sections 3.1 and 3.2): CLIP and SAM write pseudo labels. PyTorch lives here."""
