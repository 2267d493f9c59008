"""What computes: one module for each backend (`protocol` says what it has), their choice, and the call cache."""
