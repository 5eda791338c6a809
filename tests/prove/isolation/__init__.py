"""Users never meet: what one of them has reaches nobody else, whatever others ask, whatever breaks meanwhile."""
