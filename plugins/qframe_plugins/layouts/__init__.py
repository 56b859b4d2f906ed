"""How folders store quantized layers, so that other software reads them: one file, one layout."""
