"""Proofs that run by themselves: each ends with one line of JSON and an exit code."""
