"""Who may do what: verifies tokens, issues them, holds permissions."""
