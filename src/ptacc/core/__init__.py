"""The core: composition, the loop, the state of a run, and the one adapter over Accelerate."""
