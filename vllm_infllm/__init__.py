"""InfLLM (arXiv 2402.04617) as a vLLM plugin: long contexts without training, with a bounded KV cache."""

__version__ = "0.1.0"
