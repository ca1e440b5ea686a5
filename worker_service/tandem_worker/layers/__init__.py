"""The parts of the forward pass. They know torch, never the wire."""
