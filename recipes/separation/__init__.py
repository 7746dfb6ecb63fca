"""Speech separation: several people who talk at once, each on a track of their own."""
