"""What models are built of: layers and operations. They know torch, never the wire."""
