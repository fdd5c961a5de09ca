"""Tensor operations of InfLLM. They know tensors and token positions, no vLLM type."""
