"""Clipping study: claims of the literature on gradient clipping, tested by small experiments."""
