"""Speech enhancement: SEGAN."""
