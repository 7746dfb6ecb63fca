"""Diagnostics: layer norms and warnings, non-finite steps, profiling."""
