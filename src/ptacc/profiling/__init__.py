"""Traces, throughput and what is known of the hardware."""
