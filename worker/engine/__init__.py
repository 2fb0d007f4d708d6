"""Step-level continuous batching: rows of different jobs share each forward pass and join or leave at any step."""
