"""Agents known to this process."""
