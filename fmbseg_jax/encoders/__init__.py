"""The frozen towers: DINOv2, DINOv3 and CLIP."""
