"""Windows of images → features → similarities → label maps, for any words."""
