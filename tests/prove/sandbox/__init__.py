"""Attacks on the tiers of enforcement, each with a control that shows that the attack means something."""
