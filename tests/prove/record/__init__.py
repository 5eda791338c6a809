"""The record under load and faults: what was acknowledged must be there, in order, once, and reach its user alone."""
