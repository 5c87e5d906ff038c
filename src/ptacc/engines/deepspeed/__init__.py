"""DeepSpeed's ZeRO, driven as an engine."""
