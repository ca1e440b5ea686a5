"""Tandem, as a user imports it."""
