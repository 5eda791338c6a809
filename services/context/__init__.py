"""The immutable frame a run executes in, and the thread it belongs to."""
