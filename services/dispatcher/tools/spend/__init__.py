"""The tools of the spend analyst: what a usage log says, costs and could cost."""
