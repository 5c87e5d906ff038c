"""Scripts for PyTorch and Accelerate that do what a composition does: `ptacc eject`."""
