"""Step 7, comparison: a matrix of methods and schemes, cell by cell, in a store that survives."""
