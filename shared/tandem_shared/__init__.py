"""What both services say: step plans, configuration, errors, server scaffolding, logs. Never imports torch."""

VERSION = "0.1.0"
