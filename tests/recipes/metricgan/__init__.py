"""Tests of MetricGAN+."""
