"""Model families. They know torch and the layers, never the wire."""
