"""`pillion check`: what an installation needs and has, as data: one `Check` a row, grouped by category."""
