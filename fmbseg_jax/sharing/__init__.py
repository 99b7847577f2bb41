"""An aligner as others get it: folder, model.json, card, StableHLO, loading."""
