"""Runs under faults: every accepted run ends, its record has no hole, and what was committed is not done again."""
