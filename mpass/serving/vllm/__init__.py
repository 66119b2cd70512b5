"""A plugin for vLLM: long prefills are sparse, everything else is vLLM's own attention."""
