"""What services and client share: step plans, settings, errors, gRPC servers, processes. Never imports torch."""

VERSION = "0.1.0"
