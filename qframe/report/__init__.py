"""Step 7, reports: what was done to each layer and how well, as table, JSON and CSV."""
