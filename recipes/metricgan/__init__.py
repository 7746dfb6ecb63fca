"""Speech enhancement: MetricGAN+."""
