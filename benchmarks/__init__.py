"""Measurements that anybody can repeat: `python -m benchmarks.training`, and so on."""
