"""Real applications, served on real databases and judged from outside."""
