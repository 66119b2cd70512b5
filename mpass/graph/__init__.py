"""The captured graph: its nodes, what it writes in place, and the attentions found in it."""
