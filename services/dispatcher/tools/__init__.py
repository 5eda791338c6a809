"""Everything between an agent naming a tool and its result."""
