"""From a trained adapter to something others can load: merge, gate, card."""
