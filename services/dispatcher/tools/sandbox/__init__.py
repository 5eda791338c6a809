"""One file per enforcement tier: how a tool's code is contained."""
