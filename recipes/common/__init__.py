"""Code that two or more tasks share."""
