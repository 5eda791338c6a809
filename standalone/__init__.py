"""All of Netra on one machine, with nothing to install beforehand."""
