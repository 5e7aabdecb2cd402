"""What people see: the terminal, token chips, charts."""
