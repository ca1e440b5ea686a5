"""Model families, and the interface by which the rest of the worker knows them. They know torch, never the wire."""
