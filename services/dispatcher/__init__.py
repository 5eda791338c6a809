"""Runs agents and the tools they call."""
