"""Measurements that anybody can repeat: `python -m benchmarks.training`, and so on.

A module NAME_worker.py is what a benchmark runs in a process of its own.
"""
