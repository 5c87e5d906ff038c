"""Profiler traces, throughput, and properties of the hardware."""
