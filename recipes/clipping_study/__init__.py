"""Which clipping for which model: the claims of the literature, tested by small experiments."""
