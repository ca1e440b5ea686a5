"""An open-loop load generator: requests are sent when they are due, however slow the server is."""
