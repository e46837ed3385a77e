"""Training: one loop for n cells on one stream."""
