"""Tests of speech separation."""
