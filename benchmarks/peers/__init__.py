"""Other systems that run a prompt on a CPU, beside `backend="minference"`."""
