"""Where the data of InfLLM lives: token geometry, block manager, unit pool, host store, connector."""
