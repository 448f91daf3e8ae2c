"""How servers run in a Ray cluster."""
