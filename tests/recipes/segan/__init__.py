"""Tests of SEGAN."""
