"""Other kinds of files that a quantized network is written as: one file, one format."""
