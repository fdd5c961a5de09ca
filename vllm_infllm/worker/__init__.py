"""vLLM's workers with the rotary tables and the memory plan of InfLLM."""
