"""HTTP that belongs to no single endpoint."""
