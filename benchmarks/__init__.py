"""The benchmark, `python -m benchmarks`: stock vLLM against InfLLM on CPU. Not part of the installed package."""
