"""The embedded default: generated scenes and three tiny foundation models; all runs offline."""
