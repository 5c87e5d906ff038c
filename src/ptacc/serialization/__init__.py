"""State as JSON and safetensors, and back."""
