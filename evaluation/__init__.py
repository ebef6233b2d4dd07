"""Metrics, paired statistics and result files."""
